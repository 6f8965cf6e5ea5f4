"""What a layer moves and multiplies on a GPU, kernel by kernel, and the least time that takes.

    python -m benchmarks.roofline                                          # beside benchmarks/results/gpu/layer.jsonl
    python -m benchmarks.roofline --layer 14336x4096 --tokens 2048,8192 --methods fast,mem --device h100

Forward and backward of one layer in bfloat16, m × n, N tokens, blocks of b that divide both sides. A kernel takes the
longer of its bytes by what the memory reaches and its operations by what the units reach, and no less than a launch.
Bytes are counted, too (``python -m benchmarks.launches RECIPE --layer``), and agree.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.record import RESULTS
from poetx.ops.linear import weight_is_cheaper

_X = 2  # bytes of an activation or a weight
_F = 4  # of what Cayley's kernels and the block gradients hold


@dataclass(frozen=True)
class Device:
    """What one GPU reaches.

    Attributes:
        copied: bytes a second of a copy. permuted: of the permutation kernel. blocks: of a batched product of blocks,
            which its memory bounds. product: operations a second of a large bfloat16 product. tf32: of Cayley's small
            products. launch: the least time of a kernel, seconds.
    """

    copied: float
    permuted: float
    blocks: float
    product: float
    tf32: float
    launch: float = 3e-6


#: h200: fitted to benchmarks/results/gpu/routes.jsonl; its tf32 and launch are assumptions (a quarter of the data
#: sheet's 495 TFLOP/s), since no kernel of today's has run there. h100, 4090: the same shares of their data sheets.
DEVICES = {
    "h200": Device(copied=4.28e12, permuted=3.43e12, blocks=3.17e12, product=787e12, tf32=120e12),
    "h100": Device(copied=2.99e12, permuted=2.39e12, blocks=2.21e12, product=720e12, tf32=120e12),
    "4090": Device(copied=0.90e12, permuted=0.72e12, blocks=0.67e12, product=140e12, tf32=20e12),
}


@dataclass(frozen=True)
class Piece:
    """One launch."""

    kernel: str
    bytes: float
    flops: float = 0

    def seconds(self, device: Device) -> float:
        rate = {"permute_kernel": device.permuted, "bmm": device.blocks}.get(self.kernel, device.copied)
        speed = device.product if self.kernel in ("mm", "bmm") else device.tf32
        return max(self.bytes / rate, self.flops / speed, device.launch)


@dataclass(frozen=True)
class Layer:
    """A layer's sizes: m out and n in features, N tokens, blocks of b; bytes of an entry of a packed rotation."""

    m: int
    n: int
    N: int
    b: int
    packed: int = 4
    momentum: int = 2
    gathered: bool = True
    order: int = 3

    @property
    def blocks(self) -> int:
        """Entries of all blocks of both sides."""
        return self.b * (self.m + self.n)

    def product(self) -> Piece:
        """x·Wᵀ or g·W; or, of the same size, gᵀ·x."""
        N, m, n = self.N, self.m, self.n
        return Piece("mm", _X * (N * n + m * n + N * m), 2 * N * m * n)

    def rotated(self, features: int) -> Piece:
        """Activations by the blocks of their side."""
        return Piece("bmm", _X * (2 * self.N * features + self.b * features), 2 * self.N * features * self.b)

    def outer(self, features: int) -> Piece:
        """The gradient of a side's blocks."""
        return Piece("bmm", _X * 2 * self.N * features + _F * self.b * features, 2 * self.N * features * self.b)

    def permuted(self, features: int) -> list[Piece]:
        return [Piece("permute_kernel", _X * 2 * self.N * features + 4 * features)] if self.gathered else []

    def inverse(self, features: int) -> list[Piece]:
        return [Piece("inverse_kernel", 4 * 2 * features)] if self.gathered else []

    def products_of_blocks(self, kernel: str, tensors: int, products: float, more: float = 0) -> Piece:
        """A kernel over float32 tensors of all blocks."""
        return Piece(kernel, tensors * _F * self.blocks + more, products * 2 * self.b * self.blocks)

    @property
    def triangles(self) -> int:
        return self.packed * (self.b - 1) * (self.m + self.n) // 2

    def unpacked(self) -> list[Piece]:
        """Q; S and P."""
        return [
            self.products_of_blocks("unpack_kernel", 1, 0, self.triangles),
            self.products_of_blocks("square_kernel", 3, 0.5),
        ]

    def series(self) -> list[Piece]:
        if self.order == 3:
            return [self.products_of_blocks("series_kernel", 2, 1, _X * self.blocks)]
        return [
            self.products_of_blocks("series_kernel", 4, 2),
            self.products_of_blocks("extend_kernel", 2, 1, _X * self.blocks),
        ]

    def series_backward(self) -> list[Piece]:
        """From the gradient of the blocks to that of the packed rotations, with Q and S at hand."""
        first: list[Piece] = []
        if self.order == 7:
            first.append(self.products_of_blocks("series_kernel", 4, 2))
            first.append(self.products_of_blocks("extend_gradient_kernel", 5, 2))
        factor = self.products_of_blocks("factor_gradient_kernel", 6 + (self.order == 7), 2 + 2 * (self.order == 7))
        return [*first, factor, self.products_of_blocks("pack_gradient_kernel", 4, 2, self.triangles)]

    def forward(self) -> list[Piece]:
        """x' · G_in · Wᵀ · G_out, scattered."""
        return [
            *self.permuted(self.n),
            self.rotated(self.n),
            self.product(),
            self.rotated(self.m),
            *self.inverse(self.m),
            *self.permuted(self.m),
        ]

    def backward(self) -> list[Piece]:
        """From g and b = x'·G_in·Wᵀ."""
        out = [*self.permuted(self.m), self.outer(self.m), self.rotated(self.m), self.product()]
        into = [*self.inverse(self.n), *self.permuted(self.n), self.outer(self.n), self.rotated(self.n)]
        return [*out, *into, *self.permuted(self.n)]


def linear(layer: Layer) -> list[Piece]:
    """``nn.Linear``: forward, and both gradients."""
    return [layer.product()] * 3


def fast(layer: Layer) -> list[Piece]:
    """The paper's form, which keeps b and G."""
    if weight_is_cheaper(layer.N, layer.m, layer.n, layer.b, layer.b, "fast"):
        return by_weight(layer)
    forward = [*layer.unpacked(), *layer.series(), *layer.forward()]
    return [*forward, *layer.backward(), *layer.unpacked(), *layer.series_backward()]


def mem(layer: Layer) -> list[Piece]:
    """The paper's form, which computes b and G again; with many tokens from the rotated weight."""
    if weight_is_cheaper(layer.N, layer.m, layer.n, layer.b, layer.b, "mem"):
        return by_weight(layer)
    forward = [*layer.unpacked(), *layer.series(), *layer.forward()]
    again = [*layer.unpacked(), *layer.series(), *layer.permuted(layer.n), layer.rotated(layer.n), layer.product()]
    return [*forward, *again, *layer.backward(), *layer.series_backward()]


def by_weight(layer: Layer) -> list[Piece]:
    """The same from a weight that is rotated in forward and again in backward."""
    m, n = layer.m, layer.n
    rows = replace(layer, N=m)  # the weight's rows for tokens; and its columns:
    columns = replace(layer, N=n)
    moved = Piece("index_select", _X * 2 * m * n + 4 * m)
    rotate = [*layer.unpacked(), *layer.series(), rows.rotated(n), columns.rotated(m)]
    if layer.gathered:
        rotate += [*layer.inverse(n), *layer.inverse(m), *rows.permuted(n), moved]
    gradients = [layer.product(), layer.product(), *rows.permuted(n), *([moved] if layer.gathered else [])]
    blocks = [columns.outer(m), columns.rotated(m), rows.outer(n)]
    return [*rotate, layer.product(), *rotate, *gradients, *blocks, *layer.series_backward()]


def single_step(layer: Layer) -> list[Piece]:
    """Free maps, y kept: two products, two gradients of blocks, and what adds them to the momenta."""
    counts = 4 * (layer.m + layer.n) // layer.b
    momenta = 2 * layer.momentum * layer.blocks
    return [
        *[layer.product()] * 2,
        layer.outer(layer.n),
        layer.outer(layer.m),
        Piece("add_kernel", _F * layer.blocks + momenta + 2 * counts),
    ]


METHODS = {"linear": linear, "fast": fast, "mem": mem, "single-step-free": single_step}


def totals(method: str, layer: Layer) -> tuple[Counter[str], Counter[str]]:
    """Launches and bytes, by kernel."""
    launches: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for piece in METHODS[method](layer):
        launches[piece.kernel] += 1
        moved[piece.kernel] += int(piece.bytes)
    return launches, moved


def seconds(method: str, layer: Layer, device: Device) -> float:
    """The least time of one layer's kernels, forward and backward."""
    return sum(piece.seconds(device) for piece in METHODS[method](layer))


def predicted(row: dict[str, Any], device: Device = DEVICES["h200"]) -> float | None:
    """Milliseconds for a row of ``poetx bench layer``; None for what is not described here."""
    name = row["contestant"]
    method, near = name.removesuffix("-contiguous"), name.endswith("-contiguous")
    if method not in METHODS or row["dtype"] != "bfloat16":
        return None
    layer = Layer(row["out_features"], row["in_features"], row["tokens"], row["block_size"], gathered=not near)
    return 1e3 * seconds(method, layer, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layer", help="OUTxIN; without it, the measured rows beside their predictions")
    parser.add_argument("--tokens", default="2048,8192,16384")
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--device", default="h200", choices=DEVICES)
    args = parser.parse_args()
    device = DEVICES[args.device]
    if args.layer is None:
        for row in map(json.loads, (RESULTS / "gpu" / "layer.jsonl").read_text().splitlines()):
            if (time := predicted(row)) is not None:
                what = f"{row['contestant']:18} {row['tokens']:6} {row['out_features']}x{row['in_features']}"
                print(f"{what}  predicted {time:6.3f} ms, measured {row['queued_ms']:6.3f} ({row['commit']})")
        return
    if unknown := next((name for name in args.methods.split(",") if name not in METHODS), None):
        parser.error(f"--methods: {unknown!r} is none of {', '.join(METHODS)}")
    m, n = map(int, args.layer.split("x"))
    for tokens in map(int, args.tokens.split(",")):
        plain = seconds("linear", Layer(m, n, tokens, args.block_size), device)
        for method in args.methods.split(","):
            for gathered in (True, False) if method in ("fast", "mem") else (True,):
                layer = Layer(m, n, tokens, args.block_size, gathered=gathered)
                time, (launches, moved) = seconds(method, layer, device), totals(method, layer)
                name = method + ("" if gathered else ", contiguous")
                ratio = f"{time / plain:.2f} of linear" if method != "linear" else ""
                print(
                    f"{tokens:6} tokens {name:20} {1e3 * time:6.3f} ms {ratio:15} {launches.total():3} launches, "
                    f"{moved.total() / 1e9:.2f} GB"
                )


if __name__ == "__main__":
    main()
