"""Does it matter which features share a block? The demo, with other permutations than the paper's random ones.

    python -m benchmarks.permutations --out benchmarks/results/permutations.jsonl

``random``: every feature by itself, the paper's. ``contiguous``: ``poet.permutation=contiguous``, neighbours for good.
``groups of 16``: runs of 16 adjacent features stay together, so a gather moves whole cache lines of float32.
``strided``: from merge to merge each side is contiguous or strided in turn, the input's side when the output's is not,
so that no list of indices is needed. ``whole model``: one permutation of the residual stream for all layers, one of the
MLP's inner features for its three matrices, one of the heads for four: what a model could be stored in, with nothing
left to gather. ``shared``: ``poet.permutation=shared``, where matrices that read the same features (q, k and v; gate
and up) permute them alike, and so do what the MLP's first two write and its third reads. Rows of ``shared inputs`` are
of the same permutations, drawn otherwise, from before there was such a setting.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import torch
from torch import Tensor

from benchmarks.record import append, provenance
from poetx.config import Permutation
from poetx.layers.poet import PoetLinear
from poetx.ops.random import stream

Draw = Callable[[PoetLinear, int], tuple[Tensor, Tensor]]


def _sides(layer: PoetLinear) -> tuple[tuple[str, int, int], ...]:
    return ("in", layer.in_features, layer.block_size_in), ("out", layer.out_features, layer.block_size_out)


def grouped(width: int) -> Draw:
    """Runs of ``width`` features in random order; the last run is shorter where ``width`` does not divide the side."""

    def draw(layer: PoetLinear, merge_count: int) -> tuple[Tensor, Tensor]:
        perms = []
        for side, size, _ in _sides(layer):
            generator = stream(layer.config.seed, layer.name, merge_count, side)
            order = torch.randperm(-(-size // width), generator=generator, device="cpu")
            perm = (order[:, None] * width + torch.arange(width)).flatten()
            perms.append(perm[perm < size])
        return tuple(perms)  # type: ignore[return-value]

    return draw


def strided_order(size: int, block_size: int) -> Tensor:
    """Coordinates k, k + r, k + 2r, … of block k for r blocks, one block after the other; backwards where b does not
    divide the size, so that the same coordinates do not stand in both short last blocks."""
    blocks = -(-size // block_size)
    order = torch.cat([torch.arange(start, size, blocks) for start in range(blocks)])
    return order.flip(0) if size % block_size else order


def strided(layer: PoetLinear, merge_count: int) -> tuple[Tensor, Tensor]:
    """Contiguous and strided in turn."""
    return tuple(  # type: ignore[return-value]
        strided_order(size, block_size) if (merge_count + i) % 2 else torch.arange(size)
        for i, (_, size, block_size) in enumerate(_sides(layer))
    )


#: What the two sides of a Llama's matrices are: features that several matrices share are permuted alike.
_SHARED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("residual", "heads")),
    "o_proj": ("heads", "residual"),
    **dict.fromkeys(("gate_proj", "up_proj"), ("residual", "mlp")),
    "down_proj": ("mlp", "residual"),
}


def whole_model(heads: int) -> Draw:
    """Whole heads in random order, alike in the four matrices of an attention; inside them nothing moves, for RoPE's
    pairs and because a block of several whole heads would not see it."""

    def draw(layer: PoetLinear, merge_count: int) -> tuple[Tensor, Tensor]:
        block, _, kind = layer.name.rpartition(".")
        perms = []
        for shared, (_, size, _) in zip(_SHARED[kind], _sides(layer), strict=True):
            name = "model" if shared == "residual" else block
            count = heads if shared == "heads" else size
            generator = stream(layer.config.seed, name, merge_count, shared)
            order = torch.randperm(count, generator=generator, device="cpu")
            perms.append((order[:, None] * (size // count) + torch.arange(size // count)).flatten())
        return tuple(perms)  # type: ignore[return-value]

    return draw


_OWN = PoetLinear._draw_permutations
KINDS: dict[str, Draw] = {
    "random": _OWN,
    "contiguous": _OWN,
    "groups of 16": grouped(16),
    "strided": strided,
    "whole model": whole_model(8),
    "shared": _OWN,
}


def run(kind: str, seed: int, settings: list[str], directory: Path) -> dict[str, Any]:
    """Train the demo; its last validation loss."""
    from poetx.recipe import load_recipe
    from poetx.train.run import train

    overrides = [
        f"run_dir={directory / f'{kind}-{seed}'.replace(' ', '-')}",
        f"train.seed={seed}",
        f"poet.seed={seed}",
        "train.export=false",
        *([f"poet.permutation={kind}"] if kind in get_args(Permutation) else []),
        *settings,
    ]
    recipe = load_recipe("demo", overrides)
    with mock.patch.object(PoetLinear, "_draw_permutations", KINDS[kind]):
        train(recipe)
    assert recipe.run_dir is not None
    assert recipe.poet is not None
    lines = (Path(recipe.run_dir) / "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if row["event"] == "validation"]
    return {
        "benchmark": "permutations",
        "kind": kind,
        "seed": seed,
        "settings": settings,
        "init_scale": recipe.poet.config.init_scale,
        "steps": recipe.train.steps,
        "merges": recipe.train.steps // (recipe.merge_every or recipe.train.steps),
        "loss": losses[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe, key=value")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    args = parser.parse_args()
    origin = provenance(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            for kind in args.kinds:
                row = run(kind, seed, args.set, Path(scratch))
                append(args.out, [row | origin])
                print(f"{kind:15} seed {seed}  {row['loss']:.4f}", flush=True)


if __name__ == "__main__":
    main()
