"""Where rows go, and what every benchmark shares with ``poetx bench``."""

from __future__ import annotations

from pathlib import Path

from poetx.bench.record import append, provenance

__all__ = ["RESULTS", "append", "provenance"]

RESULTS = Path(__file__).parent / "results"
