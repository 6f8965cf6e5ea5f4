"""Packed Q → G, the Cayley–Neumann parametrization (CNP), and its gradient.

With S = Q² (symmetric) the series factors, because Σ_{i<4} Qⁱ = (I + Q)(I + S) and
Σ_{i<8} Qⁱ = (I + Q)(I + S)(I + S²):

    order 3:  G = (I + S)(I + 2Q + S)              two products forward, three backward
    order 7:  G = (I + 2Q + S)(I + S)(I + S²)      four products forward, six backward
    exact:    G = 2(I − Q)⁻¹ − I                   one batched inverse, two products backward

Accuracy: G Gᵀ = (I − Q⁴)² for order 3, (I − Q⁸)² for order 7, so an eigenvalue pair ±iθ of Q gives singular
values 1 − θ⁴ or 1 − θ⁸.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from poetx.ops.block_diagonal import gather
from poetx.ops.dispatch import use_triton
from poetx.ops.library import cached_tensors, device_type, first_derivatives_only, operator
from poetx.ops.reference import EXACT
from poetx.ops.side import Side


def packed_size(block_size: int) -> int:
    """Entries in the strict upper triangle of one block."""
    return block_size * (block_size - 1) // 2


@dataclass(frozen=True)
class _Triangle:
    """Where things are in one B × B block, for one device.

    upper, lower [P]: flat positions of the strict upper triangle, row by row, and of what mirrors them. source [B·B]:
    for every flat position the packed entry it comes from. sign [B, B]: +1 above the diagonal, −1 below, 0 on it.
    """

    upper: Tensor
    lower: Tensor
    source: Tensor
    sign: Tensor


@cached_tensors
def _triangle(block_size: int, device: torch.device) -> _Triangle:
    # One per (size, device) for the whole process: per-layer index buffers are 0.9 GB at 8B and b=1024.
    rows, cols = torch.triu_indices(block_size, block_size, 1, device=device)
    entry = torch.zeros(block_size, block_size, dtype=torch.int64, device=device)
    entry[rows, cols] = entry[cols, rows] = torch.arange(rows.numel(), device=device)
    sign = torch.ones(block_size, block_size, device=device).triu(1)
    return _Triangle(rows * block_size + cols, cols * block_size + rows, entry.flatten(), sign - sign.T)


def unpack_skew(q_KP: Tensor, size: int, block_size: int) -> Tensor:
    """Q [K, B, B] from its strict upper triangle q [K, P], in q's dtype.

    Args:
        size: features that the K blocks rotate. Where B does not divide it, what q holds for the last block beyond
            its end is taken as zero, whatever it is: a rotation must not reach features that are not there.
    """
    if block_size == 1:
        return q_KP.new_zeros(q_KP.shape[0], 1, 1)
    triangle = _triangle(block_size, q_KP.device)
    Q_KBB = gather(q_KP, triangle.source).view(-1, block_size, block_size) * triangle.sign.to(q_KP.dtype)
    return _cut_(Q_KBB, size)


def _cut_(M_KBB: Tensor, size: int) -> Tensor:
    if rest := size % M_KBB.shape[-1]:
        M_KBB[-1, rest:] = 0
        M_KBB[-1, :, rest:] = 0
    return M_KBB


def pack_skew(M_KBB: Tensor, size: int) -> Tensor:
    """Strict upper triangle [K, P] of ``M − Mᵀ``: the gradient of q when M is that of Q."""
    block_size = M_KBB.shape[-1]
    triangle, flat = _triangle(block_size, M_KBB.device), M_KBB.reshape(-1, block_size * block_size)
    q = flat.index_select(1, triangle.upper).sub_(flat.index_select(1, triangle.lower))
    if rest := size % block_size:
        q[-1].masked_fill_(triangle.upper % block_size >= rest, 0)
    return q


def _add_identity_(M_KBB: Tensor) -> Tensor:
    M_KBB.diagonal(dim1=1, dim2=2).add_(1)
    return M_KBB


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _inverse(X_KBB: Tensor) -> Tensor:
    """Without a look at whether there is one, for which a GPU's host would wait: I − Q has one where Q is finite."""
    return torch.linalg.inv_ex(X_KBB)[0]


def cayley_forward(q_KP: Tensor, size: int, block_size: int, order: int) -> Tensor:
    """G [K, B, B] from q [K, P], computed and returned in float32 (float64 for float64 q)."""
    Q = unpack_skew(q_KP.to(_compute_dtype(q_KP)), size, block_size)
    if order == EXACT:
        G = _inverse(_add_identity_(-Q)).mul_(2)
        G.diagonal(dim1=1, dim2=2).sub_(1)
        return G
    S = torch.bmm(Q, Q)
    A = _add_identity_(S.clone())
    B = Q.mul_(2).add_(A)
    if order == 3:
        return torch.bmm(A, B)
    A = torch.baddbmm(A, torch.bmm(S, S), A)  # (I + S²)(I + S)
    return torch.bmm(B, A)


def cayley_backward(grad_G_KBB: Tensor, q_KP: Tensor, size: int, block_size: int, order: int) -> Tensor:
    """∂L/∂q [K, P] in q's dtype from Γ = ∂L/∂G; rebuilds Q and S from q, so that nobody need keep them."""
    dtype = _compute_dtype(q_KP)
    Gamma, Q = grad_G_KBB.to(dtype), unpack_skew(q_KP.to(dtype), size, block_size)
    if order == EXACT:
        Xt = _inverse(_add_identity_(-Q)).transpose(1, 2)
        return pack_skew(torch.bmm(Xt, torch.bmm(Gamma, Xt)).mul_(2), size).to(q_KP.dtype)
    S = torch.bmm(Q, Q)
    A = _add_identity_(S.clone())
    Bt = A - 2 * Q  # (I + 2Q + S)ᵀ
    if order == 3:
        dB = torch.bmm(A, Gamma)
        dS = torch.baddbmm(dB, Gamma, Bt)  # dB + dA
    else:
        C = _add_identity_(torch.bmm(S, S))
        dB = torch.bmm(torch.bmm(Gamma, A), C)
        dH = torch.bmm(Bt, Gamma)
        dC = torch.bmm(A, dH)
        dC = dC + dC.transpose(1, 2)  # C = I + S² and only the symmetric part of ∂L/∂S counts
        dS = torch.baddbmm(dB, dH, C).baddbmm_(dC, S)
    T = dS + dS.transpose(1, 2)
    return pack_skew(torch.baddbmm(dB, Q, T, beta=2, alpha=-1), size).to(q_KP.dtype)


def _kernels(packed: Sequence[Tensor], block_sizes: Sequence[int], order: int) -> ModuleType | None:
    """The Triton kernels, where every one of the packed tensors is for them."""
    missing = "the exact Cayley transform has no kernel" if order == EXACT else None
    if not all(use_triton(q, block_size, missing=missing) for q, block_size in zip(packed, block_sizes, strict=True)):
        return None
    from poetx.ops.triton import cayley as kernels

    return kernels


def _alike(packed: Sequence[Tensor], sizes: Sequence[int], block_sizes: Sequence[int]) -> bool:
    """Whether the blocks of several sides can go through as one batch: on a CPU that is half the calls."""
    whole = len(set(block_sizes)) == 1 and not any(size % block_sizes[0] for size in sizes)
    return len(packed) > 1 and whole and device_type(packed[0]) == "cpu" and len({q.dtype for q in packed}) == 1


def _fake_blocks(packed, sizes, block_sizes, order, dtype):
    return [q.new_empty((q.shape[0], b, b), dtype=dtype) for q, b in zip(packed, block_sizes, strict=True)]


def _fake_blocks_backward(grads, packed, sizes, block_sizes, order, narrow):
    return [torch.empty_like(q) for q in packed]


@operator(_fake_blocks)
def _cayley(
    packed: Sequence[Tensor], sizes: Sequence[int], block_sizes: Sequence[int], order: int, dtype: torch.dtype
) -> list[Tensor]:
    return cayley_blocks(packed, sizes, block_sizes, order, dtype)


def cayley_blocks(
    packed: Sequence[Tensor],
    sizes: Sequence[int],
    block_sizes: Sequence[int],
    order: int,
    dtype: torch.dtype,
    squares: list[Tensor] | None = None,
) -> list[Tensor]:
    """Blocks G [K, B, B] of one or two sides, rounded to ``dtype`` once; not differentiable.

    Args:
        squares: a list that kernels put Q, S and S + 2Q of each into, for :func:`cayley_blocks_backward` of the same
            rotations.
    """
    if kernels := _kernels(packed, block_sizes, order):
        if len(set(block_sizes)) == 1:
            return kernels.cayley(packed, sizes, block_sizes[0], order, dtype, squares)
        each = zip(packed, sizes, block_sizes, strict=True)
        return [kernels.cayley([q], [size], block_size, order, dtype, squares)[0] for q, size, block_size in each]
    if _alike(packed, sizes, block_sizes):
        G = cayley_forward(torch.cat(list(packed)), sum(sizes), block_sizes[0], order).to(dtype)
        # An operator's outputs must not share memory.
        return [part.clone() for part in G.split([len(q) for q in packed])]
    each = zip(packed, sizes, block_sizes, strict=True)
    return [cayley_forward(q, size, block_size, order).to(dtype) for q, size, block_size in each]


@operator(_fake_blocks_backward)
def _cayley_backward(
    grads: Sequence[Tensor],
    packed: Sequence[Tensor],
    sizes: Sequence[int],
    block_sizes: Sequence[int],
    order: int,
    narrow: bool,
) -> list[Tensor]:
    return cayley_blocks_backward(grads, packed, sizes, block_sizes, order, narrow)


def cayley_blocks_backward(
    grads: Sequence[Tensor],
    packed: Sequence[Tensor],
    sizes: Sequence[int],
    block_sizes: Sequence[int],
    order: int,
    narrow: bool,
    squares: Sequence[Tensor] = (),
) -> list[Tensor]:
    """∂L/∂q of every side in its q's dtype, from the float32 (float64) gradients of the blocks.

    ``narrow``: the activations behind them are bfloat16, so that a GPU's TF32 products lose nothing.
    """
    if kernels := _kernels(packed, block_sizes, order):
        if len(set(block_sizes)) == 1:
            return kernels.cayley_backward(grads, packed, sizes, block_sizes[0], order, narrow, squares)
        kept = [squares[start : start + 3] for start in range(0, 3 * len(packed), 3)]
        each = zip(grads, packed, sizes, block_sizes, kept, strict=True)
        return [kernels.cayley_backward([dG], [q], [size], b, order, narrow, QS)[0] for dG, q, size, b, QS in each]
    if _alike(packed, sizes, block_sizes):
        dq = cayley_backward(torch.cat(list(grads)), torch.cat(list(packed)), sum(sizes), block_sizes[0], order)
        return [part.clone() for part in dq.split([len(q) for q in packed])]
    each = zip(grads, packed, sizes, block_sizes, strict=True)
    return [cayley_backward(dG, q, size, block_size, order) for dG, q, size, block_size in each]


class _Blocks(torch.autograd.Function):
    """Saves the packed q, nothing else."""

    @staticmethod
    def forward(ctx, q_KP, size, block_size, order):
        ctx.save_for_backward(q_KP)
        ctx.settings = ([size], [block_size], order)
        return _cayley([q_KP], *ctx.settings, _compute_dtype(q_KP))[0]

    @staticmethod
    def backward(ctx, grad_G):
        first_derivatives_only()
        return _cayley_backward([grad_G], list(ctx.saved_tensors), *ctx.settings, False)[0], None, None, None


def cayley(q_KP: Tensor, *, size: int, block_size: int, order: int) -> Tensor:
    """Orthogonal blocks G [K, B, B] (float32, or float64) of packed q [K, P]; differentiable, saves q only.

    Args:
        size: features that the blocks rotate, (K−1)·B < size ≤ K·B.
        order: 3 or 7, the truncation of the Neumann series, or :data:`EXACT`.
    """
    return _Blocks.apply(q_KP, size, block_size, order)


def side_blocks(sides: Sequence[Side], order: int, dtype: torch.dtype) -> list[Tensor]:
    """:func:`cayley_blocks` of sides, by the registered operator."""
    packed, _, sizes, block_sizes = zip(*sides, strict=True)
    return _cayley(list(packed), list(sizes), list(block_sizes), order, dtype)


def side_blocks_backward(
    grads: Sequence[Tensor], sides: Sequence[Side], order: int, dtype: torch.dtype
) -> list[Tensor]:
    """:func:`cayley_blocks_backward` of sides, by the registered operator; ``dtype`` is the activations'."""
    packed, _, sizes, block_sizes = zip(*sides, strict=True)
    narrow = dtype == torch.bfloat16
    return _cayley_backward(list(grads), list(packed), list(sizes), list(block_sizes), order, narrow)


#: Float32 that the kernels may hold while they make gradients of blocks in one batch, bytes; six matrices a block.
_SCRATCH = 5 * 2**27


def _batches(sides: Sequence[Side]) -> list[list[int]]:
    """Which sides can go through together: blocks of one size, all of them whole, no more than the scratch allows."""
    batches: list[list[int]] = []
    last: dict[Any, tuple[list[int], int]] = {}
    for number, (packed, _, size, block_size) in enumerate(sides):
        kind = (block_size, packed.dtype)
        batch, bytes = last.get(kind, ([], 0))
        mine = 24 * len(packed) * block_size**2
        if size % block_size or not batch or bytes + mine > _SCRATCH:
            batch, bytes = [], 0
            batches.append(batch)
        batch.append(number)
        if size % block_size == 0:
            last[kind] = batch, bytes + mine
    return batches


def many_blocks(sides: Sequence[Side], order: int, dtype: torch.dtype) -> list[Tensor]:
    """:func:`side_blocks` of the sides of many layers, by the launches of one: views of a few tensors."""
    blocks: dict[int, Tensor] = {}
    for batch in _batches(sides):
        packed, size, block_size = _joined(sides, batch)
        (G,) = _cayley([packed], [size], [block_size], order, dtype)
        blocks |= zip(batch, G.split([len(sides[number].packed) for number in batch]), strict=True)
    return [blocks[number] for number in range(len(sides))]


def many_blocks_backward(
    grads: Sequence[Tensor], sides: Sequence[Side], order: int, dtype: torch.dtype
) -> list[Tensor]:
    """:func:`side_blocks_backward` of the sides of many layers; views of a few tensors."""
    found: dict[int, Tensor] = {}
    for batch in _batches(sides):
        packed, size, block_size = _joined(sides, batch)
        dG = _cat([grads[number] for number in batch])
        (dq,) = _cayley_backward([dG], [packed], [size], [block_size], order, dtype == torch.bfloat16)
        found |= zip(batch, dq.split([len(sides[number].packed) for number in batch]), strict=True)
    return [found[number] for number in range(len(sides))]


def _joined(sides: Sequence[Side], batch: Sequence[int]) -> tuple[Tensor, int, int]:
    """(packed, size, block size) of sides as if they were one."""
    each = [sides[number] for number in batch]
    return _cat([side.packed for side in each]), sum(side.size for side in each), each[0].block_size


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def cayley_delta(q_KP: Tensor, *, size: int, block_size: int, order: int = EXACT) -> Tensor:
    """E = G − I [K, B, B], without the rounding that forming G first would cost: what a fold adds to a weight.

    Exact: E = 2Q(I − Q)⁻¹. Series: E = 2Q + 2S + 2QS + S² for order 3. Float32, or float64 for float64 q.
    """
    Q = unpack_skew(q_KP.to(_compute_dtype(q_KP)), size, block_size)
    if order == EXACT:
        return exact_delta(Q)
    S = torch.bmm(Q, Q)
    E = torch.baddbmm(2 * (Q + S), S, 2 * Q + S)
    if order == 7:  # (I + E₃)(I + S²) − I
        F = torch.bmm(S, S)
        E = torch.baddbmm(E + F, E, F)
    return E


def exact_delta(Q_KBB: Tensor, bound: float = math.inf) -> Tensor:
    """E = G − I = 2Q(I − Q)⁻¹ to the last bits of Q's dtype, [K, B, B].

    Args:
        bound: no singular value of Q is larger. Well below 1 the inverse is the product Π (I + Q^(2^i)) cut where its
            next factor rounds to the identity: a few products, where a solve of small blocks is slow.
    """
    eps = torch.finfo(Q_KBB.dtype).eps / 8
    if bound > 0.6:
        return torch.linalg.solve(_add_identity_(-Q_KBB), 2 * Q_KBB)
    power = torch.bmm(Q_KBB, Q_KBB)
    E = Q_KBB + power
    bound *= bound
    while bound > eps:
        E = torch.baddbmm(E, power, E)
        bound *= bound
        if bound > eps:
            power = torch.bmm(power, power)
    return E.mul_(2)
