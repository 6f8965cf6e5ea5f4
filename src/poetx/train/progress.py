"""What a run tells while it goes: nothing (library), plain lines (logs, pipes), or a live display (terminals)."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger(__name__)

_RECENT_STEPS = 20  # the shown loss and speed are means over this many steps


@dataclass(frozen=True)
class RunInfo:
    """The facts a display needs before the first step; ``recipe`` as plain values."""

    title: str
    steps: int
    first_step: int
    log_every: int
    name: str = ""
    run_dir: Path = Path()
    recipe: dict[str, Any] = field(default_factory=dict)


class Reporter:
    """Receives what happens in a run and prints nothing: the library's default, and the base of displays and loggers.

    One of your own overrides what it wants to know: ``poetx.train.run.train(recipe, reporter=…)``, or
    ``train.report_to=module:Class``. It is told on the first rank, after ``metrics.jsonl`` has it.
    """

    def stage(self, text: str) -> None:
        """A slow part begins."""

    def note(self, text: str) -> None:
        """Something the user should know, one line. Goes to the log here."""
        logger.warning("%s", text)

    def start(self, info: RunInfo) -> None:
        """Training begins."""

    def step(self, entry: dict[str, Any]) -> None:
        """A step's line of metrics.jsonl."""

    def validation(self, entry: dict[str, Any]) -> None:
        """A validation line of metrics.jsonl."""

    def sample(self, entry: dict[str, Any]) -> None:
        """A line of samples in metrics.jsonl: what the model writes at an evaluation."""

    def checkpoint(self, path: Path) -> None:
        """A checkpoint was written."""

    def stop(self) -> None:
        """Training ended, in whatever way."""


class SilentReporter(Reporter):
    """Says nothing at all: of a rank beside the first, which tells what happens on all of them."""

    def note(self, text: str) -> None:
        """Nothing: the first rank says the same."""


class PlainReporter(Reporter):
    """A line every ``train.log_every`` steps, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._recent = _Recent()

    def stage(self, text: str) -> None:
        self._say(f"{text} ...")

    def note(self, text: str) -> None:
        self._say(f"note: {text}")

    def start(self, info: RunInfo) -> None:
        self._info = info
        self._say(info.title)

    def step(self, entry: dict[str, Any]) -> None:
        self._recent.add(entry)
        if entry["step"] % self._info.log_every == 0 or entry["step"] == self._info.steps:
            left = self._recent.time_left(self._info.steps - entry["step"])
            self._say(
                f"step {entry['step']}/{self._info.steps}  loss {self._recent.loss:.3f}  "
                f"{self._recent.speed:,.0f} tokens/s  {entry['peak_memory_gib']:.2f} GiB  {left} left"
            )

    def validation(self, entry: dict[str, Any]) -> None:
        self._say(f"step {entry['step']}  {_validation_text(entry)}")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class LiveReporter(Reporter):
    """A progress bar with loss, validation loss, speed, memory and time left, redrawn in place."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = console
        self._recent = _Recent()
        self._validation = "val –"
        self._progress = Progress(
            TextColumn("[bold]{task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
            refresh_per_second=4,
        )
        self._task: Any = None

    def stage(self, text: str) -> None:
        self._console.print(f"{text} ...", style="dim", markup=False)

    def note(self, text: str) -> None:
        self._console.print(f"note: {text}", style="yellow", markup=False)

    def start(self, info: RunInfo) -> None:
        self._info = info
        self._console.print(info.title, markup=False, style="bold")
        self._progress.start()
        self._task = self._progress.add_task("", total=info.steps, completed=info.first_step, status="")

    def step(self, entry: dict[str, Any]) -> None:
        self._recent.add(entry)
        left = self._recent.time_left(self._info.steps - entry["step"])
        status = (
            f"loss {self._recent.loss:.3f} · {self._validation} · {self._recent.speed:,.0f} tok/s · "
            f"{entry['peak_memory_gib']:.2f} GiB · {left} left"
        )
        self._progress.update(self._task, completed=entry["step"], status=status)

    def validation(self, entry: dict[str, Any]) -> None:
        self._validation = f"val {entry['loss']:.3f}" if entry["loss"] is not None else "val –"
        self._console.print(f"step {entry['step']:>6}  {_validation_text(entry)}", markup=False, highlight=False)

    def stop(self) -> None:
        self._progress.stop()


class _Recent:
    """Means over the last few steps."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._speeds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._times: deque[float] = deque(maxlen=_RECENT_STEPS)

    def add(self, entry: dict[str, Any]) -> None:
        if entry["loss"] is not None:  # null in metrics.jsonl: not finite
            self._losses.append(entry["loss"])
        self._speeds.append(entry["tokens_per_second"])
        self._times.append(time.perf_counter())

    @property
    def loss(self) -> float:
        return sum(self._losses) / len(self._losses) if self._losses else float("nan")

    @property
    def speed(self) -> float:
        """Tokens per second of training alone, evaluation and checkpoints left out."""
        return sum(self._speeds) / len(self._speeds)

    def time_left(self, steps: int) -> str:
        """``m:ss`` or ``h:mm:ss`` from the wall time between recent steps, evaluation and checkpoints included."""
        if len(self._times) < 2:
            return "?"
        seconds = round(steps * (self._times[-1] - self._times[0]) / (len(self._times) - 1))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"


def _validation_text(entry: dict[str, Any]) -> str:
    if entry["loss"] is None:
        return "validation loss is not finite"
    return f"validation loss {entry['loss']:.3f}, perplexity {entry['perplexity'] or float('inf'):,.1f}"
