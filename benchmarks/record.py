"""Where rows go, and what every benchmark shares with ``poetx bench``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from poetx.bench.record import append, provenance

__all__ = ["LATER", "RESULTS", "append", "by_setting", "mean_loss", "provenance"]

RESULTS = Path(__file__).parent / "results"
#: Settings of single-step runs that older rows do not name, with what they were then.
LATER = {"matrix_decay": 0.0, "norm_growth": 0.0}


def by_setting(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of single-step runs that differ in nothing but their seed, together."""
    settings: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        key = LATER | json.loads(row["key"]) | {"steps": row["steps"], "seed": None, "compile": None}
        settings.setdefault(json.dumps(key, sort_keys=True), []).append(row)
    return list(settings.values())


def mean_loss(rows: list[dict[str, Any]]) -> float:
    """Mean validation loss, infinite where a run diverged."""
    return fmean(math.inf if row["loss"] is None else row["loss"] for row in rows)
