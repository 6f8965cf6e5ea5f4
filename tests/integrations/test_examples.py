"""The examples keep what docs/integrations.md says of them: every loop, every form."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from benchmarks.integrations import CHECKS, EXAMPLES, FORMS, LOOPS, check, check_on_rank, held_on_all

from ranks import run_on_two_ranks

PAGE = (EXAMPLES.parent / "docs/integrations.md").read_text(encoding="utf-8")
ALL = dict.fromkeys(CHECKS, True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loop", [loop for loop in LOOPS if loop != "ddp"])
def test_an_example_trains_accumulates_resumes_and_loads(loop: str, form: str, tmp_path: Path) -> None:
    for library in LOOPS[loop][0]:
        pytest.importorskip(library)
    assert check(loop, form, tmp_path) == ALL


def test_the_same_on_two_ranks(tmp_path: Path) -> None:
    run_on_two_ranks(check_on_rank, str(tmp_path), FORMS)
    assert held_on_all(tmp_path, FORMS) == dict.fromkeys(FORMS, ALL)


def test_the_page_names_every_example_and_each_is_short() -> None:
    files = {path.name: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert set(re.findall(r"\(\.\./examples/(\w+\.py)\)", PAGE)) == files.keys()
    assert files.keys() - {"tiny.py"} == {f"{loop}.py" for loop in LOOPS}
    assert all(len(text.splitlines()) <= 40 for name, text in files.items() if name != "tiny.py")
    for _, title in LOOPS.values():
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| {title} |"))
        assert row.split("|")[2:5] == [f" {', '.join(CHECKS)} "] * len(FORMS)
