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

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poetx.ops.block_diagonal import gather
from poetx.ops.dispatch import use_triton
from poetx.ops.library import device_type, fake_cache, first_derivatives_only, register_op
from poetx.ops.reference import EXACT


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


_TRIANGLES: dict[Any, _Triangle] = {}


def _triangle(block_size: int, device: torch.device) -> _Triangle:
    # One per (size, device) for the whole process: per-layer index buffers are 0.9 GB at 8B and b=1024.
    key = (block_size, device)
    # Under a fake mode neither may its tensors outlive it, nor may real ones be mixed into it.
    faking = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    cache = fake_cache() if faking else _TRIANGLES
    if key not in cache:
        with torch.inference_mode(False):
            rows, cols = torch.triu_indices(block_size, block_size, 1, device=device)
            entry = torch.zeros(block_size, block_size, dtype=torch.int64, device=device)
            entry[rows, cols] = entry[cols, rows] = torch.arange(rows.numel(), device=device)
            sign = torch.ones(block_size, block_size, device=device).triu(1)
            triangle = _Triangle(rows * block_size + cols, cols * block_size + rows, entry.flatten(), sign - sign.T)
        if rows.is_meta and not faking:
            return triangle
        cache[key] = triangle
    return cache[key]


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


def cayley_forward(q_KP: Tensor, size: int, block_size: int, order: int) -> Tensor:
    """G [K, B, B] from q [K, P], computed and returned in float32 (float64 for float64 q)."""
    Q = unpack_skew(q_KP.to(_compute_dtype(q_KP)), size, block_size)
    if order == EXACT:
        G = torch.linalg.inv(_add_identity_(-Q)).mul_(2)
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
        Xt = torch.linalg.inv(_add_identity_(-Q)).transpose(1, 2)
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


def _fake_cayley(q_KP: Tensor, size: int, block_size: int, order: int) -> Tensor:
    return q_KP.new_empty((q_KP.shape[0], block_size, block_size), dtype=_compute_dtype(q_KP))


def _fake_cayley_backward(grad_G_KBB: Tensor, q_KP: Tensor, size: int, block_size: int, order: int) -> Tensor:
    return torch.empty_like(q_KP)


def _cayley(q_KP: Tensor, size: int, block_size: int, order: int) -> Tensor:
    if use_triton(q_KP, block_size, missing=_missing(order)):
        from poetx.ops.triton import cayley as kernels

        return kernels.cayley([q_KP], [size], block_size, order, _compute_dtype(q_KP))[0]
    return cayley_forward(q_KP, size, block_size, order)


def _cayley_backward(grad_G_KBB: Tensor, q_KP: Tensor, size: int, block_size: int, order: int) -> Tensor:
    if use_triton(q_KP, block_size, missing=_missing(order)):
        from poetx.ops.triton import cayley as kernels

        return kernels.cayley_backward([grad_G_KBB], [q_KP], [size], block_size, order, narrow=False)[0]
    return cayley_backward(grad_G_KBB, q_KP, size, block_size, order)


def _missing(order: int) -> str | None:
    """What there is no kernel for."""
    return "the exact Cayley transform has no kernel" if order == EXACT else None


_cayley_op = register_op("cayley(Tensor q, int size, int block_size, int order) -> Tensor", _fake_cayley)(_cayley)
_cayley_backward_op = register_op(
    "cayley_backward(Tensor grad_G, Tensor q, int size, int block_size, int order) -> Tensor",
    _fake_cayley_backward,
)(_cayley_backward)


class _Cayley(torch.autograd.Function):
    """Saves the packed q, nothing else."""

    @staticmethod
    def forward(ctx, q_KP, size, block_size, order):
        ctx.save_for_backward(q_KP)
        ctx.settings = (size, block_size, order)
        return _cayley_op(q_KP, size, block_size, order)

    @staticmethod
    def backward(ctx, grad_G):
        first_derivatives_only()
        (q_KP,) = ctx.saved_tensors
        return _cayley_backward_op(grad_G, q_KP, *ctx.settings), None, None, None


def cayley(q_KP: Tensor, *, size: int, block_size: int, order: int) -> Tensor:
    """Orthogonal blocks G [K, B, B] (float32, or float64) of packed q [K, P]; differentiable, saves q only.

    Args:
        size: features that the blocks rotate, (K−1)·B < size ≤ K·B.
        order: 3 or 7, the truncation of the Neumann series, or :data:`EXACT`.
    """
    return _Cayley.apply(q_KP, size, block_size, order)


def cayley_pair(
    q_in: Tensor,
    q_out: Tensor,
    n: int,
    m: int,
    block_size_in: int,
    block_size_out: int,
    order: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(G_in, G_out) of a layer with n inputs and m outputs, rounded to ``dtype`` once; not differentiable."""
    sides = ((q_in, n, block_size_in), (q_out, m, block_size_out))
    if all(use_triton(q, block_size, missing=_missing(order)) for q, _, block_size in sides):
        from poetx.ops.triton import cayley as kernels

        if block_size_in == block_size_out:
            G_in, G_out = kernels.cayley([q_in, q_out], [n, m], block_size_in, order, dtype)
        else:
            G_in, G_out = (kernels.cayley([q], [size], block_size, order, dtype)[0] for q, size, block_size in sides)
        return G_in, G_out
    if _alike(q_in, q_out, n, m, block_size_in, block_size_out):
        G = cayley_forward(torch.cat([q_in, q_out]), n + m, block_size_in, order).to(dtype)
        return G[: q_in.shape[0]].clone(), G[q_in.shape[0] :].clone()  # an operator's outputs must not share memory
    G_in, G_out = (cayley_forward(q, size, block_size, order).to(dtype) for q, size, block_size in sides)
    return G_in, G_out


def _alike(q_in: Tensor, q_out: Tensor, n: int, m: int, block_size_in: int, block_size_out: int) -> bool:
    """Whether the blocks of both sides can go through as one batch: on a CPU that is half the calls."""
    whole = block_size_in == block_size_out and n % block_size_in == 0 and m % block_size_out == 0
    return whole and device_type(q_in) == "cpu" and q_in.dtype == q_out.dtype


def cayley_pair_backward(
    dG_in: Tensor,
    dG_out: Tensor,
    q_in: Tensor,
    q_out: Tensor,
    n: int,
    m: int,
    block_size_in: int,
    block_size_out: int,
    order: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(dq_in, dq_out), each in its q's dtype, from the float32 (float64) gradients of the blocks.

    ``dtype`` is that of the activations behind them.
    """
    sides = ((dG_in, q_in, n, block_size_in), (dG_out, q_out, m, block_size_out))
    if all(use_triton(q, block_size, missing=_missing(order)) for _, q, _, block_size in sides):
        from poetx.ops.triton import cayley as kernels

        narrow = dtype == torch.bfloat16
        if block_size_in == block_size_out:
            dq_in, dq_out = kernels.cayley_backward(
                [dG_in, dG_out], [q_in, q_out], [n, m], block_size_in, order, narrow
            )
        else:
            dq_in, dq_out = (
                kernels.cayley_backward([dG], [q], [size], b, order, narrow)[0] for dG, q, size, b in sides
            )
        return dq_in, dq_out
    if _alike(q_in, q_out, n, m, block_size_in, block_size_out):
        dG, q = torch.cat([dG_in, dG_out]), torch.cat([q_in, q_out])
        dq = cayley_backward(dG, q, n + m, block_size_in, order)
        return dq[: q_in.shape[0]].clone(), dq[q_in.shape[0] :].clone()
    dq_in, dq_out = (cayley_backward(dG, q, size, block_size, order) for dG, q, size, block_size in sides)
    return dq_in, dq_out


def _fake_pair(q_in, q_out, n, m, block_size_in: int, block_size_out: int, order: int, dtype: torch.dtype):
    return (
        q_in.new_empty((q_in.shape[0], block_size_in, block_size_in), dtype=dtype),
        q_out.new_empty((q_out.shape[0], block_size_out, block_size_out), dtype=dtype),
    )


def _fake_pair_backward(dG_in, dG_out, q_in, q_out, n, m, block_size_in: int, block_size_out: int, order: int, dtype):
    return torch.empty_like(q_in), torch.empty_like(q_out)


cayley_pair_op = register_op(
    "cayley_pair(Tensor q_in, Tensor q_out, int n, int m, int block_size_in, int block_size_out, int order, "
    "ScalarType dtype) -> (Tensor, Tensor)",
    _fake_pair,
)(cayley_pair)
cayley_pair_backward_op = register_op(
    "cayley_pair_backward(Tensor dG_in, Tensor dG_out, Tensor q_in, Tensor q_out, int n, int m, int block_size_in, "
    "int block_size_out, int order, ScalarType dtype) -> (Tensor, Tensor)",
    _fake_pair_backward,
)(cayley_pair_backward)


def cayley_delta(q_KP: Tensor, *, size: int, block_size: int, order: int = EXACT) -> Tensor:
    """E = G − I [K, B, B], without the rounding that forming G first would cost: what a fold adds to a weight.

    Exact: E = 2Q(I − Q)⁻¹. Series: E = 2Q + 2S + 2QS + S² for order 3. Float32, or float64 for float64 q.
    """
    Q = unpack_skew(q_KP.to(_compute_dtype(q_KP)), size, block_size)
    if order == EXACT:
        return torch.linalg.solve(_add_identity_(-Q), 2 * Q)
    S = torch.bmm(Q, Q)
    E = torch.baddbmm(2 * (Q + S), S, 2 * Q + S)
    if order == 7:  # (I + E₃)(I + S²) − I
        F = torch.bmm(S, S)
        E = torch.baddbmm(E + F, E, F)
    return E
