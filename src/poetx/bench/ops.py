"""``poetx bench ops``: the operators against their plain PyTorch twins, at the sizes of the paper's tables.

The twins are what one writes first: ``x[:, perm]`` with autograd's own backward (a scatter-add), blocks unpacked by
index assignment and the series power by power, one einsum over blocks. All forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from poetx.bench.timing import gate, interleaved, median, provenance
from poetx.ops import block_diagonal, reference
from poetx.ops.cayley import cayley, packed_size

TOKENS = (2048, 4096, 8192, 16384)
BLOCKS = (64, 128, 192, 256, 320)
BLOCK_SIZES = (256, 512)


def bench_ops(
    *,
    device: torch.device,
    dtype: torch.dtype,
    tokens: Sequence[int] = TOKENS,
    features: int = 4096,
    blocks: Sequence[int] = BLOCKS,
    block_sizes: Sequence[int] = BLOCK_SIZES,
    repeats: int = 10,
) -> Iterator[dict[str, Any]]:
    """One row an operator and size: ``ms`` and ``naive_ms`` of forward and backward, ``speedup`` of one over the other.

    Raises:
        UserError: an operator computes something else than its twin; nothing of that size was timed then.
    """
    common = {"dtype": str(dtype).removeprefix("torch."), "repeats": repeats} | provenance(device)
    for count in tokens:
        facts = {"tokens": count, "features": features}
        yield _row("permutation", facts, _permutation(count, features, dtype, device), repeats, device) | common
    for block_size in block_sizes:
        for count in blocks:
            facts = {"block_size": block_size, "blocks": count}
            yield _row("cnp", facts, _cnp(block_size, count, device), repeats, device) | common
    for block_size in block_sizes:
        for count in tokens:
            facts = {"tokens": count, "features": features, "block_size": block_size}
            problem = _block_product(count, features, block_size, dtype, device)
            yield _row("gather + block product", facts, problem, repeats, device) | common


Problem = dict[str, Callable[[], object]]


def _row(operator: str, facts: dict[str, Any], problem: Problem, repeats: int, device: torch.device) -> dict[str, Any]:
    times = interleaved(problem, repeats=repeats, device=device)
    ours, naive = median(times["ours"]), median(times["naive"])
    return (
        {"benchmark": "ops", "operator": operator, "ms": ours, "naive_ms": naive}
        | facts
        | {"speedup": round(naive / ours, 2) if ours else None}
    )


def _draw(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return lambda *size: torch.randn(*size, generator=generator, device=device, dtype=dtype)


def _permutation(tokens: int, features: int, dtype: torch.dtype, device: torch.device) -> Problem:
    draw = _draw(device, dtype)
    x, g = draw(tokens, features).requires_grad_(), draw(tokens, features)
    perm = torch.randperm(features, generator=torch.Generator().manual_seed(0)).int().to(device)
    index, detached = perm.long(), x.detach()

    def ours() -> tuple[Tensor, Tensor]:
        return block_diagonal.gather(detached, perm), block_diagonal.gather(g, block_diagonal.inverse(perm))

    def naive() -> tuple[Tensor, Tensor]:
        y = x[:, index]
        return y, torch.autograd.grad(y, x, g)[0]

    _compare("permutation", ours(), naive(), dtype)
    return {"ours": ours, "naive": naive}


def _cnp(block_size: int, blocks: int, device: torch.device) -> Problem:
    draw = _draw(device, torch.float32)
    q = (draw(blocks, packed_size(block_size)) * (0.15 / block_size**0.5)).requires_grad_()
    g = draw(blocks, block_size, block_size)

    def ours() -> tuple[Tensor, Tensor]:
        G = cayley(q, size=blocks * block_size, block_size=block_size, order=3)
        return G, torch.autograd.grad(G, q, g)[0]

    def naive() -> tuple[Tensor, Tensor]:
        G = reference.cayley_neumann(reference.unpack_skew(q, block_size), 3)
        return G, torch.autograd.grad(G, q, g)[0]

    _compare("cnp", ours(), naive(), torch.float32)
    return {"ours": ours, "naive": naive}


def _block_product(tokens: int, features: int, block_size: int, dtype: torch.dtype, device: torch.device) -> Problem:
    draw = _draw(device, dtype)
    blocks = max(1, features // block_size)
    features, width = (blocks * block_size, block_size) if features >= block_size else (features, features)
    x, g = draw(tokens, features).requires_grad_(), draw(tokens, features)
    G = (draw(blocks, width, width) / width**0.5).requires_grad_()
    perm = torch.randperm(features, generator=torch.Generator().manual_seed(0)).int().to(device)
    index, x_plain, G_plain, scratch = perm.long(), x.detach(), G.detach(), g.clone()

    def ours() -> tuple[Tensor, ...]:  # the backward may overwrite the gradient it is given
        y = block_diagonal.gather_rotate(x_plain, perm, G_plain)
        return y, *block_diagonal.gather_rotate_backward(x_plain, perm, G_plain, scratch, True)

    def naive() -> tuple[Tensor, ...]:
        y = torch.einsum("nkb,kbc->nkc", x[:, index].unflatten(1, (blocks, width)), G).flatten(1)
        return y, *torch.autograd.grad(y, [x, G], g)

    _compare("gather + block product", ours(), naive(), dtype)
    return {"ours": ours, "naive": naive}


def _compare(operator: str, ours: Sequence[Tensor], naive: Sequence[Tensor], dtype: torch.dtype) -> None:
    for number, (got, want) in enumerate(zip(ours, naive, strict=True)):
        gate(f"{operator}, {'output' if number == 0 else f'gradient {number}'}", got, want.float(), dtype)
