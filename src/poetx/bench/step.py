"""``poetx bench step``: whole training steps of a recipe, AdamW beside POET-X, tokens a second and peak memory."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from poetx.bench.timing import interleaved, median, milliseconds, provenance
from poetx.errors import UserError
from poetx.merge import merge_
from poetx.methods.base import convert_model, method_of
from poetx.models import build_model, resolve_device, settled
from poetx.recipe import Recipe, with_method
from poetx.recipe.several import load_methods
from poetx.train.step import TrainingStep

_GATE_STEPS = 4


@dataclass
class Run:
    """A method's recipe and its training step, on one device."""

    recipe: Recipe
    training_step: TrainingStep

    def step(self, ids: torch.Tensor) -> float:
        """Forward, backward, clipping, optimizer step, as the training loop does it; the mean loss in nats."""
        return self.training_step([(ids, ids)], clip=self.recipe.optimizer.clip).loss


def bench_step(
    source: str,
    *,
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("adamw", "fast", "mem"),
    overrides: Sequence[str] = (),
    seq_lens: Sequence[int] = (),
    batch_sizes: Sequence[int] = (),
    repeats: int = 5,
    compiled: bool = False,
) -> Iterator[dict[str, Any]]:
    """One row a method, sequence length and batch size (in sequences, all of them one micro-batch).

    ``ms`` is the median step; ``tokens_per_second`` counts a share of one merge in, ``merge_ms / merge_every``; what
    does not fit has ``oom`` true. On a GPU one method after the other has it to itself and ``peak_bytes`` is all
    that was allocated; on a CPU, where memory is not told apart, they take turns step by step.

    Args:
        methods: names, or labels with settings of their own, as :func:`poetx.recipe.several.load_methods` takes them.

    Raises:
        UserError: an unknown method, a bad recipe, or a model that does not learn a batch it sees four times.
    """
    loaded = load_methods(source, overrides, methods)  # tokens are drawn at random, no text is read
    first = next(iter(loaded))
    recipe = loaded[first]
    compiled = compiled or recipe.train.compile
    lengths = tuple(seq_lens) or (recipe.data.seq_len,)
    batches = tuple(batch_sizes) or (recipe.train.micro_batch,)
    device = resolve_device(recipe.train.device)
    common = {"compiled": compiled, "repeats": repeats} | provenance(device)
    recipes = {name: from_dense(by.with_keys({"data.seq_len": max(lengths)})) for name, by in loaded.items()}
    groups = [list(recipes)] if device.type == "cpu" else [[name] for name in recipes]
    base: dict[tuple[int, int], float] = {}
    for names in groups:
        runs = {name: build_run(recipes[name], device, compiled) for name in names}
        try:
            for length in lengths:
                for batch in batches:
                    for row in _measure(runs, length, batch, device, repeats):
                        speed = row["tokens_per_second"]
                        if row["contestant"] == first and speed:
                            base[length, batch] = speed
                        compared = base.get((length, batch))
                        row["speed_ratio"] = round(speed / compared, 3) if speed and compared else None
                        yield {"benchmark": "step", "recipe": recipe.name, "overrides": list(overrides)} | row | common
        finally:
            runs.clear()
            _release(device)


def by_method(recipe: Recipe, method: str) -> Recipe:
    """``recipe`` by another method, its layers starting from the dense model's weights."""
    return from_dense(with_method(recipe, method))


def from_dense(recipe: Recipe) -> Recipe:
    """``recipe`` with layers that keep the dense model's weights, in as much memory.

    Fresh ones are drawn on the CPU, minutes for 8B, and a step takes as long on any.
    """
    if recipe.poet is None:
        return recipe
    if recipe.poet.config.method == "oft":
        return recipe
    kept = {"poet.init": "keep", "poet.init_scale": 1.0, "poet.residual_scale": 1.0}
    if recipe.poet.config.method == "poet-x":
        kept["poet.weight_extra_bits"] = recipe.poet.config.keeps_extra_bits
    return recipe.with_keys(kept)


def build_run(recipe: Recipe, device: torch.device, compiled: bool = False) -> Run:
    """Model, optimizer and step of ``recipe`` on ``device``, as training makes them."""
    recipe = settled(recipe, device)
    model = build_model(recipe, vocab_size=recipe.data.vocab_size, end_of_text_id=0, device=device)
    convert_model(model, recipe, device)
    optimizer = method_of(recipe).build_optimizer(model, recipe.train.steps)
    return Run(recipe, TrainingStep.of(recipe, model, optimizer, compiled=compiled))


def _measure(
    runs: dict[str, Run], length: int, batch: int, device: torch.device, repeats: int
) -> Iterator[dict[str, Any]]:
    vocab_size = next(iter(runs.values())).recipe.data.vocab_size
    ids = torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
    steps = {name: partial(run.step, ids) for name, run in runs.items()}
    times: dict[str, list[float]] | None = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        for name, step in steps.items():
            _gate(name, step)
        times = interleaved(steps, repeats=repeats, device=device, warmup=1)
    except torch.OutOfMemoryError:
        for run in runs.values():
            run.training_step.optimizer.zero_grad()
        _release(device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" and times else None
    for name, run in runs.items():
        model, poet, every = run.training_step.model, run.recipe.poet, run.recipe.merge_every
        row = {
            "contestant": name,
            "seq_len": length,
            "batch_size": batch,
            "dtype": run.recipe.train.dtype,
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "block_size": poet.config.block_size if poet else None,
            "merge_every": every,
            "peak_bytes": peak,
            "oom": times is None,
            "tokens_per_second": None,
        }
        if times is not None:
            ms = median(times[name])
            merge_ms = milliseconds(partial(merge_, model, run.training_step.optimizer), device) if every else 0.0
            speed = round(batch * length / (ms + merge_ms / (every or 1)) * 1e3, 1)
            row |= {"ms": ms, "merge_ms": round(merge_ms, 3), "tokens_per_second": speed}
        yield row


def _gate(name: str, step: Callable[[], Any]) -> None:
    """A model that sees one batch again and again has to learn it; the losses also warm everything up."""
    losses = [float(step()) for _ in range(_GATE_STEPS)]
    if not (all(map(math.isfinite, losses)) and min(losses[1:]) < losses[0]):
        text = ", ".join(f"{loss:.3f}" for loss in losses)
        raise UserError(f"{name}: the loss on one batch went {text}; nothing was timed")


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
