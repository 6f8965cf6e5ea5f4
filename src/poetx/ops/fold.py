"""Folding rotations into a weight without losing its spectrum.

R = I + E is applied as ``W + E·W`` in float32 (float64 for float64), never with R itself in a narrow dtype: in
bfloat16 the diagonal 1 − 2‖q‖² rounds to 1 and the weight's norm drifts by +19 % or −32 % in 300 merges.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from poetx.ops.cayley import cayley_delta, unpack_skew
from poetx.ops.reference import EXACT


@contextlib.contextmanager
def full_precision_products() -> Iterator[None]:
    """Products of float32 in float32, whatever torch's precision settings and autocast say."""
    # The settings behind both of torch's interfaces: reading the older one raises once the newer has been used.
    homes: list[Any] = [torch.backends.cuda, torch.backends.mkldnn]
    backends = [home.matmul for home in homes]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def left_rotate(W_FC: Tensor, E_KBB: Tensor) -> Tensor:
    """``W + Diag(E_1 … E_K)ᵀ · W`` along the rows of W [F, C]; the last block is cut where F ends."""
    block_size = E_KBB.shape[-1]
    full = W_FC.shape[0] // block_size
    head = W_FC[: full * block_size].unflatten(0, (full, block_size))
    head = torch.baddbmm(head, E_KBB[:full].transpose(1, 2), head).flatten(0, 1)
    rest = W_FC[full * block_size :]
    if not rest.shape[0]:
        return head
    E = E_KBB[-1, : rest.shape[0], : rest.shape[0]]
    return torch.cat([head, torch.addmm(rest, E.T, rest)])


def fold(
    weight: Tensor,
    q_in: Tensor,
    q_out: Tensor,
    *,
    block_size_in: int,
    block_size_out: int,
    order: int = EXACT,
) -> Tensor:
    """``G_outᵀ · W' · G_inᵀ`` [m, n] in float32, or float64 if the weight or a q is; differentiable in q.

    Args:
        weight: W' [m, n], with the permutations already in it.
        order: of the parametrization. Merging takes :data:`EXACT`, whose factors are orthogonal to the last bit
            but a few; the training order gives the weight that forward acts with.
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, q_in.dtype), torch.float32)
    with full_precision_products():
        m, n = weight.shape
        E_in = cayley_delta(q_in.to(dtype), size=n, block_size=block_size_in, order=order)
        W = left_rotate(weight.to(dtype).T, E_in.transpose(1, 2)).T
        del E_in
        return left_rotate(W, cayley_delta(q_out.to(dtype), size=m, block_size=block_size_out, order=order))


def stochastic_round_(target: Tensor, value: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Write ``value`` (float32) into ``target``, rounding up or down at random in proportion to the distance.

    Unbiased, so that moves smaller than half a unit in the last place are not lost on the way. ``target`` of
    float32 or float64 takes the plain value; bfloat16 is rounded by its low 16 bits; float16 is not supported.
    Without a ``generator`` the noise comes from the device's global one.
    """
    if target.dtype != torch.bfloat16:
        return target.copy_(value)
    value = value.float().contiguous()
    bits = value.view(torch.int32)
    # Four numbers a draw. Signed ones, so the middle is added, too; they need half the memory and draws of int32.
    draws = torch.empty((bits.numel() + 3) // 4, dtype=torch.int64, device=bits.device)
    noise = draws.random_(-(1 << 63), None, generator=generator).view(torch.int16)[: bits.numel()].view(bits.shape)
    # Adding to the magnitude's low half carries into the kept half with the right probability; the mask then
    # truncates. Works for either sign, because the sign bit stands apart from the magnitude, and keeps infinities.
    rounded = bits.add(noise).add_(1 << 15).bitwise_and_(-(1 << 16)).view(torch.float32)
    return target.copy_(torch.where(value == value, rounded, value))  # a NaN could carry into its sign


def largest_angle(q_KP: Tensor, *, size: int, block_size: int, iterations: int = 16) -> Tensor:
    """θ, the largest |eigenvalue| over all blocks of Q: 16 power iterations on QᵀQ, float32 scalar.

    A lower bound, in practice within a few per cent, for the price of a few matrix-vector products: a spectral
    decomposition of every block would take longer than the merge it watches over.
    """
    Q = unpack_skew(q_KP.float(), size, block_size)
    # Any fixed vector will do that is not by construction orthogonal to the leading pair.
    v = torch.arange(1, block_size + 1, dtype=Q.dtype, device=Q.device).mul_(math.e).frac_().sub_(0.5)
    v = v.expand(Q.shape[0], -1).unsqueeze(2)
    theta = Q.new_zeros(Q.shape[0])
    for _ in range(iterations):
        v = torch.bmm(Q, v / v.norm(dim=1, keepdim=True).clamp_min(1e-30))
        theta = v.norm(dim=1).squeeze(1)
    return theta.max()


def split_bits(value: Tensor) -> tuple[Tensor, Tensor]:
    """float32 → (bfloat16 rounded to nearest, int8 residual): the upper 24 bits in 3 bytes.

    The residual counts steps of 2⁻⁸ of a bfloat16 unit in the last place, so that :func:`join_bits` is within 2⁻¹⁶
    of the value, relative, and splitting what it returns gives the same pair again.
    """
    bits = value.float().contiguous().view(torch.int32)
    high = bits.add(1 << 15) >> 16
    low = (bits - (high << 16)) >> 8
    return (high << 16).view(torch.float32).bfloat16(), low.to(torch.int8)


def join_bits(high: Tensor, low: Tensor) -> Tensor:
    """The float32 that :func:`split_bits` took apart, up to its last byte, which becomes its middle."""
    bits = high.float().contiguous().view(torch.int32)
    return (bits + (low.to(torch.int32) << 8) + (1 << 7)).view(torch.float32)
