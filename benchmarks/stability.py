"""Loss against learning rate, from a quarter to 32 times the usual one: who still trains, who spikes, who diverges.

    python -m benchmarks.text --out DIR/text --debian bible-kjv-text,debian-policy,debian-reference-en
    python -m benchmarks.stability --text DIR/text/text.jsonl [--kinds usual deep normless] [--seeds 0 1 2]
    python -m benchmarks.stability --plot && python -m benchmarks.tables

The rate that is varied is that of the matrices between embedding and head (AdamW's and Muon's ``matrix_lr``, the
rotations' ``poet_lr``, the single step's angle); everything else has the rate that was best for the method in
docs/compare.md, where the rates called 1× are from, too. Same text, windows, steps, clipping and warmup for all. Rows
go to benchmarks/results/stability.jsonl, and what is there already is not run again: stop it whenever you like.

Kinds: ``usual`` has four layers; ``deep`` 48 thin ones; ``normless`` is the usual one whose norms become constant gains
after a third of the steps, what each norm multiplied by on two windows then.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import RESULTS, append, provenance, rows_in
from poetx.data.prepare import prepare_data
from poetx.data.sampler import evenly_spread
from poetx.layers.base import ConvertedLinear
from poetx.methods.base import convert_model, merge_handle, method_of
from poetx.models import build_model, settled
from poetx.recipe import Recipe, load_recipe
from poetx.train.checkpoint import TrainState
from poetx.train.loop import TrainingRun, evaluate, train_step
from poetx.train.metrics import UnwrittenMetrics
from poetx.train.progress import SilentReporter
from poetx.train.step import TrainingStep

CPU = torch.device("cpu")
OUT = RESULTS / "stability.jsonl"
RECIPE = Path(__file__).parent / "compare" / "tiny.yaml"
FACTORS = [2.0**k for k in range(-2, 6)]
_POET_X = {
    "method": "fast",
    "optimizer.lr": 0.024,
    "poet.merge_every": 50,
    "poet.neumann_order": 7,
    "optimizer.clip_ramp_until": 0,
}
#: Settings, the key that is varied and its value at 1×.
METHODS: dict[str, tuple[dict[str, Any], str, float]] = {
    "adamw": ({"method": "adamw", "optimizer.lr": 0.024, "model.residual_scale": 0.25}, "optimizer.matrix_lr", 0.0015),
    "muon": ({"method": "muon", "optimizer.lr": 0.048, "model.residual_scale": 0.25}, "optimizer.matrix_lr", 0.006),
    "poet-x": (_POET_X | {"poet.merge_angle": 0.3}, "optimizer.poet_lr", 0.004),
    "poet-x, no early merges": (_POET_X, "optimizer.poet_lr", 0.004),
    "single-step-fixed": ({"method": "single-step-fixed", "optimizer.lr": 0.024}, "optimizer.angle", 0.024),
    "single-step": ({"method": "single-step-free", "optimizer.lr": 0.024}, "optimizer.angle", 0.024),
}
KINDS: dict[str, dict[str, Any]] = {
    "usual": {"train.steps": 160},
    "normless": {"train.steps": 160},
    "deep": {
        "train.steps": 104,
        "model.num_layers": 48,
        "model.hidden_size": 48,
        "model.intermediate_size": 128,
        "poet.block_size": 16,
        "poet.residual_scale": 0.02,  # 96 writes of a quarter's size would drown the embedding
    },
}
#: A step whose training loss is this much, in nats, above the median of the 20 steps before it is a spike's.
SPIKE = 1.0
#: A run whose last validation loss is this much, in nats, above its lowest has diverged: twice the perplexity.
DIVERGED = math.log(2)
#: The largest angle that a single step takes.
LARGEST_ANGLE = 0.499
LOOKS = 8  # at weights and activations, over the run


def recipe_of(kind: str, method: str, factor: float, seed: int, settings: list[str]) -> Recipe:
    """The recipe of one run."""
    own, key, rate = METHODS[method]
    value = rate * factor
    if key == "optimizer.angle":
        value = min(value, LARGEST_ANGLE)
    every: dict[str, Any] = {"train.batch_size": 4, "train.seed": seed, "train.max_bad_steps": 10**6}
    every["train.eval_windows"] = 64
    if "adamw" != method != "muon":
        every["poet.seed"] = seed
    given = KINDS[kind] | own | every | {key: value}
    if method in ("adamw", "muon"):
        given = {name: value for name, value in given.items() if not name.startswith("poet.")}
    return load_recipe(str(RECIPE), [f"{name}={value}" for name, value in given.items()] + settings)


def matrices(model: nn.Module) -> Iterator[Tensor]:
    """The weights between embedding and head, as they act."""
    for module in model.get_submodule("model.layers").modules():
        if isinstance(module, ConvertedLinear):
            yield module.dense_weight().detach()
        elif isinstance(module, nn.Linear):
            yield module.weight.detach()


def singular_values(model: nn.Module) -> tuple[float, float]:
    """The mean over all matrices of the largest singular value, and of the median one; not a number in broken ones."""
    found = []
    for weight in matrices(model):
        if not weight.isfinite().all():
            return math.nan, math.nan
        values = torch.linalg.svdvals(weight.double())
        found.append((float(values[0]), float(values.median())))
    largest, middle = zip(*found, strict=True)
    return statistics.fmean(largest), statistics.fmean(middle)


@torch.no_grad()
def replace_norms_(model: nn.Module, inputs: Tensor) -> None:
    """Make every norm a gain: its weight times one over the root mean square of what came in, on ``inputs``."""
    scales: dict[nn.Module, float] = {}

    def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        scales[module] = float(given[0].square().mean().rsqrt())

    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    model(input_ids=inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    for norm, scale in scales.items():
        norm.forward = MethodType(lambda self, x, scale=scale: x * scale * self.weight, norm)


@torch.no_grad()
def largest_activation(model: nn.Module, inputs: Tensor) -> float:
    """The largest root mean square of what a layer adds to and hands on, over the layers."""
    states = model(input_ids=inputs, use_cache=False, output_hidden_states=True).hidden_states
    return max(float(state.float().square().mean().sqrt()) for state in states)


def run(kind: str, method: str, factor: float, seed: int, settings: list[str]) -> dict[str, Any]:
    """Train once; how it went."""
    recipe = settled(recipe_of(kind, method, factor, seed, settings), CPU)
    data, steps = prepare_data(recipe), recipe.train.steps
    model: Any = build_model(
        recipe, vocab_size=data.meta.vocab_size, end_of_text_id=data.meta.end_of_text_id, device=CPU
    )
    inputs = data.validation.batch([0, 1]).input_ids
    convert_model(model, recipe, CPU)
    optimizer = method_of(recipe).build_optimizer(model.train(), steps)
    training = TrainingRun(
        recipe=recipe,
        run_dir=Path(),
        model=model,
        optimizer=optimizer,
        peak_lrs=[group["lr"] for group in optimizer.param_groups],
        merges=merge_handle(optimizer),
        data=data,
        device=CPU,
        state=TrainState(),
        metrics=UnwrittenMetrics(),
        reporter=SilentReporter(),
    )
    step = TrainingStep.of(recipe, model, optimizer)
    windows = evenly_spread(recipe.train.eval_windows, len(data.validation))
    losses, validations, looks, skipped = [], [], [], 0
    start, began = singular_values(model), time.perf_counter()
    for number in range(steps):
        if kind == "normless" and number == steps // 3:
            replace_norms_(model, inputs)
        facts = train_step(training, step)
        training.state.step += 1
        losses.append(facts["loss"])
        skipped += facts["skipped"]
        if (number + 1) % (steps // LOOKS) == 0:
            validations.append(evaluate(model, data.validation, windows, batch_size=16, device=CPU))
            now = (late / early for late, early in zip(singular_values(model), start, strict=True))
            looks.append([number + 1, *now, largest_activation(model, inputs)])
    finite = [loss for loss in validations if math.isfinite(loss)]
    lowest, last = min(finite, default=math.inf), validations[-1]
    handle = training.merges
    return {
        "benchmark": "stability",
        "kind": kind,
        "method": method,
        "factor": factor,
        "seed": seed,
        "steps": steps,
        "rate": getattr(recipe.optimizer, METHODS[method][1].partition(".")[2]),
        "loss": last if math.isfinite(last) else None,
        "lowest_loss": lowest if math.isfinite(lowest) else None,
        "diverged": not last <= lowest + DIVERGED,
        "spikes": spikes(losses),
        "skipped_steps": skipped,
        "merges": handle.merges if handle else None,
        "looks": [[value if math.isfinite(value) else None for value in look] for look in looks],
        "seconds": round(time.perf_counter() - began, 1),
    }


def spikes(losses: list[float]) -> int:
    """How often the training loss leaves the median of the 20 steps before by :data:`SPIKE`, or is no number."""
    count, inside = 0, False
    for number in range(20, len(losses)):
        high = not losses[number] <= statistics.median(losses[number - 20 : number]) + SPIKE
        count += high and not inside
        inside = high
    return count


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw loss over factor for every kind, and the weights and activations over the run at three rates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    figure, axes = plt.subplots(3, 3, figsize=(14, 11), layout="constrained")
    for axis, kind in zip(axes[0], kinds, strict=False):
        for number, method in enumerate(METHODS):
            points = []
            for factor in FACTORS:
                found = [r["loss"] for r in rows if (r["kind"], r["method"], r["factor"]) == (kind, method, factor)]
                if found:
                    points.append((factor, [math.inf if loss is None else loss for loss in found]))
            if points:
                means = [min(statistics.fmean(losses), 9.0) for _, losses in points]
                axis.plot(
                    [factor for factor, _ in points], means, marker="o", markersize=3, color=f"C{number}", label=method
                )
                low, high = zip(*((min(min(ls), 9.0), min(max(ls), 9.0)) for _, ls in points), strict=True)
                axis.fill_between([factor for factor, _ in points], low, high, color=f"C{number}", alpha=0.15)
        axis.set(
            xscale="log",
            xlabel="rate of the matrices, times the usual",
            ylabel="validation loss at the end",
            title=kind,
        )
        axis.set_xticks(FACTORS, [f"{factor:g}" for factor in FACTORS])
        axis.set_ylim(None, 8.0)
        axis.legend(fontsize=8)
    looks = (("largest singular value, of its start", 1), ("largest root mean square of a layer's output", 3))
    for line, (title, place) in zip(axes[1:], looks, strict=True):
        for axis, factor in zip(line, (1, 8, 32), strict=True):
            for number, method in enumerate(METHODS):
                key = ("usual", method, factor, 0)
                for row in rows:
                    if (row["kind"], row["method"], row["factor"], row["seed"]) == key:
                        values = [math.nan if look[place] is None else look[place] for look in row["looks"]]
                        axis.plot([look[0] for look in row["looks"]], values, color=f"C{number}", label=method)
            axis.set(yscale="log", xlabel="step", ylabel=title, title=f"usual, {factor}×")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument(
        "--plot", action="store_true", help="draw docs/stability.png of what is there, and train nothing"
    )
    parser.add_argument("--cache", type=Path, help="where its tokens are kept; else a directory that goes")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS)
    args = parser.parse_args()
    if args.plot:
        plot(rows_in(OUT), RESULTS.parent.parent / "docs" / "stability.png")
        return
    if args.text is None:
        parser.error("--text FILE: what to train on, which benchmarks.text gathers")
    origin = provenance(CPU)
    with tempfile.TemporaryDirectory() as scratch:
        settings = [f"data.train={args.text}", f"data.cache_dir={args.cache or scratch}"]
        for seed in args.seeds:
            for kind in args.kinds:
                for method in args.methods:
                    for factor in args.factors:
                        wanted = {"kind": kind, "method": method, "factor": factor, "seed": seed}
                        if any(wanted.items() <= row.items() for row in rows_in(OUT)):
                            continue
                        row = run(kind, method, factor, seed, settings)
                        append(OUT, [row | origin])
                        print({k: v for k, v in row.items() if k not in ("benchmark", "looks")}, flush=True)


if __name__ == "__main__":
    main()
