"""What several of these tests read off a run."""

from pathlib import Path

from poetx.train.metrics import read_metrics


def curve(run_dir: Path) -> list[float]:
    """Training losses of a run, step by step."""
    return [entry["loss"] for entry in read_metrics(run_dir / "metrics.jsonl") if entry["event"] == "train"]
