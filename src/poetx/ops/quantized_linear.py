"""The layer over a quantized base (XQ): *mem*, with W' dequantized inside forward and again inside backward.

Between the two nothing in high precision of W's size is alive; during either one layer's W' is, in x's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from poetx.ops import linear
from poetx.ops.library import first_derivatives_only, register_op
from poetx.ops.quantize import Packed, dequantize, format_of
from poetx.ops.rebuild import rebuild

_STORED = "Tensor codes, Tensor scale, Tensor? offset, str weight_format, int group_size"
_ROTATIONS = "Tensor q_in, Tensor q_out, Tensor perm_in, Tensor perm_out"
_SIZES = "int block_size_in, int block_size_out, int order"


def _packed(codes, scale, offset, weight_format: str, group_size: int, perm_in: Tensor) -> Packed:
    return Packed(codes, scale, offset, perm_in.shape[0], format_of(weight_format), group_size)


def _forward(x, codes, scale, offset, weight_format, group_size, q_in, q_out, perm_in, perm_out, bias, *sizes):
    packed = _packed(codes, scale, offset, weight_format, group_size, perm_in)
    return linear._mem_forward(x, dequantize(packed, x.dtype), q_in, q_out, perm_in, perm_out, bias, *sizes)


def _backward(g, x, codes, scale, offset, weight_format, group_size, q_in, q_out, perm_in, perm_out, *settings):
    weight = dequantize(_packed(codes, scale, offset, weight_format, group_size, perm_in), x.dtype)
    return linear._mem_backward(g, x, weight, q_in, q_out, perm_in, perm_out, *settings)


def _fake_forward(x, codes, *rest):
    return x.new_empty(x.shape[0], codes.shape[0])


def _fake_backward(g, x, codes, scale, offset, weight_format, group_size, q_in, q_out, perm_in, perm_out, *settings):
    return x.new_empty(x.shape if settings[-1] else (0,)), torch.empty_like(q_in), torch.empty_like(q_out)


_forward_op = register_op(
    f"linear_quantized(Tensor x, {_STORED}, {_ROTATIONS}, Tensor? bias, {_SIZES}) -> Tensor", _fake_forward
)(_forward)
_backward_op = register_op(
    f"linear_quantized_backward(Tensor g, Tensor x, {_STORED}, {_ROTATIONS}, {_SIZES}, bool needs_dx) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_backward,
)(_backward)


class _QuantizedLinear(torch.autograd.Function):
    """Saves x, or two factors of it that are kept anyway, and the packed parameters. Rebuilds x, W', G, a and b.

    Codes, scales and permutations are kept anyway, too.
    """

    @staticmethod
    def forward(ctx, x, codes, scale, offset, q_in, q_out, perm_in, perm_out, bias, stored, sizes, *factors):
        ctx.save_for_backward(codes, scale, offset, q_in, q_out, perm_in, perm_out, *(factors or (x,)))
        ctx.stored, ctx.sizes, ctx.like = stored, sizes, (x.shape, x.dtype)
        return _forward_op(x, codes, scale, offset, *stored, q_in, q_out, perm_in, perm_out, bias, *sizes)

    @staticmethod
    def backward(ctx, g):
        first_derivatives_only()
        codes, scale, offset, q_in, q_out, perm_in, perm_out, *kept = ctx.saved_tensors
        x = rebuild(kept, *ctx.like)
        del kept
        dx, dq_in, dq_out = _backward_op(
            g,
            x,
            codes,
            scale,
            offset,
            *ctx.stored,
            q_in,
            q_out,
            perm_in,
            perm_out,
            *ctx.sizes,
            ctx.needs_input_grad[0],
        )
        dbias = g.sum(0) if ctx.needs_input_grad[8] else None
        dx = dx if ctx.needs_input_grad[0] else None
        return dx, None, None, None, dq_in, dq_out, None, None, dbias, *(None,) * (len(ctx.needs_input_grad) - 9)


def quantized_linear(
    x: Tensor,
    weight: Packed,
    q_in: Tensor,
    q_out: Tensor,
    perm_in: Tensor,
    perm_out: Tensor,
    *,
    block_size_in: int,
    block_size_out: int,
    order: int,
    bias: Tensor | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y [..., m] of x [..., n] through a rotated, quantized weight; differentiable in x, q_in, q_out and bias.

    As :func:`poetx.ops.linear.poet_linear` in *mem* mode, whose other arguments these are, over
    ``dequantize(weight, x.dtype)``.
    """
    x_NF = x.reshape(-1, x.shape[-1])
    bias = None if bias is None else bias.to(x.dtype)
    y = _QuantizedLinear.apply(
        x_NF,
        weight.codes,
        weight.scale,
        weight.offset,
        q_in,
        q_out,
        perm_in,
        perm_out,
        bias,
        (weight.format.name, weight.group_size),
        (block_size_in, block_size_out, order),
        *(factors or ()),
    )
    return y.view(*x.shape[:-1], weight.codes.shape[0])
