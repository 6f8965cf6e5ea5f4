"""What the project says of the versions that it works with."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_oldest_versions_that_are_tested_are_the_oldest_that_are_admitted() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tools = {"ruff", "pyright", "pre-commit", "triton"}  # not of a run; triton comes with torch
    admitted = {}
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        name, version = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:;.*)?", line).groups()
        if name not in tools:
            admitted[name] = version
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert {name: _padded(version) for name, version in admitted.items()} == {
        name: _padded(version) for name, version in tested.items()
    }


def _padded(version: str) -> list[int]:
    return [*(int(part) for part in version.split(".")), 0][:3]
