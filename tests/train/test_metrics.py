"""metrics.jsonl stays one clean curve."""

from __future__ import annotations

import json
import math
from pathlib import Path

from poetx.train.metrics import MetricsWriter, perplexity, read_metrics


def test_resuming_cuts_what_comes_after_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, step=0)
    for step in range(1, 6):
        writer.write("train", step, loss=float(step))
    writer.close()
    with path.open("a") as file:
        file.write('{"event": "train", "st')
    writer = MetricsWriter(path, step=3)
    writer.write("train", 4, loss=40.0)
    writer.close()
    assert [(entry["step"], entry["loss"]) for entry in read_metrics(path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert path.read_text().count("\n") == 4


def test_a_fresh_start_empties_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "train", "step": 1}\n')
    MetricsWriter(path, step=0).close()
    assert path.read_text() == ""


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl", step=0)
    writer.write("train", 1, loss=math.nan, grad_norm=math.inf)
    writer.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: 1 / 0) == {
        "event": "train",
        "step": 1,
        "loss": None,
        "grad_norm": None,
    }


def test_perplexity_does_not_overflow() -> None:
    assert perplexity(1000.0) == math.inf
    assert perplexity(0.0) == 1
