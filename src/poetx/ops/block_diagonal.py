"""Permutations of features and block-diagonal products: the moves on either side of the big product.

Every function goes over the tokens in slices that fit a cache (or, on an accelerator, bound the temporary), so
that no permuted copy of a whole activation exists and each slice is still near when its next use comes. Products are
cuBLAS's on a GPU (strided views of the blocks, no copy: faster there than kernels of our own were), permutations a
Triton kernel's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from poetx.ops.dispatch import use_triton
from poetx.ops.library import device_type

#: Bytes of one slice of activations. 2 MiB is the L2 cache of one current server core.
_SLICE_BYTES = {"cpu": 2 << 20}
_SLICE_BYTES_ELSEWHERE = 256 << 20
#: Bytes of activations that one outer product on a CPU takes at a time: 128 tokens of 1024 float32, or 64 of 2048,
#: are best, twice as many half as fast.
_OUTER_BYTES = 512 << 10
#: Blocks up to this size are outer products that gain nothing from that.
_SMALL_BLOCK = 64


def slices(x_NF: Tensor) -> Iterator[slice]:
    """Ranges of rows whose features fit a cache (on an accelerator: bound a temporary)."""
    budget = _SLICE_BYTES.get(device_type(x_NF), _SLICE_BYTES_ELSEWHERE)
    rows = max(64, budget // max(1, x_NF.shape[1] * x_NF.element_size()))
    return (slice(start, start + rows) for start in range(0, x_NF.shape[0], rows))


def gather(x_NF: Tensor, perm: Tensor, out: Tensor | None = None) -> Tensor:
    """``x[:, perm]``, contiguous, or written into ``out``; ``perm`` may name any columns, a permutation is fastest."""
    if x_NF.is_cpu:
        # 4x faster than index_select in bfloat16, 15 % in float32 (2 cores, 1024 x 1024).
        return torch.gather(x_NF, 1, perm.long().expand(x_NF.shape[0], -1), out=out)
    if use_triton(x_NF):
        from poetx.ops.triton.permute import can_permute, permute

        if can_permute(x_NF, perm):
            return permute(x_NF, perm, out)
    return torch.index_select(x_NF, 1, perm, out=out)


def inverse(perm: Tensor) -> Tensor:
    """The permutation that undoes ``perm``, same dtype."""
    if perm.is_cuda and use_triton(perm, dtypes=(perm.dtype,)):
        from poetx.ops.triton import permute

        return permute.inverse(perm)
    return torch.zeros_like(perm).scatter_(  # an index that is missing must not be read from what was there before
        0, perm.long(), torch.arange(perm.numel(), dtype=perm.dtype, device=perm.device)
    )


def is_permutation(perm: Tensor) -> bool:
    """Whether every index comes once; on the meta device, True."""
    return perm.is_meta or torch.equal(perm.long().sort().values, torch.arange(len(perm), device=perm.device))


def _split(x_NF: Tensor, block_size: int) -> tuple[Tensor, Tensor | None]:
    """The full blocks of x as a view [K, N, B], and the ragged rest as a view [N, F mod B], if there is one."""
    full, rest = divmod(x_NF.shape[1], block_size)
    if not rest:
        return x_NF.view(x_NF.shape[0], full, block_size).transpose(0, 1), None
    head = x_NF[:, : full * block_size].unflatten(1, (full, block_size)).transpose(0, 1)
    return head, x_NF[:, full * block_size :]


def rotate(x_NF: Tensor, G_KBB: Tensor, out: Tensor | None = None) -> Tensor:
    """``x · Diag(G_1 … G_K)``. x [N, F], (K−1)·B < F ≤ K·B → [N, F]; the last block is cut where F ends."""
    out = torch.empty_like(x_NF, memory_format=torch.contiguous_format) if out is None else out
    block_size = G_KBB.shape[-1]
    head, tail = _split(x_NF, block_size)
    head_out, tail_out = _split(out, block_size)
    if head.shape[0]:
        torch.bmm(head, G_KBB[: head.shape[0]], out=head_out)
    if tail is not None:
        rest = tail.shape[1]
        torch.mm(tail, G_KBB[-1, :rest, :rest], out=tail_out)
    return out


def left_rotate(W_FC: Tensor, G_KBB: Tensor, *, plus: bool = False) -> Tensor:
    """``Diag(G_1 … G_K) · W`` along the rows of W [F, C], cut where F ends; ``plus`` W itself; differentiable."""
    block_size = G_KBB.shape[-1]
    full, rest = divmod(W_FC.shape[0], block_size)
    head, tail = W_FC[: full * block_size].unflatten(0, (full, block_size)), W_FC[full * block_size :]
    G = G_KBB[:full]
    head = (torch.baddbmm(head, G, head) if plus else torch.bmm(G, head)).flatten(0, 1)
    if not rest:
        return head
    G = G_KBB[-1, :rest, :rest]
    return torch.cat([head, torch.addmm(tail, G, tail) if plus else G @ tail])


def add_block_outer_(total_KBB: Tensor, x_NF: Tensor, y_NF: Tensor) -> None:
    """``total_k += x_kᵀ · y_k`` for every block k: the gradient of the blocks in ``y = x · Diag(G)``.

    Args:
        total_KBB: [K, B, B], float32 (float64 for float64), in which the products are summed, too: only total − totalᵀ
            is used of it, a small difference. Where F ends within the last block, the rest of that block stays.
        x_NF, y_NF: [N, F].
    """
    block_size = total_KBB.shape[-1]
    head_x, tail_x = _split(x_NF, block_size)
    head_y, tail_y = _split(y_NF, block_size)
    if full := head_x.shape[0]:
        _add_matmul_(total_KBB[:full], head_x.transpose(1, 2), head_y)
    if tail_x is not None and tail_y is not None:
        rest = tail_x.shape[1]
        _add_matmul_(total_KBB[-1:, :rest, :rest], tail_x.T[None], tail_y[None])


def block_outer_products(x_NF: Tensor, y_NF: Tensor, block_size: int) -> Tensor:
    """``x_kᵀ · y_k`` for every block k, [K, B, B], float32 (float64 for float64); zero beyond a ragged end."""
    blocks, rest = divmod(x_NF.shape[1], block_size)
    dtype = torch.promote_types(x_NF.dtype, torch.float32)
    # A product that need not be cut is faster than one that adds, and takes a third of the calls.
    if not rest and x_NF.dtype == y_NF.dtype == dtype and (block_size <= _SMALL_BLOCK or device_type(x_NF) != "cpu"):
        return torch.bmm(*_outer_factors(x_NF, y_NF, block_size))
    if not rest and x_NF.dtype == y_NF.dtype and device_type(x_NF) == "cuda":
        return _wide_product(*_outer_factors(x_NF, y_NF, block_size), dtype)
    total = torch.zeros(blocks + (rest > 0), block_size, block_size, dtype=dtype, device=x_NF.device)
    add_block_outer_(total, x_NF, y_NF)
    return total


def _outer_factors(x_NF: Tensor, y_NF: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """x's blocks [K, B, N] and y's [K, N, B]: views, each by one call."""
    N, F = x_NF.shape
    (row, column), (y_row, y_column) = x_NF.stride(), y_NF.stride()
    first = x_NF.as_strided((F // block_size, block_size, N), (block_size * column, column, row))
    return first, y_NF.as_strided((F // block_size, N, block_size), (block_size * y_column, y_row, y_column))


def _wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a · b of narrow factors with sums in ``dtype``, as only CUDA has them."""
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=dtype)
    return torch.empty(*a.shape[:2], b.shape[2], dtype=dtype, device=a.device)  # planned on fake tensors: sizes alone


def _add_matmul_(total: Tensor, a: Tensor, b: Tensor) -> None:
    device = device_type(a)
    if a.dtype == total.dtype and device == "cpu":
        # Rows a power of two apart share few cache lines: a long product over them runs at a third of its speed.
        tokens = max(64, _OUTER_BYTES // (b.shape[0] * b.shape[2] * b.element_size()))
        for first, second in zip(a.split(tokens, 2), b.split(tokens, 1), strict=True):
            total.baddbmm_(first, second)
    elif a.dtype == total.dtype:
        total.baddbmm_(a, b)
    elif device == "cuda":
        total.add_(_wide_product(a, b, total.dtype))
    else:
        total.baddbmm_(a.to(total.dtype), b.to(total.dtype))


def gather_rotate(x_NF: Tensor, perm: Tensor | None, G_KBB: Tensor) -> Tensor:
    """``x[:, perm] · Diag(G)``, [N, F]; without ``perm`` of the features as they are, and nothing is gathered."""
    if perm is None:
        return rotate(x_NF, G_KBB)
    out = torch.empty_like(x_NF, memory_format=torch.contiguous_format)
    for rows in slices(x_NF):
        rotate(gather(x_NF[rows], perm), G_KBB, out=out[rows])
    return out


def rotate_scatter(x_NF: Tensor, G_KBB: Tensor, perm: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """y with ``y[:, perm] = x · Diag(G)``, [N, F], plus ``bias`` [F]."""
    if perm is None:
        out = rotate(x_NF, G_KBB)
        return out if bias is None else out.add_(bias)
    out = torch.empty_like(x_NF, memory_format=torch.contiguous_format)
    back = inverse(perm)
    for rows in slices(x_NF):
        gather(rotate(x_NF[rows], G_KBB), back, out=out[rows])
    return out if bias is None else out.add_(bias)


def _plus_outer(total_KBB: Tensor | None, x_NF: Tensor, y_NF: Tensor, block_size: int) -> Tensor:
    """``total`` with the blocks' outer products added in place; without a total, these alone."""
    if total_KBB is None:
        return block_outer_products(x_NF, y_NF, block_size)
    add_block_outer_(total_KBB, x_NF, y_NF)
    return total_KBB


def gather_rotate_backward(
    x_NF: Tensor, perm: Tensor | None, G_KBB: Tensor, grad_NF: Tensor, needs_dx: bool, *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients (dx, dG) of :func:`gather_rotate` from its input and its output's gradient.

    dG is float32 or float64; dx is empty if not needed. With ``perm``, or if told to ``overwrite``, dx takes the memory
    of the output's gradient.
    """
    Gt = G_KBB.transpose(1, 2)
    if perm is None and not overwrite:
        dG = block_outer_products(x_NF, grad_NF, G_KBB.shape[-1])
        return rotate(grad_NF, Gt) if needs_dx else x_NF.new_empty(0), dG
    dG = None if device_type(x_NF) != "cpu" and x_NF.shape[0] else zeros_like_blocks(G_KBB)
    dx = grad_NF if needs_dx else x_NF.new_empty(0)
    back = None if perm is None or not needs_dx else inverse(perm)
    for rows in slices(x_NF):
        x = x_NF[rows] if perm is None else gather(x_NF[rows], perm)
        dG = _plus_outer(dG, x, grad_NF[rows], G_KBB.shape[-1])
        if needs_dx:
            rotated = rotate(grad_NF[rows], Gt)
            dx[rows].copy_(rotated) if back is None else gather(rotated, back, out=dx[rows])
    assert dG is not None
    return dx, dG


def rotate_scatter_backward(
    x_NF: Tensor, G_KBB: Tensor, perm: Tensor | None, grad_NF: Tensor, *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients (dx, dG) of :func:`rotate_scatter` from its input, where dx may go, and its output's gradient."""
    Gt = G_KBB.transpose(1, 2)
    if perm is None:
        dG = block_outer_products(x_NF, grad_NF, G_KBB.shape[-1])
        return rotate(grad_NF, Gt, out=x_NF if overwrite else None), dG
    dG = None if device_type(x_NF) != "cpu" and x_NF.shape[0] else zeros_like_blocks(G_KBB)
    dx = x_NF if overwrite else torch.empty_like(x_NF, memory_format=torch.contiguous_format)
    for rows in slices(x_NF):
        grad = gather(grad_NF[rows], perm)
        dG = _plus_outer(dG, x_NF[rows], grad, G_KBB.shape[-1])
        rotate(grad, Gt, out=dx[rows])
    assert dG is not None
    return dx, dG


def zeros_like_blocks(G_KBB: Tensor) -> Tensor:
    """Zeros in the shape of the blocks, for :func:`add_block_outer_` to add to: float32, or float64 for float64."""
    return torch.zeros_like(G_KBB, dtype=torch.promote_types(G_KBB.dtype, torch.float32))
