"""Runs the tests that need the accelerator of ``accelerator.py`` in a process of their own.

PyTorch has to know of a device before its first backward pass, and never forgets it again.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import accelerator

HERE = Path(__file__).parent


@pytest.mark.skipif(not accelerator.available(), reason="this torch takes no device from Python")
@pytest.mark.parametrize(
    "file", ["accelerator_steps.py", "savings/offload_on_accelerator.py", "train/accelerator_runs.py"]
)
def test_on_an_accelerator(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / file)]
    run = subprocess.run(
        command, cwd=HERE.parent, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
