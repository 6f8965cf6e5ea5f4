"""The quantised base: what merges do to it, what it costs in loss, in time, and in memory to build.

    python -m benchmarks.quantised merges  --out benchmarks/results/quantised.jsonl
    python -m benchmarks.quantised quality --out benchmarks/results/quantised.jsonl
    python -m benchmarks.quantised speed   --out benchmarks/results/quantised.jsonl
    python -m benchmarks.quantised step    --out benchmarks/results/quantised.jsonl
    python -m benchmarks.quantised build   --out benchmarks/results/quantised.jsonl

Rows that the file has already are not made again, so that an interrupted run keeps what it has.

Kinds of requantisation. No suffix: stochastic rounding, the library's. *nearest*: to the nearest level. *feedback*:
to the nearest level, and the rounding error kept, stochastically rounded, in 4 more bits that only merging reads
(``weight_extra_bits``). *naive*: to the nearest level after a fold in bfloat16 of the truncated series' blocks, without
norm correction.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import poetx
from benchmarks.record import append, provenance
from poetx import PoetConfig, PoetLinear
from poetx.bench.timing import interleaved, median
from poetx.layers.weights import PackedWeight, Pairs
from poetx.ops.cayley import cayley

SIZE, BLOCK, GROUP = 256, 64, 128


class Nearest(PackedWeight):
    """Rounds to nearest at merges, too."""

    def staged(self, weight: Tensor, *, noise: torch.Generator | None) -> Pairs:
        return super().staged(weight, noise=None)


def settings(name: str, kind: str) -> dict[str, Any]:
    """What a format and a kind of requantisation add to a ``PoetConfig``."""
    if name == "bfloat16":
        return {}
    return {"weight_format": name, "group_size": GROUP, "weight_extra_bits": kind == "feedback"}


def set_kind(layer: PoetLinear, kind: str) -> None:
    """Make a quantised layer round to nearest, where its kind asks for that."""
    if kind in ("nearest", "naive") and layer.packed_weight is not None:
        layer.packed_weight.__class__ = Nearest


@torch.no_grad()
def naive_fold(layer: PoetLinear) -> None:
    """Blocks by the order-3 series, blocks and weight in bfloat16, no norm correction; rotations back to zero."""
    packed = layer.packed_weight
    weight = (layer.base_weight if packed is None else packed.fetch()).bfloat16()
    G_in, G_out = (
        cayley(q, size=size, block_size=b, order=3).bfloat16()
        for q, size, b in (
            (layer.skew_in, layer.in_features, layer.block_size_in),
            (layer.skew_out, layer.out_features, layer.block_size_out),
        )
    )
    weight = _block_product(_block_product(weight, G_in.mT).T, G_out).T
    layer._write(weight.float(), noise=None)
    for skew in layer.rotations:
        skew.zero_()
    layer.base_norm.copy_(torch.linalg.vector_norm(layer.frozen_weight.precise(), dtype=torch.float64))


def _block_product(weight: Tensor, G: Tensor) -> Tensor:
    """``weight · Diag(G)`` over columns, the last block cut."""
    b = G.shape[-1]
    parts = []
    for k, start in enumerate(range(0, weight.shape[1], b)):
        part = weight[:, start : start + b]
        parts.append(part @ G[k, : part.shape[1], : part.shape[1]])
    return torch.cat(parts, dim=1)


# -- merges -----------------------------------------------------------------------------------------------------------

#: (format, kind, merges, angle at each): the last ones turn as far in fewer merges.
MERGES = [
    ("int8", "", 300, 0.1),
    ("int8", "nearest", 300, 0.1),
    ("int8", "naive", 300, 0.1),
    ("int4", "", 300, 0.1),
    ("int4", "feedback", 300, 0.1),
    ("int8", "feedback", 300, 0.1),
    ("int4", "nearest", 300, 0.1),
    ("int8", "", 300, 0.003),
    ("int8", "nearest", 300, 0.003),
    ("int8", "", 75, 0.2),
    ("int4", "", 75, 0.2),
    ("int8", "feedback", 75, 0.2),
    *((name, "", 300, 0.1) for name in ("nf4", "fp8", "bipolar-int8", "bipolar-int4")),
]


def merges(done: set[str]) -> Iterator[dict[str, Any]]:
    """Against a float32 layer that folds the same rotations: relative error of the stored weight, ‖W‖ ratio."""
    for name, kind, count, angle in MERGES:
        cell = f"{name} {kind}".strip() + f" {count} merges of {angle:g}"
        if cell in done:
            continue
        shared: dict[str, Any] = {"block_size": BLOCK, "init": "normalized", "mode": "mem"}
        exact = PoetLinear(SIZE, SIZE, bias=False, config=PoetConfig(**shared), name="merges")
        config = PoetConfig(**shared, **settings(name, kind))
        layer = PoetLinear(SIZE, SIZE, bias=False, config=config, name="merges")
        set_kind(layer, kind)
        packed = layer.packed_weight
        assert packed is not None
        start, generator = float(packed.fetch().norm()), torch.Generator().manual_seed(0)
        spectrum = torch.linalg.svdvals(exact.base_weight.detach().double())
        ratios, growth = [], {}
        first = float((packed.fetch() - exact.base_weight).norm() / exact.base_norm)
        for merge in range(1, count + 1):
            with torch.no_grad():
                for mine, theirs in zip(layer.rotations, exact.rotations, strict=True):
                    # The largest eigenvalue is near 2·std·√b (semicircle law).
                    mine.copy_(theirs.normal_(std=angle / (2 * BLOCK**0.5), generator=generator))
            if kind == "naive":
                naive_fold(layer)
            exact.merge_()
            layer.merge_()
            ratios.append(float(packed.fetch().norm()) / start)
            if merge in (1, 3, 10, 30, 75, 100, 300):
                growth[merge] = float((packed.fetch() - exact.base_weight).norm() / exact.base_norm)
        end = torch.linalg.svdvals(packed.fetch().double())
        yield {
            "benchmark": "quantised-merges",
            "cell": cell,
            "format": name,
            "kind": kind or "stochastic",
            "merges": count,
            "angle": angle,
            "mean_norm_ratio": round(statistics.mean(ratios), 6),
            "last_norm_ratio": round(ratios[-1], 6),
            "error_at_start": round(first, 5),
            "error_after": {str(key): round(value, 5) for key, value in growth.items()},
            "median_singular_value_change": round(float(((end - spectrum).abs() / spectrum).median()), 5),
            "size": SIZE,
            "block_size": BLOCK,
            "group_size": GROUP,
        }


# -- quality ----------------------------------------------------------------------------------------------------------

STEPS, MERGE_EVERY, BATCH, LAYERS = 100, 20, 4, 2
#: (format or "bfloat16", kind, merge interval, seed), the most telling first.
QUALITY = [
    *((name, "", MERGE_EVERY, seed) for seed in range(2) for name in ("bfloat16", "int8")),
    *((name, "", MERGE_EVERY, 0) for name in ("int4", "nf4", "fp8", "bipolar-int4")),
    *((name, "", MERGE_EVERY, 2) for name in ("bfloat16", "int8")),
    ("int8", "naive", MERGE_EVERY, 0),
    ("int4", "feedback", MERGE_EVERY, 0),
    ("bipolar-int2", "", MERGE_EVERY, 0),
    ("bfloat16", "naive", MERGE_EVERY, 0),
    ("int4", "", STEPS, 0),
    ("bfloat16", "", STEPS, 0),
    *((name, "", MERGE_EVERY, seed) for name in ("int4", "nf4", "fp8", "bipolar-int4") for seed in (1, 2)),
]


def quality(done: set[str]) -> Iterator[dict[str, Any]]:
    """Validation loss of the demo model, of two layers, after the same batches and schedule from the same weights."""
    from poetx.data.prepare import prepare_data
    from poetx.recipe import load_recipe

    recipe = load_recipe("demo", [f"train.batch_size={BATCH}", f"model.num_layers={LAYERS}"])
    data = prepare_data(recipe)
    for name, kind, interval, seed in QUALITY:
        cell = f"{name} {kind}".strip() + f" merged every {interval} seed {seed}"
        if cell in done:
            continue
        loss, seconds, parameters = train(recipe, data, name, kind, interval, seed)
        yield {
            "benchmark": "quantised-quality",
            "cell": cell,
            "format": name,
            "kind": kind or "stochastic",
            "merge_every": interval,
            "seed": seed,
            "validation_loss": round(loss, 4),
            "steps": STEPS,
            "tokens": STEPS * recipe.train.batch_size * recipe.data.seq_len,
            "parameters": parameters,
            "block_size": recipe.poet.config.block_size if recipe.poet else None,
            "group_size": GROUP,
            "seconds": round(seconds, 1),
        }


def train(recipe: Any, data: Any, name: str, kind: str, interval: int, seed: int) -> tuple[float, float, int]:
    """Validation loss, seconds and parameters of one run of a bfloat16 model."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from benchmarks.stack import _loss, validate
    from poetx.data.sampler import batch_windows
    from poetx.train.schedule import lr_factor

    shape, rates = recipe.model, recipe.optimizer
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=recipe.data.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            pad_token_id=None,
        ),
        dtype=torch.float32,
    )
    model = model.to(torch.bfloat16).train()
    parameters = sum(p.numel() for p in model.parameters())
    config = recipe.poet.config.to_dict() | {"mode": "mem", "seed": seed} | settings(name, kind)
    poetx.convert_(model, PoetConfig.from_dict(config))
    layers = [layer for _, layer in poetx.poet_layers(model)]
    for layer in layers:
        set_kind(layer, kind)
    optimizer = torch.optim.AdamW(poetx.param_groups(model, lr=rates.lr, poet_lr=rates.poet_lr), weight_decay=0.0)
    if kind == "naive":
        optimizer.register_step_post_hook(_naive_every(interval, layers))
    poetx.merge_every(optimizer, model, steps=interval)
    peaks = [group["lr"] for group in optimizer.param_groups]
    started = time.perf_counter()
    for step in range(STEPS):
        factor = lr_factor(step, steps=STEPS, warmup_steps=rates.warmup_steps, min_ratio=rates.min_lr_ratio)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        windows = batch_windows(step, batch_size=recipe.train.batch_size, windows=len(data.train), seed=seed)
        _loss(model, *data.train.batch(windows)[:2]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), rates.clip)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - started
    return validate(model, data, recipe), seconds, parameters


def _naive_every(interval: int, layers: list[PoetLinear]) -> Any:
    """Before the library's own merge, which then finds nothing to fold, fold naively."""
    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1
        if count % interval == 0:
            for layer in layers:
                naive_fold(layer)

    return hook


# -- speed and size ---------------------------------------------------------------------------------------------------


def speed(done: set[str], *, repeats: int = 60) -> Iterator[dict[str, Any]]:
    """Forward + backward of one layer, quantised against *mem*, the candidates taking turns."""
    for tokens, m, n, block in ((1024, 256, 256, 64), (1024, 704, 256, 64), (1024, 256, 704, 64)):
        x = torch.randn(tokens, n, requires_grad=True)
        g = torch.randn(tokens, m)
        calls = {}
        for name in ("mem", "int8", "int4", "nf4", "fp8", "bipolar-int4"):
            quantised = {} if name == "mem" else {"weight_format": name, "group_size": GROUP}
            config = PoetConfig(block_size=block, mode="mem", init="normalized", **quantised)
            layer = PoetLinear(n, m, bias=False, config=config, name="speed")

            def call(layer: PoetLinear = layer, x: Tensor = x, g: Tensor = g) -> None:
                torch.autograd.grad(layer(x), [x, *layer.rotations], g)

            calls[name] = call
        if any(f"{name} {tokens} {m}x{n}" not in done for name in calls):
            times = interleaved(calls, repeats=repeats, device=torch.device("cpu"))
            base = median(times["mem"])
            for name, values in times.items():
                yield {
                    "benchmark": "quantised-speed",
                    "cell": f"{name} {tokens} {m}x{n}",
                    "candidate": name,
                    "ms": median(values),
                    "tokens_per_second_of_mem": round(base / median(values), 3),
                    "tokens": tokens,
                    "out_features": m,
                    "in_features": n,
                    "block_size": block,
                    "dtype": "float32",
                    "repeats": repeats,
                }


def step(done: set[str], *, repeats: int = 20) -> Iterator[dict[str, Any]]:
    """Whole steps of the demo, a share of one merge counted in."""
    from poetx.bench.step import bench_step

    names = ("mem", "int8", "int4", "nf4", "fp8")
    if all(name in done for name in names):
        return
    for row in bench_step("demo", methods=names, repeats=repeats):
        yield row | {"benchmark": "quantised-step", "cell": row["contestant"]}


_BUILD = """
import resource, sys, torch, poetx
from poetx.models import model_config, model_from_config
from poetx.recipe import load_recipe
config = model_config(load_recipe(sys.argv[1], text=False), vocab_size=32000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = model_from_config(config, torch.bfloat16, torch.device("meta"), sys.argv[1])
settings = dict(block_size=256, mode="mem", init="normalized", rotation_dtype="bfloat16", weight_format=sys.argv[2])
poetx.convert_(model, poetx.PoetConfig(**settings))
poetx.materialize_(model)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
layer = max(l.in_features * l.out_features for _, l in poetx.poet_layers(model))
dense = 2 * sum(l.in_features * l.out_features for _, l in poetx.poet_layers(model))
print(1024 * (after - before), size, layer, dense)
"""


def build(done: set[str], *, model: str = "llama-1b", weight_format: str = "int8") -> Iterator[dict[str, Any]]:
    """Resident memory (the operating system's peak) of building a model from nothing, and what it weighs then."""
    cell = f"{model} {weight_format}"
    if cell in done:
        return
    out = subprocess.run(
        [sys.executable, "-c", _BUILD, model, weight_format], capture_output=True, text=True, check=True
    )
    grown, size, layer, dense = map(int, out.stdout.split())
    yield {
        "benchmark": "quantised-build",
        "cell": cell,
        "peak_gib": round(grown / 2**30, 3),
        "finished_gib": round(size / 2**30, 3),
        "over_gib": round((grown - size) / 2**30, 3),
        "largest_layer_float32_gib": round(4 * layer / 2**30, 3),
        "converted_layers_in_bfloat16_gib": round(dense / 2**30, 3),
    }


KINDS = {"merges": merges, "quality": quality, "speed": speed, "step": step, "build": build}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="+", choices=KINDS)
    parser.add_argument("--model", default="llama-1b", help="what build builds")
    parser.add_argument("--limit", type=int, help="stop after so many new rows")
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    args = parser.parse_args()
    origin = provenance(torch.device("cpu"))
    for what in args.what:
        done = set()
        if args.out and args.out.exists():
            rows = [json.loads(line) for line in args.out.read_text().splitlines()]
            done = {row["cell"] for row in rows if row["benchmark"] == f"quantised-{what}"}
        options = {"model": args.model} if what == "build" else {}
        for row in itertools.islice(KINDS[what](done, **options), args.limit):
            print(json.dumps({key: row[key] for key in row if key not in ("benchmark",)}), flush=True)
            if args.out:
                append(args.out, [row | origin])


if __name__ == "__main__":
    main()
