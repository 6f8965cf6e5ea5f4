"""What ``poetx train`` takes beside its steps: its loop against one that anybody would write, a step of each in turn.

python -m benchmarks.loop_overhead [--recipe demo] [--steps 40] [key=value …]    (settings of the recipe)

Both train the same model by the same optimizer on the same batches at the same rates in one process. The bare loop has
forward, cross entropy, backward, ``clip_grad_norm_``, step and ``zero_grad``: no look at whether all is finite, no
metrics, no reporter, no checkpoint, no evaluation. Its steps run inside the other's report of each step, so that both
meet whatever else the machine does. Process CPU time is measured as well as wall time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.record import RESULTS, append, provenance
from poetx.data.prepare import prepare_data
from poetx.data.sampler import batch_windows
from poetx.methods.base import convert_model, method_of
from poetx.models import build_model, settled
from poetx.recipe import Recipe, load_recipe
from poetx.train.progress import Reporter
from poetx.train.run import train
from poetx.train.schedule import lr_factor

WARMUP = 5  # steps that are not counted
CPU = torch.device("cpu")
Clock = tuple[float, float]


def now() -> Clock:
    return time.perf_counter(), time.process_time()


class InTurn(Reporter):
    """Takes a step of the bare loop after each of the other's; wall and CPU seconds of both in :attr:`times`."""

    def __init__(self, step: Callable[[int], None]) -> None:
        self._step, self.times, self._since = step, [], now()

    def step(self, entry: dict[str, Any]) -> None:
        """Note what the loop's step took, and the bare one's."""
        before = now()
        self._step(entry["step"] - 1)
        after = now()
        pairs = (zip(before, self._since, strict=True), zip(after, before, strict=True))
        self.times.append(tuple(tuple(late - early for late, early in pair) for pair in pairs))
        self._since = now()


def bare(recipe: Recipe) -> Callable[[int], None]:
    """Takes step number n, from 0 on."""
    recipe = settled(recipe, CPU)
    data, settings = prepare_data(recipe), recipe.train
    vocabulary = {"vocab_size": data.meta.vocab_size, "end_of_text_id": data.meta.end_of_text_id}
    model: Any = build_model(recipe, **vocabulary, device=CPU).train()
    convert_model(model, recipe, CPU)
    optimizer = method_of(recipe).build_optimizer(model, settings.steps)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = {"warmup_steps": recipe.optimizer.warmup_steps, "min_ratio": recipe.optimizer.min_lr_ratio}

    def step(number: int) -> None:
        factor = lr_factor(number, steps=settings.steps, **schedule)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        order, seed = data.train.order, settings.seed
        batch = data.train.batch(batch_windows(number, batch_size=settings.batch_size, windows=order, seed=seed))
        for start in range(0, settings.batch_size, settings.micro_batch):
            inputs, labels, *_ = batch.rows(start, start + settings.micro_batch)
            logits = model(input_ids=inputs, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
            (loss * settings.micro_batch / settings.batch_size).backward()
        if recipe.optimizer.clip:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Time both and append a row to benchmarks/results/loop_overhead.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    steps = arguments.steps
    with tempfile.TemporaryDirectory() as directory:
        never = [f"train.{key}={10**6}" for key in ("eval_every", "checkpoint_every")]
        keys = ["train.export=false", "train.sample_tokens=0", "train.eval_windows=1", "train.device=cpu", *never]
        places = [f"run_dir={Path(directory) / 'run'}", f"train.steps={steps}"]
        recipe = load_recipe(arguments.recipe, [*places, *keys, *arguments.settings])
        clock = InTurn(bare(recipe))
        train(recipe, reporter=clock, overwrite=True)
    counted = clock.times[WARMUP:]
    row: dict[str, Any] = {"recipe": arguments.recipe, "settings": arguments.settings, "steps": len(counted)}
    for place, name in enumerate(("wall", "cpu")):
        ratios = sorted(without[place] / within[place] for within, without in counted)
        row[f"{name}_ratio"] = round(statistics.median(ratios), 4)
        row[f"{name}_ratio_quartiles"] = [round(q, 4) for q in statistics.quantiles(ratios, n=4)[::2]]
        totals = [sum(each[place] for each in loop) for loop in zip(*counted, strict=True)]
        row[f"{name}_ratio_of_totals"] = round(totals[1] / totals[0], 4)
    tokens = len(counted) * recipe.train.batch_size * recipe.data.seq_len
    row["tokens_per_cpu_second"] = round(tokens / sum(within[1] for within, _ in counted), 1)
    append(RESULTS / "loop_overhead.jsonl", [row | provenance(CPU)])
    print(row)


if __name__ == "__main__":
    main()
