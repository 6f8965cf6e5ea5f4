"""The autograd functions of ``PoetLinear``, *fast* and *mem*: from x to y, and what each saves for backward.

With W' = W[perm_out][:, perm_in] and rows as tokens:

    x' = x[:, perm_in];  a = x' · G_in;  b = a · W'ᵀ;  z' = b · G_out;  y[:, perm_out] = z';  y += bias

    g' = g[:, perm_out];  dG_out = b_kᵀ g'_k;  db = g' · G_outᵀ;  da = db · W'
    dG_in = x'_kᵀ da_k;   dx' = da · G_inᵀ;    dx[:, perm_in] = dx'

Where a side's blocks are of neighbours, or its features come or go permuted, its permutation is None, and nothing is
gathered there.

Where that is less work, the weight is rotated in place of the activations, forward and again in backward:

    V = W'·G_inᵀ;  R·W·P = U with U[perm_out][:, perm_in] = G_outᵀ·V;  y = x·Uᵀ + bias

    dx = g·U;  dU = gᵀ·x;  dU' = dU[perm_out][:, perm_in]
    dG_out = V_k dU'_kᵀ;  dV = G_out·dU';  dG_in = dV_kᵀ W'_k

Otherwise there is no product of that size for a weight gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from poetx.ops import block_diagonal
from poetx.ops.cayley import cayley_blocks, cayley_blocks_backward, side_blocks, side_blocks_backward
from poetx.ops.library import first_derivatives_only, no_transforms, operator
from poetx.ops.rebuild import rebuild
from poetx.ops.side import Sides, sides
from poetx.ops.stored import Stored, fetch
from poetx.ops.together import Taken


def _fake_fast(x, stored, kind, group_size, blocks, perm_in, perm_out, bias):
    shape = (x.shape[0], stored[0].shape[0])
    return x.new_empty(shape), x.new_empty(shape)


@operator(_fake_fast)
def _linear_fast(
    x: Tensor,
    stored: Sequence[Tensor],
    kind: str,
    group_size: int,
    blocks: Sequence[Tensor],
    perm_in: Tensor | None,
    perm_out: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, b)."""
    weight = fetch(stored, kind, group_size, x.shape[1], x.dtype, x.device)
    b = block_diagonal.gather_rotate(x, perm_in, blocks[0]) @ weight.T
    return block_diagonal.rotate_scatter(b, blocks[1], perm_out, bias), b


def _fake_fast_backward(g, x, b, stored, kind, group_size, blocks, perm_in, perm_out, needs_dx):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape if needs_dx else (0,)), *(torch.empty_like(G, dtype=dtype) for G in blocks)


@operator(_fake_fast_backward)
def _linear_fast_backward(
    g: Tensor,
    x: Tensor,
    b: Tensor,
    stored: Sequence[Tensor],
    kind: str,
    group_size: int,
    blocks: Sequence[Tensor],
    perm_in: Tensor | None,
    perm_out: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dG_in, dG_out); dx is empty when nobody needs it."""
    db, dG_out = block_diagonal.rotate_scatter_backward(b, blocks[1], perm_out, g)
    da = db @ fetch(stored, kind, group_size, x.shape[1], g.dtype, g.device)
    del db
    dx, dG_in = block_diagonal.gather_rotate_backward(x, perm_in, blocks[0], da, needs_dx)
    return dx, dG_in, dG_out


#: Operations of products with the weight that take the time of one operation of block products: fits to 20 % what small
#: layers take on a CPU and large ones on a GPU.
_BLOCK_COST = 2


def weight_is_cheaper(
    tokens: int, out_features: int, in_features: int, block_size_out: int, block_size_in: int, mode: str
) -> bool:
    """Whether rotating the weight takes less time than rotating activations.

    Multiply-adds by activations: 2Nmn and 3N(b_in·n + b_out·m) for *fast*, for *mem*, which computes b again, Nmn and
    N·b_in·n more. By the weight: 3Nmn and mn(3·b_in + 4·b_out).
    """
    N, m, n = tokens, out_features, in_features
    blocks_in, blocks_out = _BLOCK_COST * block_size_in, _BLOCK_COST * block_size_out
    by_tokens = 2 * N * m * n + 3 * N * (blocks_in * n + blocks_out * m)
    by_tokens += N * m * n + N * blocks_in * n if mode == "mem" else 0
    return 3 * N * m * n + m * n * (3 * blocks_in + 4 * blocks_out) < by_tokens


def _rotate_weight(
    weight: Tensor, blocks: Sequence[Tensor], perm_in: Tensor | None, perm_out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(V, R·W·P), each [m, n]: the latter in the native frame of a side that has a permutation."""
    V = block_diagonal.rotate(weight, blocks[0].transpose(1, 2))
    rotated = block_diagonal.left_rotate(V, blocks[1].transpose(1, 2))
    if perm_in is not None:
        rotated = block_diagonal.gather(rotated, block_diagonal.inverse(perm_in))
    if perm_out is not None:
        rotated = rotated.index_select(0, block_diagonal.inverse(perm_out))
    return V, rotated


def _fake_mem(x, stored, kind, group_size, packed, blocks, perm_in, perm_out, block_sizes, order, by_weight, bias):
    return x.new_empty(x.shape[0], stored[0].shape[0])


@operator(_fake_mem)
def _linear_mem(
    x: Tensor,
    stored: Sequence[Tensor],
    kind: str,
    group_size: int,
    packed: Sequence[Tensor],
    blocks: Sequence[Tensor],
    perm_in: Tensor | None,
    perm_out: Tensor | None,
    block_sizes: Sequence[int],
    order: int,
    by_weight: bool,
    bias: Tensor | None,
) -> Tensor:
    """y; the blocks are made of ``packed``, or else given."""
    weight = fetch(stored, kind, group_size, x.shape[1], x.dtype, x.device)
    G_in, G_out = blocks or cayley_blocks(packed, weight.shape[::-1], block_sizes, order, x.dtype)
    if by_weight:
        rotated = _rotate_weight(weight, (G_in, G_out), perm_in, perm_out)[1]
        return x @ rotated.T if bias is None else torch.addmm(bias, x, rotated.T)
    b = block_diagonal.gather_rotate(x, perm_in, G_in) @ weight.T
    del G_in, weight
    return block_diagonal.rotate_scatter(b, G_out, perm_out, bias)


def _fake_mem_backward(
    g, x, stored, kind, group_size, packed, blocks, perm_in, perm_out, block_sizes, order, by_weight, needs_dx
):
    dtype = torch.promote_types(x.dtype, torch.float32)
    grads = [torch.empty_like(G, dtype=dtype) for G in blocks] or [torch.empty_like(q) for q in packed]
    return x.new_empty(x.shape if needs_dx else (0,)), *grads


@operator(_fake_mem_backward)
def _linear_mem_backward(
    g: Tensor,
    x: Tensor,
    stored: Sequence[Tensor],
    kind: str,
    group_size: int,
    packed: Sequence[Tensor],
    blocks: Sequence[Tensor],
    perm_in: Tensor | None,
    perm_out: Tensor | None,
    block_sizes: Sequence[int],
    order: int,
    by_weight: bool,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dq_in, dq_out), or where the blocks are given (dx, dG_in, dG_out)."""
    weight = fetch(stored, kind, group_size, x.shape[1], x.dtype, x.device)
    sizes, squares = weight.shape[::-1], []
    G_in, G_out = blocks or cayley_blocks(packed, sizes, block_sizes, order, x.dtype, squares)

    def of_packed(*grads: Tensor) -> Sequence[Tensor]:
        narrow = x.dtype == torch.bfloat16
        return grads if blocks else cayley_blocks_backward(grads, packed, sizes, block_sizes, order, narrow, squares)

    if by_weight:
        V, rotated = _rotate_weight(weight, (G_in, G_out), perm_in, perm_out)
        dx = g @ rotated if needs_dx else x.new_empty(0)
        del rotated
        dU = g.T @ x
        dU = dU if perm_in is None else block_diagonal.gather(dU, perm_in)
        dU = dU if perm_out is None else dU.index_select(0, perm_out)
        dG_out = block_diagonal.block_outer_products(V.T, dU.T, block_sizes[1])
        del V
        dV = block_diagonal.left_rotate(dU, G_out)
        del dU, G_out
        dG_in = block_diagonal.block_outer_products(dV, weight, block_sizes[0])
        dq_in, dq_out = of_packed(dG_in, dG_out)
        return dx, dq_in, dq_out
    b = block_diagonal.gather_rotate(x, perm_in, G_in) @ weight.T
    # One buffer [N, m] for b and db, gone before dx is made.
    db, dG_out = block_diagonal.rotate_scatter_backward(b, G_out, perm_out, g, overwrite=True)
    da = db @ weight
    del b, db, G_out, weight
    dx, dG_in = block_diagonal.gather_rotate_backward(x, perm_in, G_in, da, needs_dx)
    del da, G_in
    dq_in, dq_out = of_packed(dG_in, dG_out)
    return dx, dq_in, dq_out


class _FastLinear(torch.autograd.Function):
    """Saves x, b = a · W'ᵀ [N, m], G_in and G_out in x's dtype; weight, q and permutations are kept anyway.

    Where blocks are made together with other layers', ``q_in`` and ``q_out`` are their handles, and ``packed`` what is
    saved. So a layer that is run again, checkpointed, saves the same number of tensors whoever makes its blocks.
    """

    @staticmethod
    def forward(ctx, x, q_in, q_out, perm_in, perm_out, bias, settings, packed, *tensors):
        kind, group_size, count, sizes, block_sizes, order = ctx.settings = settings
        stored, blocks = list(tensors[:count]), list(tensors[count:])
        if not blocks:
            blocks = side_blocks(sides([q_in, q_out], sizes, block_sizes), order, x.dtype)
        y, b = _linear_fast(x, stored, kind, group_size, blocks, perm_in, perm_out, bias)
        ctx.together = packed is not None
        ctx.save_for_backward(x, b, *(packed or (q_in, q_out)), perm_in, perm_out, *blocks, *stored)
        return y

    @staticmethod
    def backward(ctx, g):
        first_derivatives_only()
        x, b, q_in, q_out, perm_in, perm_out, G_in, G_out, *stored = ctx.saved_tensors
        kind, group_size, _, sizes, block_sizes, order = ctx.settings
        rotation = ([G_in, G_out], perm_in, perm_out)
        dx, *grads = _linear_fast_backward(g, x, b, stored, kind, group_size, *rotation, ctx.needs_input_grad[0])
        if not ctx.together:
            grads = side_blocks_backward(grads, sides([q_in, q_out], sizes, block_sizes), order, x.dtype)
        return _gradients(ctx, g, dx, *grads)


class _MemLinear(torch.autograd.Function):
    """Saves x, or two factors of it that are kept anyway, and the packed parameters. Fetches W', rebuilds x, G, a, b.

    Or U in place of a and b.

    The weight's stored tensors and the permutations are kept anyway, too: nothing else of W's size is. ``packed`` and,
    where blocks are made together, the way to have them again: as in :class:`_FastLinear`.
    """

    @staticmethod
    def forward(ctx, x, q_in, q_out, perm_in, perm_out, bias, settings, packed, *tensors):
        kind, group_size, count, block_sizes, order, by_weight, taken = settings
        stored, factors = tensors[:count], tensors[count:]
        ctx.settings, ctx.again = settings[:-1], taken and taken.again  # and not the blocks
        ctx.save_for_backward(*(packed or (q_in, q_out)), perm_in, perm_out, *stored, *(factors or (x,)))
        ctx.like = x.shape, x.dtype
        rotation = ([] if taken else [q_in, q_out], list(taken.blocks) if taken else [], perm_in, perm_out)
        return _linear_mem(x, list(stored), kind, group_size, *rotation, list(block_sizes), order, by_weight, bias)

    @staticmethod
    def backward(ctx, g):
        first_derivatives_only()
        kind, group_size, count, block_sizes, order, by_weight = ctx.settings
        q_in, q_out, perm_in, perm_out, *rest = ctx.saved_tensors
        x = rebuild(rest[count:], *ctx.like)
        stored = rest[:count]
        del rest
        rotation = ([] if ctx.again else [q_in, q_out], list(ctx.again()) if ctx.again else [], perm_in, perm_out)
        settings = (list(block_sizes), order, by_weight, ctx.needs_input_grad[0])
        return _gradients(ctx, g, *_linear_mem_backward(g, x, stored, kind, group_size, *rotation, *settings))


def _gradients(ctx, g, dx, dq_in, dq_out):
    """One for each argument of ``forward``."""
    dbias = g.sum(0) if ctx.needs_input_grad[5] else None
    dx = dx if ctx.needs_input_grad[0] else None
    return dx, dq_in, dq_out, None, None, dbias, *(None,) * (len(ctx.needs_input_grad) - 6)


def poet_linear(
    x: Tensor,
    weight: Stored,
    both: Sides,
    *,
    order: int,
    mode: str,
    bias: Tensor | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
    blocks: Sequence[Tensor] | None = None,
    take: Callable[[bool], Taken | None] = lambda again: None,
) -> Tensor:
    """y [..., m] of x [..., n] through the rotated weight; differentiable in x, both sides' packed tensors and bias.

    Args:
        x: float32, bfloat16 or float64; every product but those of the CNP runs in this dtype.
        weight: W' = W[perm_out][:, perm_in], [m, n], frozen, however it is stored; fetched in x's dtype.
        both: the sides of input and output.
        order: 3, 7, or :data:`poetx.ops.reference.EXACT`.
        mode: ``"fast"`` saves x, b [N, m] and the blocks G; ``"mem"`` saves x and the packed parameters, and so does
            either where the weight is rotated.
        factors: two tensors whose product, cast to x's dtype, is x: *mem* saves them in place of x.
        blocks: (G_in, G_out) in x's dtype as :func:`poetx.ops.cayley.side_blocks` makes them; *fast* uses them as they
            are and differentiates through the packed tensors all the same. Not where the weight is rotated.
        take: what was made together with other layers' (:mod:`poetx.ops.together`), if it was, in place of the packed
            tensors and ``blocks``; called once, with whether the blocks will be wanted again in backward.
    """
    no_transforms()
    side_in, side_out = both
    sizes, block_sizes = (side_in.size, side_out.size), (side_in.block_size, side_out.block_size)
    x_NF = x.reshape(-1, x.shape[-1])
    by_weight = weight_is_cheaper(len(x_NF), side_out.size, side_in.size, side_out.block_size, side_in.block_size, mode)
    stored: tuple[Any, ...] = (weight.kind, weight.group_size, len(weight.tensors))
    keeps_blocks = mode == "fast" and not by_weight
    taken = take(not keeps_blocks)
    packed = (side_in.packed, side_out.packed)
    if keeps_blocks:
        function, settings, more = _FastLinear, (*stored, sizes, block_sizes, order), taken.blocks if taken else blocks
    else:
        function, settings, more = _MemLinear, (*stored, block_sizes, order, by_weight, taken), factors
    y = function.apply(
        x_NF,
        *(taken.handles if taken else packed),
        side_in.perm,
        side_out.perm,
        None if bias is None else bias.to(x.dtype),
        settings,
        packed if taken else None,
        *weight.tensors,
        *(more or ()),
    )
    return y.view(*x.shape[:-1], side_out.size)
