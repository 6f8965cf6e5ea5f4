"""Where rows go, and what every benchmark shares with ``poetx bench``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from poetx.bench.timing import append, provenance

__all__ = ["LATER", "RESULTS", "append", "by_setting", "mean_loss", "provenance", "rows_in", "setting"]

RESULTS = Path(__file__).parent / "results"
#: Settings of single-step runs that older rows do not name, with what they were then.
LATER = {"matrix_decay": 0.0, "norm_growth": 0.0}


def rows_in(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, oldest first; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def setting(row: dict[str, Any], *but: str) -> str:
    """All settings of a single-step run, as text, but for its seed, whether it was compiled, and ``but``."""
    key = LATER | json.loads(row["key"]) | {"steps": row["steps"]}
    key = {name: value for name, value in key.items() if name not in {"seed", "compile", *but}}
    key = {name: float(value) if type(value) is int else value for name, value in key.items()}  # 8 and 8.0 are one
    return json.dumps(key, sort_keys=True)


def by_setting(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of single-step runs that differ in nothing but their seed, together."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        settings.setdefault(setting(row), []).append(row)
    return list(settings.values())


def mean_loss(rows: list[dict[str, Any]]) -> float:
    """Mean validation loss, infinite where a run diverged."""
    return fmean(math.inf if row["loss"] is None else row["loss"] for row in rows)
