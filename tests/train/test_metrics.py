"""metrics.jsonl stays one clean curve."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from poetx.train.metrics import MetricsWriter, divergence, is_whole, perplexity, read_metrics


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


TRAIN = '{"event": "train", "step": 5, "tokens_per_second": 1, "merged": 0, "skipped": 0, '
JUNK = [
    TRAIN + '"loss": "3.5", "peak_memory_gib": 1}',
    TRAIN + '"loss": 3, "peak_memory_gib": null}',
    TRAIN + '"loss": 3, "peak_memory_gib": 1, "lr_rest": []}',
    TRAIN + '"loss": NaN, "peak_memory_gib": 1}',
    TRAIN.replace("5", "9" * 400) + '"loss": 3, "peak_memory_gib": 1}',
    TRAIN.replace("5", "1e9") + '"loss": 3, "peak_memory_gib": 1}',
    '{"event": "train", "step": 4}',
    '{"event": "validation", "step": 5, "loss": {}, "perplexity": 3}',
    '{"event": "validation", "step": 5, "loss": 3}',
    f'{{"event": "validation", "step": 5, "loss": 1{"0" * 400}, "perplexity": 3}}',
    *(f'{{"event": "spectrum", "step": 5, "layers": {rows}}}' for rows in ("{}", "[]", '{"a": 3}', '{"a": {"b": 1}}')),
    *(f'{{"event": "memory", "step": 5, "phases": {rows}}}' for rows in ("null", '{"a": {}}', '{"a": {"total": "b"}}')),
    "[" * 100_000,
    f'{{"step": {"9" * 5000}}}',
    "null",
    "\x00\ufffd",
]


def test_damaged_lines_are_told_from_whole_ones(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl", step=0)
    facts = {"tokens_per_second": 1.5, "merged": False, "skipped": False, "peak_memory_gib": 0.5}
    writer.write("train", 1, loss=math.nan, clip=None, lr_rest=1e-3, **facts)
    writer.write("validation", 1, loss=3.0, perplexity=math.inf)
    writer.write("spectrum", 1, layers={"a": {"norm_ratio": 1, "drift_median": 0, "drift_max": 0, "entropy": 0.5}})
    writer.write("memory", 1, peak=3, phases={"forward": {"total": 3, "frozen": 3}})
    writer.write("audit", 1, merges=0, merge_angle=None)
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("\n".join(JUNK))
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert [is_whole(entry) for entry in found] == [True] * 5 + [False] * (len(found) - 5)
    assert len(found) >= 5 + 14


@pytest.mark.parametrize(
    ("validation", "training", "said"),
    [
        ({0: 6.0, 40: 3.0, 80: None}, [3.0], "not finite at the end"),
        ({0: 6.0, 40: 3.0, 80: 4.5}, [5.0, 3.0, 3.0, 4.5], "perplexity 20.1 at step 40, 90.0 at the end"),
        ({0: 6.0, 40: 3.0, 80: 4.5}, [5.0, 3.0, 2.0, 1.0], ""),  # overfits
        ({0: 6.0, 40: 3.0, 80: 3.5}, [5.0, 3.0, 3.0, 4.5], ""),
        ({0: 3.0, 80: 4.5}, [3.0, 2.0], "at step 0, 90.0"),
        ({0: None, 80: 900.0}, [3.0], "not finite at the end"),
        ({}, [3.0], ""),
    ],
)
def test_divergence_is_told_from_overfitting(validation: dict, training: list, said: str) -> None:
    entries: list[dict] = [{"event": "validation", "step": step, "loss": loss} for step, loss in validation.items()]
    for step in range(1, 81):
        entries.append({"event": "train", "step": step, "loss": training[(step - 1) * len(training) // 80]})
    assert said in divergence(entries)
    assert bool(divergence(entries)) == bool(said)
