"""What hundreds of merges do to a weight's spectrum, at every storage precision, beside the naive fold.

    python -m benchmarks.merges --merges 3000 --out benchmarks/results/merges.jsonl --plot docs/merges.png
    python -m benchmarks.merges --spectrum power --size 128 --angles 0.3 \\
        --kinds float32 bfloat16 residual int8 int8-residual --out benchmarks/results/merges.jsonl

512×512, b = 128 (a quarter of any other size), fresh permutations and fresh random rotations at each merge. *residual*
is with ``weight_extra_bits``: bfloat16 with 8 more bits in an int8 tensor, int8 with 4 more. *naive* is the fold of
public code: the blocks by the order-3 series, blocks and weight in bfloat16, rounded to nearest.

Spectra, all with ‖W‖² = size: *gaussian*, rows of norm 1; *flat*, all singular values equal; *power*, the i-th
proportional to 1/i, where most are small beside the largest, as in pretrained weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import append, provenance
from poetx import PoetConfig, PoetLinear
from poetx.ops.cayley import cayley

INT8 = {"weight_format": "int8", "mode": "mem"}
#: Storage of a weight by the name of its kind: dtype and settings.
KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "residual": (torch.bfloat16, {"weight_extra_bits": True}),
    "int8": (torch.bfloat16, INT8),
    "int8-residual": (torch.bfloat16, INT8 | {"weight_extra_bits": True}),
    "naive": (torch.bfloat16, {}),
}


def weight_of(spectrum: str, size: int, generator: torch.Generator) -> Tensor:
    """A float32 weight [size, size] with ‖W‖² = size whose singular values are ``"flat"`` or go as a ``"power"``."""
    left, right = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0] for _ in range(2)
    )
    values = torch.ones(size, dtype=torch.float64)
    if spectrum == "power":
        values /= torch.arange(1, size + 1)
    return (left * (values * size**0.5 / values.norm()) @ right).float()


def _draw(layer: PoetLinear, angle: float, generator: torch.Generator) -> None:
    """Random skew blocks with largest eigenvalue near ``angle`` (semicircle law: 2·std·√b)."""
    with torch.no_grad():
        for skew in layer.rotations:
            skew.normal_(std=angle / (2 * layer.config.block_size**0.5), generator=generator)


@torch.no_grad()
def _naive_merge(layer: PoetLinear) -> None:
    """R and W in bfloat16, R by the truncated series; permutations by the layer's own merge."""
    size, block = layer.in_features, layer.config.block_size
    G_in, G_out = (cayley(q, size=size, block_size=block, order=3).bfloat16() for q in layer.rotations)
    W = layer.base_weight.bfloat16().unflatten(1, (-1, block)).transpose(0, 1)
    W = torch.bmm(W, G_in.mT).transpose(0, 1).flatten(1).unflatten(0, (-1, block))
    layer.base_weight.copy_(torch.bmm(G_out.mT, W).flatten(0, 1))
    for skew in layer.rotations:
        skew.zero_()
    layer.base_norm.copy_(layer.base_weight.float().norm())  # public code does not correct it
    layer.merge_()


def run(
    kind: str, angle: float, merges: int, seed: int, every: int, spectrum: str, size: int
) -> Iterator[dict[str, float]]:
    """Relative singular-value change (median, largest) and norm ratio after every ``every``-th merge."""
    dtype, settings = KINDS[kind]
    config = PoetConfig(
        **{"block_size": size // 4, "init": "normalized", "seed": seed, "weight_extra_bits": False} | settings
    )
    layer = PoetLinear(size, size, bias=False, config=config, name="merges", dtype=dtype)
    if spectrum != "gaussian":  # the layer's own draw, so that rows of before stay what they are
        layer.load_dense_(weight_of(spectrum, size, torch.Generator().manual_seed(seed)))
    start: Tensor = torch.linalg.svdvals(layer.frozen_weight.precise().detach().double())
    generator = torch.Generator().manual_seed(seed)
    for merge in range(1, merges + 1):
        _draw(layer, angle, generator)
        _naive_merge(layer) if kind == "naive" else layer.merge_()
        if merge % every and merge != merges:
            continue
        end = torch.linalg.svdvals(layer.frozen_weight.precise().detach().double())
        change = (end - start).abs() / start
        yield {
            "merges": merge,
            "median_change": float(change.median()),
            "largest_change": float(change.max()),
            "norm_ratio": float(end.norm() / start.norm()),
        }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Median singular-value change and norm drift over merges, one line a kind, one column an angle."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    angles = sorted({row["angle"] for row in rows})
    figure, axes = plt.subplots(
        2, len(angles), figsize=(4.5 * len(angles), 6), sharex=True, sharey="row", squeeze=False
    )
    for column, angle in enumerate(angles):
        for kind in dict.fromkeys(row["kind"] for row in rows):
            mine = [row for row in rows if row["kind"] == kind and row["angle"] == angle]
            merges = [row["merges"] for row in mine]
            axes[0, column].plot(merges, [row["median_change"] for row in mine], label=kind)
            axes[1, column].plot(merges, [abs(row["norm_ratio"] - 1) for row in mine], label=kind)
        axes[0, column].set_title(f"largest angle {angle:g}")
        axes[1, column].set_xlabel("merges")
        for axis in axes[:, column]:
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("median relative change\nof singular values")
    axes[1, 0].set_ylabel("| norm / norm at start - 1 |")
    axes[0, 0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--merges", type=int, default=300)
    parser.add_argument("--every", type=int, default=100, help="measure after so many merges")
    parser.add_argument("--angles", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--kinds", nargs="+", default=["float32", "bfloat16", "residual", "naive"], choices=KINDS)
    parser.add_argument("--spectrum", default="gaussian", choices=["gaussian", "flat", "power"])
    parser.add_argument("--size", type=int, default=512, help="of the square weight; blocks have a quarter of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    parser.add_argument("--plot", type=Path, help="write a plot here")
    args = parser.parse_args()
    rows = []
    for angle in args.angles:
        for kind in args.kinds:
            setting = {"benchmark": "merges", "kind": kind, "angle": angle, "seed": args.seed}
            setting |= {"spectrum": args.spectrum, "size": args.size, "block_size": args.size // 4}
            for result in run(kind, angle, args.merges, args.seed, args.every, args.spectrum, args.size):
                rows.append(setting | result | provenance(torch.device("cpu")))
            print(
                f"{kind:13} angle {angle:.2f}  median change {result['median_change']:.1e}  "
                f"largest {result['largest_change']:.1e}  norm ratio {result['norm_ratio']:.7f}",
                flush=True,
            )
    if args.out:
        append(args.out, rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
