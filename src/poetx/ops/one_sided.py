"""The autograd function of ``OFTLinear``: a rotation of the input before a frozen product, and what it saves.

    a = x · G;  y = a · Wᵀ (+ bias)        da = g · W;  dG = x_kᵀ da_k;  dx = da · Gᵀ

Backward wants nothing of a frozen product's input, so beside x nothing is kept, and no large product is done twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from poetx.ops import block_diagonal
from poetx.ops.cayley import cayley_blocks, cayley_blocks_backward
from poetx.ops.library import first_derivatives_only, no_transforms, operator
from poetx.ops.rebuild import rebuild
from poetx.ops.side import Side
from poetx.ops.stored import Stored, fetch


def _fake_forward(x, stored, kind, group_size, packed, block_size, order, bias):
    return x.new_empty(x.shape[0], stored[0].shape[0])


@operator(_fake_forward)
def _one_sided(
    x: Tensor,
    stored: Sequence[Tensor],
    kind: str,
    group_size: int,
    packed: Tensor,
    block_size: int,
    order: int,
    bias: Tensor | None,
) -> Tensor:
    (G,) = cayley_blocks([packed], [x.shape[1]], [block_size], order, x.dtype)
    a = block_diagonal.gather_rotate(x, None, G)
    return torch.nn.functional.linear(a, fetch(stored, kind, group_size, x.shape[1], x.dtype, x.device), bias)


def _fake_backward(g, x, stored, kind, group_size, packed, block_size, order, needs_dx):
    return x.new_empty(x.shape if needs_dx else (0,)), torch.empty_like(packed)


@operator(_fake_backward)
def _one_sided_backward(
    g: Tensor,
    x: Tensor,
    stored: Sequence[Tensor],
    kind: str,
    group_size: int,
    packed: Tensor,
    block_size: int,
    order: int,
    needs_dx: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, dq)."""
    da = g @ fetch(stored, kind, group_size, x.shape[1], x.dtype, x.device)
    squares = []
    (G,) = cayley_blocks([packed], [x.shape[1]], [block_size], order, x.dtype, squares)
    dx, dG = block_diagonal.gather_rotate_backward(x, None, G, da, needs_dx, overwrite=True)
    del da, G
    narrow = x.dtype == torch.bfloat16
    (dq,) = cayley_blocks_backward([dG], [packed], [x.shape[1]], [block_size], order, narrow, squares)
    return dx, dq


class _OneSided(torch.autograd.Function):
    """Saves x, or two factors of it that are kept anyway, and the packed parameters; weights are kept anyway."""

    @staticmethod
    def forward(ctx, x, skew, bias, settings, *tensors):
        kind, group_size, count, block_size, order = ctx.settings = settings
        stored, factors = tensors[:count], tensors[count:]
        ctx.save_for_backward(skew, *stored, *(factors or (x,)))
        ctx.like = x.shape, x.dtype
        return _one_sided(x, list(stored), kind, group_size, skew, block_size, order, bias)

    @staticmethod
    def backward(ctx, g):
        first_derivatives_only()
        kind, group_size, count, block_size, order = ctx.settings
        skew, *rest = ctx.saved_tensors
        x = rebuild(rest[count:], *ctx.like)
        weight = (rest[:count], kind, group_size)
        needs_dx, _, needs_bias = ctx.needs_input_grad[:3]
        dx, dq = _one_sided_backward(g.contiguous(), x, *weight, skew, block_size, order, needs_dx)
        dbias = g.sum(0) if needs_bias else None
        return dx if needs_dx else None, dq, dbias, *(None,) * (len(ctx.needs_input_grad) - 3)


def one_sided_linear(
    x: Tensor,
    weight: Stored,
    side: Side,
    *,
    order: int,
    bias: Tensor | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y = x · Diag(G) · Wᵀ + bias, [..., m] of x [..., n]; differentiable in x, the side's packed tensor and bias.

    Args:
        weight: W [m, n], frozen, however it is stored; fetched in x's dtype.
        side: of the input; its permutation is not used: blocks are of neighbours.
        order, factors: as of :func:`poetx.ops.linear.poet_linear`.
    """
    no_transforms()
    settings = (weight.kind, weight.group_size, len(weight.tensors), side.block_size, order)
    bias = None if bias is None else bias.to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    y = _OneSided.apply(rows, side.packed, bias, settings, *weight.tensors, *(factors or ()))
    return y.view(*x.shape[:-1], y.shape[-1])
