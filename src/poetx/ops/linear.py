"""The layer's autograd, *fast* and *mem*, from the input to the output before anybody else sees it.

With W' = W[perm_out][:, perm_in] and rows as tokens (method, section 2):

    x' = x[:, perm_in];  a = x' · G_in;  b = a · W'ᵀ;  z' = b · G_out;  y[:, perm_out] = z';  y += bias

    g' = g[:, perm_out];  dG_out = b_kᵀ g'_k;  db = g' · G_outᵀ;  da = db · W'
    dG_in = x'_kᵀ da_k;   dx' = da · G_inᵀ;    dx[:, perm_in] = dx'

There is no product of size tokens × out_features × in_features for a weight gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from poetx.ops.block_diagonal import (
    gather_rotate,
    gather_rotate_backward,
    rotate_scatter,
    rotate_scatter_backward,
)
from poetx.ops.cayley import cayley_pair, cayley_pair_backward, cayley_pair_backward_op, cayley_pair_op
from poetx.ops.library import first_derivatives_only, register_op
from poetx.ops.rebuild import rebuild


def _product(x: Tensor, weight: Tensor, G_in: Tensor, perm_in: Tensor) -> Tensor:
    """b = x[:, perm_in] · G_in · W'ᵀ, [N, m] in x's dtype."""
    return gather_rotate(x, perm_in, G_in) @ weight.to(x.dtype).T


def _backward(g, x, b, weight, G_in, G_out, perm_in, perm_out, needs_dx):
    """(dx, dG_in, dG_out); dx is empty when nobody needs it."""
    db, dG_out = rotate_scatter_backward(b, G_out, perm_out, g)
    da = db @ weight.to(g.dtype)
    del db
    dx, dG_in = gather_rotate_backward(x, perm_in, G_in, da, needs_dx)
    return dx, dG_in, dG_out


def _fast_forward(x, weight, G_in, G_out, perm_in, perm_out, bias):
    b = _product(x, weight, G_in, perm_in)
    return rotate_scatter(b, G_out, perm_out, bias), b


def _fake_fast_forward(x, weight, G_in, G_out, perm_in, perm_out, bias):
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


def _fake_fast_backward(g, x, b, weight, G_in, G_out, perm_in, perm_out, needs_dx):
    dtype = torch.promote_types(x.dtype, torch.float32)
    dx = x.new_empty(x.shape if needs_dx else (0,))
    return dx, torch.empty_like(G_in, dtype=dtype), torch.empty_like(G_out, dtype=dtype)


_fast_forward_op = register_op(
    "linear_fast(Tensor x, Tensor weight, Tensor G_in, Tensor G_out, Tensor perm_in, Tensor perm_out, "
    "Tensor? bias) -> (Tensor, Tensor)",
    _fake_fast_forward,
)(_fast_forward)
_fast_backward_op = register_op(
    "linear_fast_backward(Tensor g, Tensor x, Tensor b, Tensor weight, Tensor G_in, Tensor G_out, "
    "Tensor perm_in, Tensor perm_out, bool needs_dx) -> (Tensor, Tensor, Tensor)",
    _fake_fast_backward,
)(_backward)


def _mem_forward(x, weight, q_in, q_out, perm_in, perm_out, bias, block_size_in: int, block_size_out: int, order: int):
    m, n = weight.shape
    G_in, G_out = cayley_pair(q_in, q_out, n, m, block_size_in, block_size_out, order, x.dtype)
    b = _product(x, weight, G_in, perm_in)
    del G_in
    return rotate_scatter(b, G_out, perm_out, bias)


def _mem_backward(
    g,
    x,
    weight,
    q_in,
    q_out,
    perm_in,
    perm_out,
    block_size_in: int,
    block_size_out: int,
    order: int,
    needs_dx: bool,
):
    m, n = weight.shape
    settings = (n, m, block_size_in, block_size_out, order)
    G_in, G_out = cayley_pair(q_in, q_out, *settings, x.dtype)
    # One buffer [N, m] for b and db, gone before dx is made.
    db, dG_out = rotate_scatter_backward(_product(x, weight, G_in, perm_in), G_out, perm_out, g, overwrite=True)
    da = db @ weight.to(g.dtype)
    del db, G_out
    dx, dG_in = gather_rotate_backward(x, perm_in, G_in, da, needs_dx)
    del da, G_in
    return dx, *cayley_pair_backward(dG_in, dG_out, q_in, q_out, *settings, x.dtype)


def _fake_mem_forward(
    x, weight, q_in, q_out, perm_in, perm_out, bias, block_size_in: int, block_size_out: int, order: int
):
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_mem_backward(
    g,
    x,
    weight,
    q_in,
    q_out,
    perm_in,
    perm_out,
    block_size_in: int,
    block_size_out: int,
    order: int,
    needs_dx: bool,
):
    return x.new_empty(x.shape if needs_dx else (0,)), torch.empty_like(q_in), torch.empty_like(q_out)


_mem_forward_op = register_op(
    "linear_mem(Tensor x, Tensor weight, Tensor q_in, Tensor q_out, Tensor perm_in, Tensor perm_out, "
    "Tensor? bias, int block_size_in, int block_size_out, int order) -> Tensor",
    _fake_mem_forward,
)(_mem_forward)
_mem_backward_op = register_op(
    "linear_mem_backward(Tensor g, Tensor x, Tensor weight, Tensor q_in, Tensor q_out, Tensor perm_in, "
    "Tensor perm_out, int block_size_in, int block_size_out, int order, bool needs_dx) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_mem_backward,
)(_mem_backward)


class _FastLinear(torch.autograd.Function):
    """Saves x, b = a · W'ᵀ [N, m], G_in and G_out in x's dtype; weight, q and permutations are kept anyway."""

    @staticmethod
    def forward(ctx, x, weight, q_in, q_out, perm_in, perm_out, bias, block_size_in, block_size_out, order, *blocks):
        m, n = weight.shape
        ctx.settings = (n, m, block_size_in, block_size_out, order)
        G_in, G_out = blocks or cayley_pair_op(q_in, q_out, *ctx.settings, x.dtype)
        y, b = _fast_forward_op(x, weight, G_in, G_out, perm_in, perm_out, bias)
        ctx.save_for_backward(x, b, weight, G_in, G_out, q_in, q_out, perm_in, perm_out)
        return y

    @staticmethod
    def backward(ctx, g):
        first_derivatives_only()
        x, b, weight, G_in, G_out, q_in, q_out, perm_in, perm_out = ctx.saved_tensors
        dx, dG_in, dG_out = _fast_backward_op(g, x, b, weight, G_in, G_out, perm_in, perm_out, ctx.needs_input_grad[0])
        dq_in, dq_out = cayley_pair_backward_op(dG_in, dG_out, q_in, q_out, *ctx.settings, x.dtype)
        dbias = g.sum(0) if ctx.needs_input_grad[6] else None
        dx = dx if ctx.needs_input_grad[0] else None
        return dx, None, dq_in, dq_out, None, None, dbias, *(None,) * (len(ctx.needs_input_grad) - 7)


class _MemLinear(torch.autograd.Function):
    """Saves x, or two factors of it that are kept anyway, and the packed parameters. Rebuilds x, G, a and b.

    Weight and permutations are kept anyway, too.
    """

    @staticmethod
    def forward(ctx, x, weight, q_in, q_out, perm_in, perm_out, bias, block_size_in, block_size_out, order, *factors):
        ctx.save_for_backward(weight, q_in, q_out, perm_in, perm_out, *(factors or (x,)))
        ctx.settings, ctx.like = (block_size_in, block_size_out, order), (x.shape, x.dtype)
        return _mem_forward_op(x, weight, q_in, q_out, perm_in, perm_out, bias, block_size_in, block_size_out, order)

    @staticmethod
    def backward(ctx, g):
        first_derivatives_only()
        weight, q_in, q_out, perm_in, perm_out, *kept = ctx.saved_tensors
        x = rebuild(kept, *ctx.like)
        del kept
        dx, dq_in, dq_out = _mem_backward_op(
            g, x, weight, q_in, q_out, perm_in, perm_out, *ctx.settings, ctx.needs_input_grad[0]
        )
        dbias = g.sum(0) if ctx.needs_input_grad[6] else None
        dx = dx if ctx.needs_input_grad[0] else None
        return dx, None, dq_in, dq_out, None, None, dbias, *(None,) * (len(ctx.needs_input_grad) - 7)


def poet_linear(
    x: Tensor,
    weight: Tensor,
    q_in: Tensor,
    q_out: Tensor,
    perm_in: Tensor,
    perm_out: Tensor,
    *,
    block_size_in: int,
    block_size_out: int,
    order: int,
    mode: str,
    bias: Tensor | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
    blocks: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y [..., m] of x [..., n] through the rotated weight; differentiable in x, q_in, q_out and bias.

    Args:
        x: float32, bfloat16 or float64; every product but those of the CNP runs in this dtype.
        weight: W' = W[perm_out][:, perm_in], [m, n], frozen; cast to x's dtype where it differs.
        q_in, q_out: packed skew blocks, [⌈n / block_size_in⌉, P] and [⌈m / block_size_out⌉, P].
        perm_in, perm_out: int32 permutations [n] and [m].
        order: 3, 7, or :data:`poetx.ops.reference.EXACT`.
        mode: ``"fast"`` saves x, b [N, m] and the blocks G; ``"mem"`` saves x and the packed parameters.
        factors: two tensors whose product, cast to x's dtype, is x: *mem* saves them in place of x.
        blocks: (G_in, G_out) in x's dtype as :func:`poetx.ops.cayley.cayley_pair` makes them from q; *fast* uses them
            as they are and differentiates through q all the same.
    """
    x_NF = x.reshape(-1, x.shape[-1])
    bias = None if bias is None else bias.to(x.dtype)
    settings = (block_size_in, block_size_out, order)
    if mode == "mem":
        y = _MemLinear.apply(x_NF, weight, q_in, q_out, perm_in, perm_out, bias, *settings, *(factors or ()))
    else:
        y = _FastLinear.apply(x_NF, weight, q_in, q_out, perm_in, perm_out, bias, *settings, *(blocks or ()))
    return y.view(*x.shape[:-1], weight.shape[0])
