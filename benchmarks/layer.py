"""Forward + backward of one whole layer against ``nn.Linear`` in the same run.

    python -m benchmarks.layer --tokens 1024 --in-features 1024 --out-features 1024 --block-size 128

Prints a table and, with ``--out FILE``, appends one JSON line a candidate. A candidate whose output or gradient
is wrong stops the run before anything is timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.record import append, interleaved, median, provenance
from poetx import PoetConfig, PoetLinear

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def _layer(args: argparse.Namespace, mode: str, device: torch.device, dtype: torch.dtype) -> PoetLinear:
    config = PoetConfig(block_size=args.block_size, mode=mode, init="normalized")
    layer = PoetLinear(
        args.in_features,
        args.out_features,
        bias=False,
        config=config,
        name="bench",
        device=device,
        dtype=dtype,
    )
    with torch.no_grad():
        for skew in layer.rotations:
            skew.normal_(std=0.3 / args.block_size, generator=torch.Generator(device).manual_seed(0))
    return layer


def _check(layer: PoetLinear, x: Tensor, g: Tensor) -> None:
    dense = layer.dense_weight().detach().double()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, g)
    for name, got, want in (
        ("output", y, x.detach().double() @ dense.T),
        ("input gradient", dx, g.double() @ dense),
    ):
        error = float((got.detach().double() - want).norm() / want.norm())
        assert error < _TOLERANCE[x.dtype], f"{layer.config.mode}: {name} is off by {error:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--in-features", type=int, default=1024)
    parser.add_argument("--out-features", type=int, default=1024)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    args = parser.parse_args()

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    x = torch.randn(args.tokens, args.in_features, device=device, dtype=dtype, requires_grad=True)
    g = torch.randn(args.tokens, args.out_features, device=device, dtype=dtype)
    layers: dict[str, nn.Module] = {
        "linear": nn.Linear(args.in_features, args.out_features, bias=False, device=device, dtype=dtype)
    }
    for mode in ("fast", "mem"):
        layer = _layer(args, mode, device, dtype)
        _check(layer, x, g)
        layers[mode] = layer

    def candidate(layer: nn.Module):
        parameters = [p for p in layer.parameters() if p.requires_grad]

        def call() -> None:
            torch.autograd.grad(layer(x), [x, *parameters], g)

        return call

    times = interleaved({name: candidate(layer) for name, layer in layers.items()}, repeats=args.repeats, device=device)
    base = median(times["linear"])
    origin = provenance(device)
    rows = []
    for name, values in times.items():
        row = {
            "benchmark": "layer",
            "candidate": name,
            "ms": median(values),
            "ratio": round(median(values) / base, 3),
            "tokens": args.tokens,
            "out_features": args.out_features,
            "in_features": args.in_features,
            "block_size": args.block_size,
            "dtype": args.dtype,
            "repeats": args.repeats,
        } | origin
        rows.append(row)
        print(f"{name:8} {row['ms']:9.3f} ms  {row['ratio']:.3f} x nn.Linear")
    if args.out:
        append(args.out, rows)


if __name__ == "__main__":
    main()
