"""What thousands of folds, one at every step, do to a weight's spectrum.

    python -m benchmarks.single_step_spectrum --out benchmarks/results/single_step_spectrum.jsonl

512×512, b = 128 (a quarter of any other size), angle 0.015; gradients are noise around one fixed direction, so that
steps add up instead of averaging out. Spectra are those of ``benchmarks.merges``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from benchmarks.merges import weight_of
from benchmarks.record import append, provenance
from poetx import POETX

ANGLE = 0.015


def run(dtype: torch.dtype, steps: int, seed: int, spectrum: str, size: int) -> dict[str, float]:
    """Relative singular-value change (median, largest), norm ratio, and how far the weight itself moved."""
    generator = torch.Generator().manual_seed(seed)
    if spectrum == "gaussian":
        weight = torch.randn(size, size, generator=generator)
        weight /= weight.norm(dim=1, keepdim=True)
    else:
        weight = weight_of(spectrum, size, generator)
    parameter = nn.Parameter(weight.to(dtype))
    first = parameter.detach().double()
    start = torch.linalg.svdvals(first)
    drift = torch.randn(size, size, generator=generator)
    groups = [{"params": [parameter], "lr": ANGLE, "rotate": True}]
    optimizer = POETX(groups, block_size=size // 4, update="rotation", seed=seed)
    for _ in range(steps):
        parameter.grad = (drift + torch.randn(size, size, generator=generator)).to(dtype)
        optimizer.step()
    last = parameter.detach().double()
    end = torch.linalg.svdvals(last)
    change = (end - start).abs() / start
    return {
        "median_change": float(change.median()),
        "largest_change": float(change.max()),
        "norm_ratio": float(end.norm() / start.norm()),
        "moved": float((last - first).norm() / first.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spectrum", default="gaussian", choices=["gaussian", "flat", "power"])
    parser.add_argument("--size", type=int, default=512, help="of the square weight; blocks have a quarter of it")
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    args = parser.parse_args()
    for dtype in (torch.float32, torch.bfloat16):
        row = {"benchmark": "single-step-spectrum", "dtype": str(dtype).removeprefix("torch."), "steps": args.steps}
        row |= {"spectrum": args.spectrum, "angle": ANGLE, "size": args.size, "block_size": args.size // 4}
        row |= {"seed": args.seed} | run(dtype, args.steps, args.seed, args.spectrum, args.size)
        print(row, flush=True)
        if args.out:
            append(args.out, [row | provenance(torch.device("cpu"))])


if __name__ == "__main__":
    main()
