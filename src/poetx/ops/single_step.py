"""A linear layer whose rotations are folded at every step: a plain product, with the rotations' gradient on the side.

At the identity y = x·Wᵀ, and the gradients of the packed rotations, ``2 (M − Mᵀ)`` above the diagonal of every block,
need no weight gradient:

    M_out = dW·Wᵀ = ∂yᵀ·y        M_in = Wᵀ·dW = ∂xᵀ·x        (y before the bias)

each restricted to the blocks of a partition; M itself is the gradient of E in W ← (I + E)·W and W ← W·(I + E), for maps
that need not be rotations. Two routes give the same numbers:

- ``"tokens"``: block outer products of (∂x, x) and (∂y, y), 4Nmn + 2KNb(m+n) multiply-adds in all for K partitions,
  reading through the partition. Keeps y, or computes it again (2Nmn).
- ``"weight"``: the weight's gradient, dropped after its block products with W: 6Nmn + 4Kbmn, all of it dense. Keeps x
  only. Cheaper where the layer is small beside its blocks.

Gradients are added to where the caller says: with gradients of several backward passes summed there, and the old sum
scaled down between steps, that is the momentum, and no gradient is ever stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from poetx.ops.block_diagonal import add_block_outer_, block_outer_products, gather, rotate, slices
from poetx.ops.cayley import pack_skew
from poetx.ops.dispatch import use_triton
from poetx.ops.fold import full_precision_products, stochastic_round_
from poetx.ops.library import first_derivatives_only, register_op

#: How many times faster the big products run than block outer products of the same arithmetic, contiguous ones and
#: those that gather first: decides the route. 2 CPU cores, float32, 1024 tokens, 256 wide, b=64: 184, 105, 40 GFLOP/s.
_CONTIGUOUS_PENALTY, _GATHER_PENALTY = 1.75, 4.6


class Sinks(NamedTuple):
    """Where a layer's backward adds the gradient of its packed rotations, for K partitions of either side.

    sink_in [K, ⌈n / b_in⌉, P], sink_out [K, ⌈m / b_out⌉, P]: float32, float64 or bfloat16. [K, …, b, b] for maps that
        need not be rotations.
    peaks_in, peaks_out [K, blocks]: the largest entry, in magnitude, that backward has added to a block.
    orders_in, orders_out: K tensors each, the coordinates [n] or [m] block after block, int32; an empty tensor
        stands for the contiguous partition.
    anchor: a scalar that requires a gradient and never gets one, so that backward runs whatever x requires.
    """

    sink_in: Tensor
    sink_out: Tensor
    peaks_in: Tensor
    peaks_out: Tensor
    orders_in: tuple[Tensor, ...]
    orders_out: tuple[Tensor, ...]
    anchor: Tensor


def cheaper_route(out_features: int, in_features: int, block_size: int, *, contiguous: int, gathered: int) -> str:
    """``"tokens"`` or ``"weight"``, whichever takes less time for so many partitions of either kind, whatever N is.

    Block products of activations take 2Nb(m+n) each, times what they are slower; the weight's gradient takes 2Nmn.
    """
    m, n = out_features, in_features
    work = block_size * (m + n) * (contiguous * _CONTIGUOUS_PENALTY + gathered * _GATHER_PENALTY)
    return "tokens" if work < m * n else "weight"


def block_count(size: int, block_size: int) -> int:
    return -(-size // block_size)


def strided_order(size: int, block_size: int) -> Tensor:
    """Coordinates k, k + r, k + 2r, … of block k for r blocks, one block after the other: [size], int64.

    Backwards where b does not divide the size: else the last coordinates, which stand in the short last block of the
    contiguous partition, would stand in the short last one here, too (of 257 by b = 256, the last would stay alone).
    """
    blocks = block_count(size, block_size)
    order = torch.cat([torch.arange(start, size, blocks) for start in range(blocks)])
    return order.flip(0) if size % block_size else order


def skew_gradient(W: Tensor, dW: Tensor, side: str, order: Tensor | None, block_size: int) -> Tensor:
    """∂L/∂q at Q = 0, packed [K, P], from a weight [m, n] and its gradient: of :func:`map_gradient`'s blocks."""
    return pack_skew(map_gradient(W, dW, side, order, block_size), W.shape[side == "in"]).mul_(2)


def map_gradient(W: Tensor, dW: Tensor, side: str, order: Tensor | None, block_size: int) -> Tensor:
    """∂L/∂E at E = 0, [K, B, B], from a weight [m, n] and its gradient.

    ``side="out"``: M = dW·Wᵀ for W ← (I + E)·W. ``side="in"``: M = Wᵀ·dW for W ← W·(I + E). ``order`` [size] lists
    the coordinates block after block; None: as they are. Accumulated in float32 (float64 for float64), because the
    difference M − Mᵀ cancels most of it.
    """
    size = W.shape[side == "in"]
    M = _zeros(size, block_size, W)
    with full_precision_products():
        if side == "in":
            if order is not None:
                W, dW = gather(W, order), gather(dW, order)
            add_block_outer_(M, W, dW)
        else:
            if order is not None:
                W, dW = W.index_select(0, order), dW.index_select(0, order)
            full = size // block_size
            _rows_outer_(M[:full], dW[: full * block_size], W[: full * block_size])
            if rest := size % block_size:
                _rows_outer_(M[-1:, :rest, :rest], dW[-rest:], W[-rest:])
    return M


def _rows_outer_(M_KBB: Tensor, dW: Tensor, W: Tensor) -> None:
    """``M_k = dW_k · W_kᵀ`` for blocks of rows; where the dtypes differ both are widened first."""
    if M_KBB.shape[0]:
        blocks = (t.unflatten(0, (M_KBB.shape[0], -1)).to(M_KBB.dtype) for t in (dW, W.contiguous()))
        first, second = blocks
        torch.bmm(first, second.transpose(1, 2), out=M_KBB)


def _zeros(size: int, block_size: int, like: Tensor) -> Tensor:
    shape = (block_count(size, block_size), block_size, block_size)
    return torch.zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _outer(first_NF: Tensor, second_NF: Tensor, order: Tensor, block_size: int) -> Tensor:
    """``firstᵀ · second`` on the blocks of a partition, [K, B, B]; an empty ``order`` is the contiguous one."""
    if use_triton(first_NF, block_size):
        from poetx.ops.triton import block_diagonal as kernels

        source = order if order.numel() else None
        return kernels.outer(first_NF, second_NF, block_size, x_source=source, y_source=source)
    if not order.numel():
        return block_outer_products(first_NF, second_NF, block_size)
    M = _zeros(first_NF.shape[1], block_size, first_NF)
    for rows in slices(first_NF):
        add_block_outer_(M, gather(first_NF[rows], order), gather(second_NF[rows], order))
    return M


def _subtract_bias_(M_KBB: Tensor, g_NF: Tensor, bias: Tensor, order: Tensor) -> None:
    """``∂yᵀ·(y − bias)`` from ``∂yᵀ·y``: a product of two vectors in each block."""
    total, bias = g_NF.sum(0, dtype=M_KBB.dtype), bias.to(M_KBB.dtype)
    if order.numel():
        total, bias = total[order.long()], bias[order.long()]
    blocks, block_size = M_KBB.shape[:2]
    pad = blocks * block_size - total.numel()
    total, bias = (torch.nn.functional.pad(v, (0, pad)).view(blocks, block_size) for v in (total, bias))
    M_KBB.baddbmm_(total[:, :, None], bias[:, None, :], alpha=-1)


#: Entries of a gradient beyond this count as not finite: a momentum of such could overflow.
_LARGEST_GRADIENT = 2.0**100


def block_peaks(blocks: Tensor) -> Tensor:
    """Largest entry of each block [K, …] in magnitude, [K]."""
    flat = blocks.flatten(1)
    return torch.linalg.vector_norm(flat, math.inf, dim=1) if flat.shape[1] else flat.new_zeros(flat.shape[0])


def add_to_(sink: Tensor, peaks: Tensor, M_KBB: Tensor, size: int, generator: torch.Generator | None = None) -> bool:
    """``sink += M``, or ``2 (M − Mᵀ)`` where the sink is packed, [K, P]; bfloat16 sinks round stochastically, with the
    device's global generator if no other is given. ``peaks`` [K] are raised to those of what was added.

    Nothing at all if M is not finite: it could not be taken back out of a running sum later. On a CPU the sink is not
    even written, and False returned; elsewhere that is not known here, and zeros are added.
    """
    gradient = M_KBB if sink.ndim == 3 else pack_skew(M_KBB, size).mul_(2)
    added = block_peaks(gradient)
    fits = (added <= _LARGEST_GRADIENT).all()  # NaN is not
    if type(gradient) is not Tensor or not gradient.is_cpu:  # no value to look at, or a device to wait for
        gradient, added = torch.where(fits, gradient, 0.0), torch.where(fits, added, 0.0)
    elif not fits.item():
        return False
    torch.maximum(peaks, added, out=peaks)
    if sink.dtype == torch.bfloat16:
        stochastic_round_(sink, gradient.add_(sink), generator)
    else:
        sink.add_(gradient)
    return True


def _backward(
    g: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    sink_in: Tensor,
    sink_out: Tensor,
    peaks_in: Tensor,
    peaks_out: Tensor,
    orders_in: Sequence[Tensor],
    orders_out: Sequence[Tensor],
    block_size_in: int,
    block_size_out: int,
    route: str,
    needs_dx: bool,
) -> Tensor:
    W = weight.to(x.dtype)
    dx = torch.mm(g, W) if needs_dx or route == "tokens" else x.new_empty(0)
    m, n = W.shape
    if route == "weight":
        dW = torch.mm(g.T, x)
        for side, sink, peaks, orders, block_size in (
            ("in", sink_in, peaks_in, orders_in, block_size_in),
            ("out", sink_out, peaks_out, orders_out, block_size_out),
        ):
            for total, peak, order in zip(sink, peaks, orders, strict=True):
                M = map_gradient(W, dW, side, order if order.numel() else None, block_size)
                add_to_(total, peak, M, W.shape[side == "in"])
        return dx
    for total, peak, order in zip(sink_in, peaks_in, orders_in, strict=True):
        add_to_(total, peak, _outer(dx, x, order, block_size_in), n)
    if not needs_dx:
        dx = x.new_empty(0)
    if y is None:
        y, bias = torch.mm(x, W.T), None
    for total, peak, order in zip(sink_out, peaks_out, orders_out, strict=True):
        M = _outer(g, y, order, block_size_out)
        if bias is not None:
            _subtract_bias_(M, g, bias, order)
        add_to_(total, peak, M, m)
    return dx


def _fake_backward(
    g,
    x,
    y,
    weight,
    bias,
    sink_in,
    sink_out,
    peaks_in,
    peaks_out,
    orders_in,
    orders_out,
    block_size_in: int,
    block_size_out: int,
    route: str,
    needs_dx: bool,
):
    return torch.empty_like(x, memory_format=torch.contiguous_format) if needs_dx else x.new_empty(0)


_backward_op = register_op(
    "single_step_backward(Tensor g, Tensor x, Tensor? y, Tensor weight, Tensor? bias, Tensor(a!) sink_in, "
    "Tensor(b!) sink_out, Tensor(c!) peaks_in, Tensor(d!) peaks_out, Tensor[] orders_in, Tensor[] orders_out, "
    "int block_size_in, int block_size_out, str route, bool needs_dx) -> Tensor",
    _fake_backward,
)(_backward)


def _watched(y: Tensor) -> tuple[Tensor, Tensor | None]:
    """y to be saved although it may be written later, and an empty tensor whose ``_version`` counts these writes.

    Compilers and fake tensors get y as it is: the former keep a value of their own, nobody reads the latter.
    """
    if torch.compiler.is_compiling() or type(y) is not Tensor:
        return y, None
    writes = y.detach()  # with the version of y, but not with its memory:
    writes.data = y.new_empty(0)
    return y.data, writes


class _SingleStepLinear(torch.autograd.Function):
    """Saves x; and y, the layer's output itself, on the tokens route of ``keep_y``. Weight and bias are kept anyway."""

    @staticmethod
    def forward(ctx, x, anchor, weight, bias, *settings):
        *sinks, block_sizes, route, keep_y = settings
        W = weight.to(x.dtype)
        y = torch.mm(x, W.T) if bias is None else torch.addmm(bias.to(x.dtype), x, W.T)
        kept, ctx.writes = _watched(y) if keep_y else (None, None)
        ctx.save_for_backward(x, kept, weight, bias)
        ctx.settings = (*sinks, *block_sizes, route)
        return y

    @staticmethod
    def backward(ctx, g):
        first_derivatives_only()
        x, y, weight, bias = ctx.saved_tensors
        if ctx.writes is not None and ctx.writes._version:
            y = None  # overwritten, as by nn.ReLU(inplace=True): computed again
        dx = _backward_op(g.contiguous(), x, y, weight, bias, *ctx.settings, ctx.needs_input_grad[0])
        dbias = g.sum(0).to(bias.dtype) if ctx.needs_input_grad[3] else None
        return dx if ctx.needs_input_grad[0] else None, None, None, dbias, *[None] * 9


def single_step_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sinks: Sinks,
    *,
    block_sizes: tuple[int, int],
    route: str,
    keep_y: bool,
) -> Tensor:
    """``x·Wᵀ + bias``, whose backward adds the gradient of the packed rotations to the sinks, in place.

    Args:
        x: [..., n], float32, bfloat16 or float64; the products run in this dtype.
        weight: [m, n], frozen; cast to x's dtype where it differs. bias: [m] or None, differentiable.
        block_sizes: (b_in, b_out). route, keep_y: see the module's text; y is only of use on the tokens route.
    """
    x_NF = x.reshape(-1, x.shape[-1])
    tensors = (sinks.sink_in, sinks.sink_out, sinks.peaks_in, sinks.peaks_out)
    settings = (list(sinks.orders_in), list(sinks.orders_out), block_sizes, route, keep_y and route == "tokens")
    y = _SingleStepLinear.apply(x_NF, sinks.anchor, weight, bias, *tensors, *settings)
    return y.view(*x.shape[:-1], weight.shape[0])


def small_cayley_delta(Q_KBB: Tensor, bound: float | None) -> Tensor:
    """E = G − I = 2Q(I − Q)⁻¹ to the last bits of Q's dtype, [K, B, B].

    Args:
        bound: no singular value of Q is larger. Well below 1 the inverse is the product Π (I + Q^(2^i)) cut where its
            next factor rounds to the identity: a few products, where a solve of small blocks is slow. None: solve.
    """
    eps = torch.finfo(Q_KBB.dtype).eps / 8
    if bound is None or bound > 0.6:
        identity = torch.eye(Q_KBB.shape[-1], dtype=Q_KBB.dtype, device=Q_KBB.device)
        return torch.linalg.solve(identity - Q_KBB, 2 * Q_KBB)
    power = torch.bmm(Q_KBB, Q_KBB)
    E = Q_KBB + power
    bound *= bound
    while bound > eps:
        E = torch.baddbmm(E, power, E)
        bound *= bound
        if bound > eps:
            power = torch.bmm(power, power)
    return E.mul_(2)


#: Elements of a weight that a fold holds in float32 at a time.
_FOLD_ELEMENTS = 1 << 22


def fold_side_(
    W: Tensor,
    E_KBB: Tensor,
    side: str,
    order: Tensor,
    *,
    scale: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``W ← scale·(I + E)·W`` (side "out") or ``scale·W·(I + E)`` ("in"), in place; returns the new ‖W‖², float64.

    Args:
        W: [m, n], float32, float64 or bfloat16, the last rounded stochastically. Products run in E's dtype, in full
            precision under :func:`poetx.ops.fold.full_precision_products`, which the caller enters.
        E_KBB: G − I for the blocks of a partition. order: as in :class:`Sinks`.
        scale: [K], of each block: one whose E is zero and whose scale is 1 stays as it is. generator: of the rounding.
    """
    dim = 0 if side == "out" else 1
    size, block_size = W.shape[dim], E_KBB.shape[-1]
    step = max(1, _FOLD_ELEMENTS // (W.numel() // size * block_size))
    squares = []
    scale = scale.to(E_KBB.dtype)
    E_KBB = E_KBB * scale[:, None, None]
    scale = scale.repeat_interleave(block_size)[:size]
    scale = scale if dim else scale[:, None]
    for first in range(0, E_KBB.shape[0], step):
        start, stop = first * block_size, min((first + step) * block_size, size)
        E = E_KBB[first : first + step]
        if not order.numel():
            piece = W.narrow(dim, start, stop - start)
        else:
            index = order[start:stop].long()
            piece = gather(W, index) if dim else W.index_select(0, index)
        moved = piece.to(E.dtype)  # the very piece of W where it is contiguous and wide already
        turned = rotate(moved, E) if dim else _left_product(E, moved)
        torch.addcmul(turned, moved, scale[start:stop], out=moved)
        # The rows' norms first: as exact as a sum in float64 and many times faster.
        squares.append(torch.linalg.vector_norm(moved, dim=1).double().square().sum())
        if order.numel():
            rounded = stochastic_round_(torch.empty_like(moved, dtype=W.dtype), moved, generator)
            W.index_copy_(dim, index, rounded)
        elif moved.dtype != W.dtype:
            stochastic_round_(piece, moved, generator)
    return squares[0] if len(squares) == 1 else torch.stack(squares).sum()


def _left_product(E_KBB: Tensor, W_FC: Tensor) -> Tensor:
    """``Diag(E_1 … E_K) · W`` for W [F, C]; the last block is cut where F ends."""
    out, block_size = torch.empty_like(W_FC, memory_format=torch.contiguous_format), E_KBB.shape[-1]
    if full := W_FC.shape[0] // block_size:
        shape = (full, block_size)
        head = W_FC[: full * block_size].unflatten(0, shape)
        torch.bmm(E_KBB[:full], head, out=out[: full * block_size].unflatten(0, shape))
    if rest := W_FC.shape[0] % block_size:
        torch.mm(E_KBB[-1, :rest, :rest], W_FC[-rest:], out=out[-rest:])
    return out
