"""What hundreds of merges do to a weight's spectrum, at every storage precision, beside the naive fold.

    python -m benchmarks.merges --merges 300 --out benchmarks/results/merges.jsonl

512×512, b = 128, fresh permutations and fresh random rotations at each merge. *residual* is bfloat16 with 8 more
bits in an int8 tensor. *naive* is the fold of public code: the blocks by the order-3 series, blocks and weight in
bfloat16, rounded to nearest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.record import append, provenance
from poetx import PoetConfig, PoetLinear
from poetx.ops.cayley import cayley

SIZE, BLOCK = 512, 128


def _draw(layer: PoetLinear, angle: float, generator: torch.Generator) -> None:
    """Random skew blocks with largest eigenvalue near ``angle`` (semicircle law: 2·std·√b)."""
    with torch.no_grad():
        for skew in layer.rotations:
            skew.normal_(std=angle / (2 * BLOCK**0.5), generator=generator)


@torch.no_grad()
def _naive_merge(layer: PoetLinear) -> None:
    """R and W in bfloat16, R by the truncated series; permutations by the layer's own merge."""
    G_in, G_out = (cayley(q, size=SIZE, block_size=BLOCK, order=3).bfloat16() for q in layer.rotations)
    W = layer.base_weight.bfloat16().unflatten(1, (-1, BLOCK)).transpose(0, 1)
    W = torch.bmm(W, G_in.mT).transpose(0, 1).flatten(1).unflatten(0, (-1, BLOCK))
    layer.base_weight.copy_(torch.bmm(G_out.mT, W).flatten(0, 1))
    for skew in layer.rotations:
        skew.zero_()
    layer.base_norm.copy_(layer.base_weight.float().norm())  # public code does not correct it
    layer.merge_()


def run(kind: str, angle: float, merges: int, seed: int) -> dict[str, float]:
    """Relative singular-value change (median, largest) and norm ratio after ``merges`` merges."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    config = PoetConfig(block_size=BLOCK, init="normalized", seed=seed, weight_residual=kind == "residual")
    layer = PoetLinear(SIZE, SIZE, bias=False, config=config, name="merges", dtype=dtype)
    start: Tensor = torch.linalg.svdvals(layer._precise_weight().detach().double())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(merges):
        _draw(layer, angle, generator)
        _naive_merge(layer) if kind == "naive" else layer.merge_()
    end = torch.linalg.svdvals(layer._precise_weight().detach().double())
    change = (end - start).abs() / start
    return {
        "median_change": float(change.median()),
        "largest_change": float(change.max()),
        "norm_ratio": float(end.norm() / start.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--merges", type=int, default=300)
    parser.add_argument("--angles", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--kinds", nargs="+", default=["float32", "bfloat16", "residual", "naive"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    args = parser.parse_args()
    rows = []
    for angle in args.angles:
        for kind in args.kinds:
            result = run(kind, angle, args.merges, args.seed)
            rows.append(
                {"benchmark": "merges", "kind": kind, "angle": angle, "merges": args.merges, "seed": args.seed}
                | {"size": SIZE, "block_size": BLOCK}
                | result
                | provenance(torch.device("cpu"))
            )
            print(
                f"{kind:10} theta {angle:.2f}  median change {result['median_change']:.1e}  "
                f"largest {result['largest_change']:.1e}  norm ratio {result['norm_ratio']:.7f}",
                flush=True,
            )
    if args.out:
        append(args.out, rows)


if __name__ == "__main__":
    main()
