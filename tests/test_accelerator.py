"""Runs the tests that need the accelerator of ``accelerator.py`` in a process of their own.

PyTorch has to know of a device before its first backward pass, and never forgets it again.
"""

import contextlib
import os
from pathlib import Path

import pytest

import accelerator
from ranks import context

HERE = Path(__file__).parent


def run_tests(file: str, said: str) -> None:
    with open(said, "w") as out, contextlib.redirect_stdout(out):  # noqa: PTH123
        code = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / file)])
    os._exit(code)


@pytest.mark.skipif(not accelerator.available(), reason="this torch takes no device from Python")
@pytest.mark.parametrize(
    "file", ["accelerator_steps.py", "savings/offload_on_accelerator.py", "train/accelerator_runs.py"]
)
def test_on_an_accelerator(file: str, tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    process = context().Process(target=run_tests, args=(file, str(said)))
    process.start()
    process.join(900)
    process.kill()  # one that is not done
    process.join()
    assert process.exitcode == 0, said.read_text()[-8000:]
