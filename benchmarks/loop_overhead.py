"""What ``poetx train`` takes beside its steps: its loop against a bare one on the same batches, A B A B.

python -m benchmarks.loop_overhead [--steps 40] [--pairs 3] [key=value …]    (settings of the demo)

The bare loop calls the same training step on the same micro-batches with the same rates, and does nothing else: no
metrics, no reporter, no checkpoint, no evaluation. Process CPU time is measured as well as wall time, for machines
that are shared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, append, provenance
from poetx.data.prepare import prepare_data
from poetx.data.sampler import batch_windows
from poetx.methods.base import convert_model, method_of
from poetx.models import build_model, settled
from poetx.recipe import Recipe, load_recipe
from poetx.train.progress import Reporter
from poetx.train.run import train
from poetx.train.schedule import lr_factor
from poetx.train.step import TrainingStep

WARMUP = 5  # steps that are not counted


class Clock(Reporter):
    """Wall and CPU time between step ``WARMUP`` and the last."""

    def __init__(self, steps: int) -> None:
        self._marks, self._steps, self.times = {WARMUP, steps}, steps, []

    def step(self, entry: dict[str, Any]) -> None:
        """Note the time at the marks."""
        if entry["step"] in self._marks:
            self.times.append((time.perf_counter(), time.process_time()))

    def took(self) -> tuple[float, float]:
        """Wall and CPU seconds of the steps that count."""
        first, last = self.times
        return last[0] - first[0], last[1] - first[1]


def looped(recipe: Recipe) -> tuple[float, float]:
    """Seconds of ``poetx train``."""
    clock = Clock(recipe.train.steps)
    train(recipe, reporter=clock, overwrite=True)
    return clock.took()


def bare(recipe: Recipe) -> tuple[float, float]:
    """Seconds of a loop that only steps."""
    device = torch.device("cpu")
    recipe = settled(recipe, device)
    data, settings, clock = prepare_data(recipe), recipe.train, Clock(recipe.train.steps)
    vocabulary = {"vocab_size": data.meta.vocab_size, "end_of_text_id": data.meta.end_of_text_id}
    model = build_model(recipe, **vocabulary, device=device)
    convert_model(model, recipe, device)
    optimizer = method_of(recipe).build_optimizer(model, settings.steps)
    peaks = [group["lr"] for group in optimizer.param_groups]
    step = TrainingStep.of(recipe, model, optimizer)
    schedule = {"steps": settings.steps, "warmup_steps": recipe.optimizer.warmup_steps}
    for number in range(settings.steps):
        factor = lr_factor(number, **schedule, min_ratio=recipe.optimizer.min_lr_ratio)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        batch_size, windows = settings.batch_size, data.train.order
        batch = data.train.batch(batch_windows(number, batch_size=batch_size, windows=windows, seed=settings.seed))
        step([batch], clip=recipe.optimizer.clip or None)
        clock.step({"step": number + 1})
    return clock.took()


def main() -> None:
    """Time pairs and append the medians to benchmarks/results/loop_overhead.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    steps = arguments.steps
    with tempfile.TemporaryDirectory() as directory:
        never = [f"train.{key}={10**6}" for key in ("eval_every", "checkpoint_every")]
        keys = ["train.export=false", "train.sample_tokens=0", "train.eval_windows=1", "train.device=cpu", *never]
        places = [f"run_dir={Path(directory) / 'run'}", f"train.steps={steps}"]
        recipe = load_recipe("demo", [*places, *keys, *arguments.settings])
        pairs = [(looped(recipe), bare(recipe)) for _ in range(arguments.pairs)]
    row: dict[str, Any] = {"settings": arguments.settings, "steps": steps - WARMUP, "pairs": arguments.pairs}
    for place, clock in enumerate(("wall", "cpu")):
        ratios = [without[place] / within[place] for within, without in pairs]
        row[f"{clock}_ratio"], row[f"{clock}_ratios"] = round(statistics.median(ratios), 4), ratios
    tokens = (steps - WARMUP) * recipe.train.batch_size * recipe.data.seq_len
    row["tokens_per_cpu_second"] = round(tokens / statistics.median(within[1] for within, _ in pairs), 1)
    append(RESULTS / "loop_overhead.jsonl", [row | provenance(torch.device("cpu"))])
    print(row)


if __name__ == "__main__":
    main()
