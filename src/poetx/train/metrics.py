"""``metrics.jsonl``: one line for every step and evaluation, a single curve however often the run is resumed.

    {"event": "train", "step": 12, "loss": …, "lr": …, "grad_norm": …, "clip": …, "merged": false,
     "skipped": false, "tokens_per_second": …, "seconds": …, "peak_memory_gib": …}
    {"event": "validation", "step": 100, "loss": …, "perplexity": …, "seconds": …}

    {"event": "sample", "step": 100, "samples": [{"prompt": …, "text": …, "answer": …}, …]}  (train.sample_tokens)
    {"event": "spectrum", "step": 100, "layers": {name: {"norm_ratio": …, "drift_median": …, …}, …}}
    {"event": "memory", "step": 100, "peak": …, "phases": {"forward": {"total": …, "frozen": …, …}, …}}  (bytes)
    {"event": "training_check", "step": 3, "problems": ["model.…: received no gradient; …"]}  (only where there are any)
    {"event": "audit", "step": 1000, "skipped_steps": …, "merges": …, "merge_angle": …, "norm_drift": …, "tokens": …}

A step that merged also has ``merge_angle`` (largest angle folded, radians) and ``norm_drift``.
``step`` counts finished optimizer steps; ``seconds`` is wall time since the process started training.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import IO, Any

from poetx.files import write_text

_NO_NUMBERS = ("event", "merged", "skipped", "grad_norm_of")
_SPECTRUM = ("norm_ratio", "drift_median", "drift_max", "entropy")
_LARGEST = 1e300
TIMING_KEYS = ("seconds", "tokens_per_second", "peak_memory_gib")  # differ from run to run
_NEAR = 10  # training losses of so many steps around a validation are compared


class MetricsWriter:
    """Appends to ``metrics.jsonl``; lines later than ``step`` are cut first, so that a resumed curve is clean."""

    def __init__(self, path: Path, *, step: int) -> None:
        kept = (
            [line for line in read_metrics(path) if line["step"] <= step and line["event"] != "audit"] if step else []
        )
        write_text(path, "".join(_line(entry) for entry in kept))
        self._path, self._directory = path, path.parent.stat()
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, event: str, step: int, **values: Any) -> dict[str, Any]:
        """Append one line and hand it back. A number that is not finite becomes null: JSON has none."""
        entry = _entry(event, step, values)
        self._file.write(_line(entry))
        self._file.flush()
        return entry

    def in_place(self) -> bool:
        """Whether the directory is still the one that it was, neither moved nor removed."""
        try:
            return os.path.samestat(self._path.parent.stat(), self._directory)
        except FileNotFoundError:
            return False

    def place(self) -> Path | None:
        """The directory that the open file is in by now; None where the system does not tell (Linux does)."""
        try:
            return Path(f"/proc/self/fd/{self._file.fileno()}").readlink().parent
        except OSError:
            return None

    def close(self) -> None:
        self._file.close()


class UnwrittenMetrics(MetricsWriter):
    """The lines of a rank beside the first, which writes them for all: handed back, and not written."""

    def __init__(self) -> None:
        pass

    def write(self, event: str, step: int, **values: Any) -> dict[str, Any]:
        return _entry(event, step, values)

    def in_place(self) -> bool:
        return True

    def close(self) -> None:
        pass


def put_elapsed_(entries: list[dict[str, Any]]) -> None:
    """Give each whole entry ``elapsed``: seconds of all processes that the run took, where ``seconds`` is of one."""
    before, offset = 0.0, 0.0
    for entry in entries:
        if isinstance(seconds := entry.get("seconds"), int | float):
            offset += before if seconds < before else 0  # another process went on
            before = seconds
        entry["elapsed"] = offset + before


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, one torn by a kill or damaged left out; nothing when there is no file.

    Values are as they are found: see :func:`is_whole`.
    """
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # torn, a number of thousands of digits, or nested too deeply
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int and "event" in entry:
            entries.append(entry)
    return entries


def is_whole(entry: dict[str, Any]) -> bool:
    """Whether a line has what every line of its event has, as numbers: a disk or an editor may have damaged it."""
    event, numbers = entry["event"], {key: value for key, value in entry.items() if key not in _NO_NUMBERS}
    if not 0 <= entry["step"] < 2**63:
        return False
    if event == "train":
        known = {"loss", "tokens_per_second", "merged", "skipped"} <= entry.keys()
        return known and _are_numbers(numbers, "peak_memory_gib")
    if event == "validation":
        return {"loss", "perplexity"} <= entry.keys() and _are_numbers(numbers)
    if event == "sample":
        texts = entry.get("samples")
        return isinstance(texts, list) and all(isinstance(t, dict) and {"prompt", "text"} <= t.keys() for t in texts)
    nested, needed = {"spectrum": ("layers", _SPECTRUM), "memory": ("phases", ("total",))}.get(str(event), ("", ()))
    rows = entry.get(nested)
    if not nested:
        return True
    return isinstance(rows, dict) and bool(rows) and all(_are_numbers(row, *needed) for row in rows.values())


def _are_numbers(values: Any, *needed: str) -> bool:
    """Whether every value is a number that a float can hold, or null where it is not ``needed``."""
    if not isinstance(values, dict) or any(values.get(key) is None for key in needed):
        return False
    return all(v is None or (type(v) in (int, float) and abs(v) < _LARGEST) for v in values.values())


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def divergence(entries: list[dict[str, Any]]) -> str:
    """What a run's whole lines say against its end; empty for a run that did not diverge.

    It did where the last validation loss is not finite, or the perplexity is more than twice its best and training
    rose, too: where that falls meanwhile, the model overfits. Twice that before training is divergence in any case.
    """
    losses = {e["step"]: e["loss"] for e in entries if e["event"] == "validation"}
    if not losses:
        return ""
    last = max(losses)
    if losses[last] is None or math.isinf(perplexity(losses[last])):
        return "the run diverged: its validation perplexity is not finite at the end"
    best = min((step for step in losses if losses[step] is not None), key=lambda step: losses[step])

    def training(step: int) -> float:
        near = [e["loss"] for e in entries if e["event"] == "train" and abs(e["step"] - step) < _NEAR]
        near = [loss for loss in near if loss is not None]
        return sum(near) / len(near) if near else math.inf

    if losses[last] - losses[best] <= math.log(2) or (best and training(last) <= training(best)):
        return ""
    before, after = perplexity(losses[best]), perplexity(losses[last])
    return f"the run diverged: validation perplexity {before:,.1f} at step {best}, {after:,.1f} at the end"


def _entry(event: str, step: int, values: dict[str, Any]) -> dict[str, Any]:
    return {"event": event, "step": step, **{key: _finite(value) for key, value in values.items()}}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
