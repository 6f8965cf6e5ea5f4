"""What a GPU can do at most, and how long the pieces of a layer take there by each way of computing them.

    python -m benchmarks.routes --out routes.jsonl                (needs a GPU)

One JSON line a piece, way and size: ``ms`` with a full queue, and the bytes and operations that have to be moved and
done, so that the distance from the ceilings (copy bandwidth, product rate, both measured first) can be read off. These
rows decided for cuBLAS and against Triton kernels for the block products (docs/log.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import append, provenance
from poetx.bench.layer import Shape, poet_layer
from poetx.bench.timing import interleaved, median
from poetx.merge import merge_
from poetx.ops.cayley import cayley, packed_size
from poetx.optim.orthogonalize import orthogonalize

Ways = dict[str, Callable[[], object]]
TOKENS, FEATURES, BLOCK, REPEATS = (2048, 8192, 16384), 4096, 256, 20


def ceilings(device: torch.device) -> Iterator[dict[str, Any]]:
    """Copies on the device and between it and pinned host memory, and square bfloat16 products of random numbers."""
    size = 2**30
    here, there = (torch.empty(size, dtype=torch.uint8, device=device).random_() for _ in range(2))
    pinned = torch.empty(size // 4, dtype=torch.uint8, pin_memory=True)
    quarter = here[: size // 4]
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    ways: Ways = {
        "copy on the device": lambda: there.copy_(here),
        "copy from pinned host memory": lambda: quarter.copy_(pinned, non_blocking=True),
        "copy to pinned host memory": lambda: pinned.copy_(quarter, non_blocking=True),
        "product 8192³": lambda: a @ b,
    }
    moved = {"copy on the device": 2 * size, "product 8192³": 3 * a.nbytes}
    times = interleaved(ways, repeats=10, device=device, queued=True)
    for way in ways:
        flop = 2 * 8192**3 if "product" in way else 0
        yield _row("ceiling", way, median(times[way]), moved.get(way, size // 4), flop)


def block_products(device: torch.device) -> Iterator[dict[str, Any]]:
    """Rotating [N, F] by blocks, permuting it, and the blocks' gradients, on strided views."""
    from poetx.ops.triton.permute import permute

    blocks = FEATURES // BLOCK
    G = torch.randn(blocks, BLOCK, BLOCK, device=device, dtype=torch.bfloat16) / BLOCK**0.5
    perm = torch.randperm(FEATURES, device=device).int()
    for tokens in TOKENS:
        x, g = (torch.randn(tokens, FEATURES, device=device, dtype=torch.bfloat16) for _ in range(2))
        W = torch.randn(FEATURES, FEATURES, device=device, dtype=torch.bfloat16)
        out = torch.empty_like(x)
        total = torch.zeros(blocks, BLOCK, BLOCK, device=device)

        def view(x: Tensor, tokens: int = tokens) -> Tensor:
            return x.view(tokens, blocks, BLOCK).transpose(0, 1)

        def strided(x=x, out=out, view=view) -> Tensor:
            return torch.bmm(view(x), G, out=view(out))

        def outer_cublas(x=x, g=g, view=view) -> Tensor:
            return torch.bmm(view(x).transpose(1, 2), view(g), out_dtype=torch.float32)

        def outer_added(x=x, g=g, view=view, total=total) -> Tensor:
            return torch.baddbmm(total, view(x).transpose(1, 2), view(g), out_dtype=torch.float32)

        pieces: dict[str, tuple[Ways, int, int]] = {
            "product with the weight": ({"cuBLAS": lambda x=x, W=W: x @ W}, 2 * x.nbytes + W.nbytes, 2 * FEATURES),
            "block product": (
                {"strided": strided, "einsum": lambda x=x: torch.einsum("nkb,kbc->nkc", x.view(-1, blocks, BLOCK), G)},
                2 * x.nbytes,
                2 * BLOCK,
            ),
            "permutation": (
                {"Triton": lambda x=x: permute(x, perm), "index_select": lambda x=x: x.index_select(1, perm)},
                2 * x.nbytes,
                0,
            ),
            "block outer product": (
                {"alone": outer_cublas, "added": outer_added},
                2 * x.nbytes,
                2 * BLOCK,
            ),
            "addition": ({"torch": lambda x=x, g=g: x + g}, 3 * x.nbytes, 0),
        }
        for piece, (ways, moved, flop_an_element) in pieces.items():
            ways = {way: call for way, call in ways.items() if _works(piece, way, call)}
            times = interleaved(ways, repeats=REPEATS, device=device, queued=True)
            for way in ways:
                flop = flop_an_element * tokens * FEATURES
                yield _row(piece, way, median(times[way]), moved, flop) | {"tokens": tokens}


def weights(device: torch.device) -> Iterator[dict[str, Any]]:
    """What does not depend on tokens: Cayley, merging one layer, Newton-Schulz of one side's blocks."""
    for rows in (FEATURES, 14336):
        shape = Shape(
            tokens=1,
            in_features=FEATURES,
            out_features=rows,
            block_size=BLOCK,
            dtype=torch.bfloat16,
            device=device,
        )
        layer = poet_layer(shape, "mem")
        blocks = FEATURES // BLOCK
        packed = (torch.randn(blocks, packed_size(BLOCK), device=device) * 0.01).requires_grad_()
        G = cayley(packed, size=FEATURES, block_size=BLOCK, order=3)
        gradient = torch.randn_like(G)
        momentum = torch.randn(blocks, BLOCK, BLOCK, device=device)
        ways: Ways = {
            "Cayley": lambda packed=packed: cayley(packed, size=FEATURES, block_size=BLOCK, order=3),
            "Cayley, backward": lambda G=G, packed=packed, gradient=gradient: torch.autograd.grad(
                G, packed, gradient, retain_graph=True
            ),
            "Newton-Schulz": lambda momentum=momentum: orthogonalize(momentum),
            "merge": lambda layer=layer: merge_(torch.nn.Sequential(layer)),
        }
        times = interleaved(ways, repeats=10, device=device)
        queued = interleaved(ways, repeats=5, device=device, queued=True)
        for way in ways:
            row = _row(way, "as it is", median(times[way]), 0, 0) | {"queued_ms": median(queued[way])}
            yield row | {"out_features": rows, "in_features": FEATURES}


def _works(piece: str, way: str, call: Callable[[], object]) -> bool:
    """Not every version of PyTorch has every way."""
    try:
        call()
    except (RuntimeError, TypeError) as error:
        print(f"{piece}, {way}: {str(error).splitlines()[0]}")
        return False
    return True


def _row(piece: str, way: str, ms: float, moved: int, flop: int) -> dict[str, Any]:
    row = {"benchmark": "routes", "piece": piece, "way": way, "ms": ms, "bytes": moved, "flop": flop}
    return row | {"tb_per_s": round(moved / ms / 1e9, 3), "tflop_per_s": round(flop / ms / 1e9, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    origin = provenance(device)
    for part in (ceilings, block_products, weights):
        for row in part(device):
            append(args.out, [row | origin])
            where = row.get("tokens") or row.get("out_features") or ""
            queued = f"(queued {row['queued_ms']}) " if "queued_ms" in row else ""
            rates = f"{row['tb_per_s']:6.3f} TB/s {row['tflop_per_s']:7.1f} TFLOP/s"
            print(f"{row['piece']:26} {row['way']:28} {where!s:>6} {row['ms']:9.4f} ms {queued}{rates}", flush=True)


if __name__ == "__main__":
    main()
