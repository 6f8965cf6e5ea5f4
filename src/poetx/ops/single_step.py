"""A linear layer whose rotations are folded at every step: a plain product, with the rotations' gradient on the side.

At the identity y = x·Wᵀ, and the gradients of the packed rotations, ``2 (M − Mᵀ)`` above the diagonal of every block,
need no weight gradient:

    M_out = dW·Wᵀ = ∂yᵀ·y        M_in = Wᵀ·dW = ∂xᵀ·x        (y before the bias)

each restricted to blocks of neighbouring coordinates; M itself is the gradient of E in W ← (I + E)·W and W ← W·(I + E),
for maps that need not be rotations. Two routes give the same numbers:

- ``"tokens"``: block outer products of (∂x, x) and (∂y, y), 4Nmn + 2Nb(m+n) multiply-adds in all. Keeps y, or computes
  it again (2Nmn).
- ``"weight"``: the weight's gradient, dropped after its block products with W: 6Nmn + 4bmn. Keeps x only. Cheaper where
  the layer is small beside its blocks.

Gradients are added to where the caller says: with gradients of several backward passes summed there, and the old sum
scaled down between steps, that is the momentum, and no gradient is ever stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from poetx.ops.block_diagonal import add_block_outer_, block_outer_products
from poetx.ops.cayley import pack_skew
from poetx.ops.dispatch import use_triton
from poetx.ops.fold import full_precision_products
from poetx.ops.library import cached_tensors, first_derivatives_only, no_transforms, operator
from poetx.ops.random import stochastic_round_
from poetx.ops.side import block_count
from poetx.ops.stored import HOST, Stored, fetch


class MomentumBuffers(NamedTuple):
    """Where a layer's backward adds the gradient of its packed rotations.

    momentum_in [⌈n / b_in⌉, P], momentum_out [⌈m / b_out⌉, P]: float32, float64 or bfloat16. [blocks, b, b] for maps
        that need not be rotations.
    peaks_in, peaks_out [blocks]: the largest entry, in magnitude, that backward has added to a block.
    noise: int64 [2] on the CPU: a seed of the rounding of a bfloat16 momentum, and how often backward has drawn.
    anchor: a scalar on the CPU that requires a gradient, so that backward runs whatever x requires. It gets one (0)
        when backward has added something.
    """

    momentum_in: Tensor
    momentum_out: Tensor
    peaks_in: Tensor
    peaks_out: Tensor
    noise: Tensor
    anchor: Tensor


def cheaper_route(out_features: int, in_features: int, block_size_out: int, block_size_in: int) -> str:
    """``"tokens"`` or ``"weight"``, whichever takes fewer multiply-adds for many tokens.

    Block products of N activations take 2N(b_out·m + b_in·n), the weight's gradient 2Nmn.
    """
    m, n = out_features, in_features
    return "tokens" if block_size_out * m + block_size_in * n < m * n else "weight"


def skew_gradient(W: Tensor, dW: Tensor, side: str, block_size: int) -> Tensor:
    """∂L/∂q at Q = 0, packed [K, P], from a weight [m, n] and its gradient: of :func:`map_gradient`'s blocks."""
    return pack_skew(map_gradient(W, dW, side, block_size), W.shape[side == "in"]).mul_(2)


def map_gradient(W: Tensor, dW: Tensor, side: str, block_size: int) -> Tensor:
    """∂L/∂E at E = 0, [K, B, B], from a weight [m, n] and its gradient.

    ``side="out"``: M = dW·Wᵀ for W ← (I + E)·W. ``side="in"``: M = Wᵀ·dW for W ← W·(I + E). Accumulated in float32
    (float64 for float64), because the difference M − Mᵀ cancels most of it.
    """
    with full_precision_products():
        return _map_gradient(W, dW, side, block_size)


def _map_gradient(W: Tensor, dW: Tensor, side: str, block_size: int) -> Tensor:
    size = W.shape[side == "in"]
    shape = (block_count(size, block_size), block_size, block_size)
    M = torch.zeros(shape, dtype=torch.promote_types(W.dtype, torch.float32), device=W.device)
    if side == "in":
        add_block_outer_(M, W, dW)
        return M
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


def _subtract_bias_(M_KBB: Tensor, g_NF: Tensor, bias: Tensor) -> None:
    """``∂yᵀ·(y − bias)`` from ``∂yᵀ·y``: a product of two vectors in each block."""
    total, bias = g_NF.sum(0, dtype=M_KBB.dtype), bias.to(M_KBB.dtype)
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


def add_to_(
    momentum: Tensor, peaks: Tensor, M_KBB: Tensor, size: int, generator: torch.Generator | None = None
) -> None:
    """``momentum += M``, or ``2 (M − Mᵀ)`` where it is packed, [K, P]; ``peaks`` [K] are raised to those of the addend.

    A bfloat16 momentum is rounded stochastically, with the device's global generator if no other is given. A block of
    M that is not finite counts as zero: it could not be taken back out of a running sum later.
    """
    gradient = M_KBB if momentum.ndim == 3 else pack_skew(M_KBB, size).mul_(2)
    added = block_peaks(gradient)
    fits = added <= _LARGEST_GRADIENT  # NaN is not
    gradient.masked_fill_(~fits.view(-1, *[1] * (gradient.ndim - 1)), 0.0)
    torch.maximum(peaks, torch.where(fits, added, 0.0), out=peaks)
    if momentum.dtype == torch.bfloat16:
        stochastic_round_(momentum, gradient.add_(momentum), generator)
    else:
        momentum.add_(gradient)


def _add_to_both_(
    momenta: Sequence[Tensor], peaks: Sequence[Tensor], Ms: Sequence[Tensor], sizes: Sequence[int], noise: Tensor
) -> None:
    """:func:`add_to_` for the sides of input and output; ``noise`` counts the pass where the momenta are rounded."""
    narrow = momenta[0].dtype == torch.bfloat16
    seed = 0
    if narrow and type(noise) is Tensor:  # a fake tensor has no values, and the result is not looked at
        first, count = noise.tolist()
        noise[1] += 1
        seed = first + 2 * count
    if use_triton(momenta[0], min(M.shape[-1] for M in Ms), on_fakes=True):
        from poetx.ops.triton import single_step as kernels

        kernels.add_(momenta, peaks, Ms, bound=_LARGEST_GRADIENT, seed=seed)
        return
    for number, (momentum, peak, M, size) in enumerate(zip(momenta, peaks, Ms, sizes, strict=True)):
        generator = None
        if narrow and type(noise) is Tensor:
            generator = torch.Generator(momentum.device).manual_seed(seed + number)
        add_to_(momentum, peak, M, size, generator)


def _fake_product(x, stored, kind, bias):
    return x.new_empty(x.shape[0], stored[0].shape[0])


@operator(_fake_product)
def _single_step_from_host(x: Tensor, stored: Sequence[Tensor], kind: str, bias: Tensor | None) -> Tensor:
    return _product(x, fetch(stored, kind, 0, x.shape[1], x.dtype, x.device), bias)


def _product(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, W, None if bias is None else bias.to(x.dtype))


def _fake_backward(g, x, y, stored, kind, bias, *rest):
    return torch.empty_like(x, memory_format=torch.contiguous_format) if rest[-1] else x.new_empty(0)


@operator(_fake_backward, mutates=("momentum_in", "momentum_out", "peaks_in", "peaks_out", "noise"))
def _single_step_backward(
    g: Tensor,
    x: Tensor,
    y: Tensor | None,
    stored: Sequence[Tensor],
    kind: str,
    bias: Tensor | None,
    momentum_in: Tensor,
    momentum_out: Tensor,
    peaks_in: Tensor,
    peaks_out: Tensor,
    noise: Tensor,
    block_size_in: int,
    block_size_out: int,
    route: str,
    needs_dx: bool,
) -> Tensor:
    W = fetch(stored, kind, 0, x.shape[1], x.dtype, x.device)
    dx = torch.mm(g, W) if needs_dx or route == "tokens" else x.new_empty(0)
    m, n = W.shape
    if route == "weight":
        dW = torch.mm(g.T, x)
        sides = (("in", block_size_in), ("out", block_size_out))
        with full_precision_products():
            Ms = [_map_gradient(W, dW, side, block_size) for side, block_size in sides]
    else:
        M_in = block_outer_products(dx, x, block_size_in)
        if not needs_dx:
            dx = x.new_empty(0)
        if y is None:
            y, bias = torch.mm(x, W.T), None
        Ms = [M_in, block_outer_products(g, y, block_size_out)]
        if bias is not None:
            _subtract_bias_(Ms[1], g, bias)
    _add_to_both_((momentum_in, momentum_out), (peaks_in, peaks_out), Ms, (n, m), noise)
    return dx


def _accumulates(anchor: object) -> bool:
    """Whether this backward pass accumulates gradients, where ``torch.autograd.grad`` returns them only.

    Args:
        anchor: the node that would accumulate the anchor's gradient.
    """
    try:
        return torch._C._will_engine_execute_node(anchor)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    except RuntimeError:  # the anchor's own gradient is to be returned
        return False


def _watched(y: Tensor) -> tuple[Tensor, Tensor | None]:
    """y to be saved although it may be written later, and an empty tensor whose ``_version`` counts these writes.

    Compilers and fake tensors get y as it is: the former keep a value of their own, nobody reads the latter.
    """
    if torch.compiler.is_compiling() or type(y) is not Tensor:
        return y, None
    writes = y.detach()  # with the version of y, but not with its memory:
    writes.data = _nothing(y.dtype, y.device)
    return y.data, writes


@cached_tensors
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


class _SingleStepLinear(torch.autograd.Function):
    """Saves x; and y, the layer's output itself, on the tokens route of ``keep_y``. Weight and bias are kept anyway.

    Without buffers it saves no x: nothing is added to then.
    """

    @staticmethod
    def forward(ctx, x, anchor, weight, bias, kind, *settings):
        *buffers, block_sizes, route, keep_y = settings
        if kind.startswith(HOST):
            y = _single_step_from_host(x, [weight], kind, bias)
        else:
            y = _product(x, weight.to(x.dtype), bias)
        kept, ctx.writes = _watched(y) if keep_y else (None, None)
        ctx.save_for_backward(x if buffers else x.new_empty(0, x.shape[1]), kept, weight, bias)
        ctx.kind, ctx.settings = kind, (*buffers, *block_sizes, route)
        return y

    @staticmethod
    def backward(ctx, g):
        first_derivatives_only()
        x, y, weight, bias = ctx.saved_tensors
        if ctx.writes is not None and (torch.compiler.is_compiling() or ctx.writes._version):
            y = None  # overwritten, as by nn.ReLU(inplace=True): computed again
        dbias = g.sum(0).to(bias.dtype) if ctx.needs_input_grad[3] else None
        needs_dx = ctx.needs_input_grad[0]
        dx = anchor = None
        if ctx.needs_input_grad[1] and (torch.compiler.is_compiling() or _accumulates(ctx.next_functions[1][0])):
            dx = _single_step_backward(g.contiguous(), x, y, [weight], ctx.kind, bias, *ctx.settings, needs_dx)
            anchor = torch.zeros((), device="cpu")
        elif needs_dx:
            dx = torch.mm(g, fetch([weight], ctx.kind, 0, x.shape[1], x.dtype, g.device))
        return dx if needs_dx else None, anchor, None, dbias, *[None] * (len(ctx.needs_input_grad) - 4)


def single_step_linear(
    x: Tensor,
    weight: Stored,
    bias: Tensor | None,
    buffers: MomentumBuffers | None,
    *,
    block_sizes: tuple[int, int],
    route: str,
    keep_y: bool,
) -> Tensor:
    """``x·Wᵀ + bias``, whose backward adds the gradient of the packed rotations to the buffers, in place.

    Not where ``torch.autograd.grad`` runs backward without torch.compile: that returns gradients and accumulates none.

    Args:
        x: [..., n], float32, bfloat16 or float64; the products run in this dtype.
        weight: dense, [m, n], frozen; cast to x's dtype where it differs. bias: [m] or None, differentiable.
        buffers: None adds nothing.
        block_sizes: (b_in, b_out). route, keep_y: see the module's text; y is only of use on the tokens route.
    """
    no_transforms()
    x_NF = x.reshape(-1, x.shape[-1])
    *tensors, anchor = buffers or (None,)
    keep_y = keep_y and route == "tokens" and buffers is not None
    W = weight.tensors[0].detach()  # autograd may know the weight, for other terms of a loss than this product
    y = _SingleStepLinear.apply(x_NF, anchor, W, bias, weight.kind, *tensors, block_sizes, route, keep_y)
    return y.view(*x.shape[:-1], W.shape[0])
