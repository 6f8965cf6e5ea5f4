"""Folding rotations into a weight without losing its spectrum.

R = I + E is applied as ``W + E·W`` in float32 (float64 for float64), never with R itself in a narrow dtype: in
bfloat16 the diagonal 1 − 2‖q‖² rounds to 1 and the weight's norm drifts by +19 % or −32 % in 300 merges.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from poetx.ops.block_diagonal import left_rotate
from poetx.ops.cayley import cayley_delta, unpack_skew
from poetx.ops.reference import EXACT
from poetx.ops.side import Side, Sides


class _Use:
    """One thread in :func:`full_precision_products`."""


_lock = threading.RLock()
_uses: weakref.WeakSet[_Use] = weakref.WeakSet()  # weak: one that was interrupted ends with its frame
_outside: list[str] = []  # torch's settings before the first of them


@contextlib.contextmanager
def full_precision_products() -> Iterator[None]:
    """Products of float32 in float32, whatever torch's precision settings and autocast say.

    The settings are those of the process: they are put back when the last thread leaves.
    """
    use = _Use()
    try:
        _note(use, enters=True)
        with without_autocast():
            yield
    finally:
        _note(use, enters=False)


def _note(use: _Use, *, enters: bool) -> None:
    global _outside
    # The settings behind both of torch's interfaces: reading the older one raises once the newer has been used.
    homes: list[Any] = [torch.backends.cuda, torch.backends.mkldnn]
    backends = [home.matmul for home in homes]
    held = _lock.acquire(timeout=1)  # nobody has it for longer, but one who was interrupted at the wrong instant
    try:
        if enters and not _uses:
            _outside = [backend.fp32_precision for backend in backends]
        settings = ["ieee"] * len(backends) if enters else _outside
        entered = use in _uses
        (_uses.add if enters else _uses.discard)(use)
        if enters or (entered and not _uses):
            for backend, precision in zip(backends, settings, strict=True):
                backend.fp32_precision = precision
    finally:
        if held:
            _lock.release()


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Products in the dtype of their factors: for steps that somebody takes inside an autocast block."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def fold(weight: Tensor, sides: Sides, *, order: int = EXACT) -> Tensor:
    """``G_outᵀ · W' · G_inᵀ`` [m, n] in float32, or float64 if the weight or a side is; differentiable in the sides.

    Args:
        weight: W' [m, n], with the permutations already in it.
        order: of the parametrization. Merging takes :data:`EXACT`, whose factors are orthogonal to the last bit
            but a few; the training order gives the weight that forward acts with.
    """
    side_in, side_out = sides
    dtype = torch.promote_types(torch.promote_types(weight.dtype, side_in.packed.dtype), torch.float32)
    with full_precision_products():
        W = left_rotate(weight.to(dtype).T, _delta(side_in, order, dtype), plus=True).T
        if side_out.block_size == 1:  # nothing turns one feature
            return W
        return left_rotate(W, _delta(side_out, order, dtype).transpose(1, 2), plus=True)


def _delta(side: Side, order: int, dtype: torch.dtype) -> Tensor:
    return cayley_delta(side.packed.to(dtype), size=side.size, block_size=side.block_size, order=order)


def largest_angle(side: Side, *, iterations: int = 16) -> Tensor:
    """θ, the largest |eigenvalue| over all blocks of Q: 16 power iterations on QᵀQ, float32 scalar.

    A lower bound, in practice within a few per cent, for the price of a few matrix-vector products: a spectral
    decomposition of every block would take longer than the merge it watches over.
    """
    if not side.packed.numel():
        return side.packed.new_zeros((), dtype=torch.float32)
    Q = unpack_skew(side.packed.float(), side.size, side.block_size)
    # Squares of very large or small entries would leave float32's range; a power of two scales without rounding.
    exponent = torch.frexp(Q.abs().amax(dim=(1, 2), keepdim=True))[1]
    Q = torch.ldexp(torch.ldexp(Q, -exponent // 2), -exponent - -exponent // 2)
    # Any fixed vector will do that is not by construction orthogonal to the leading pair.
    v = torch.arange(1, side.block_size + 1, dtype=Q.dtype, device=Q.device).mul_(math.e).frac_().sub_(0.5)
    v = v.expand(Q.shape[0], -1).unsqueeze(2)
    theta = Q.new_zeros(Q.shape[0])
    for _ in range(iterations):
        v = torch.bmm(Q, v / v.norm(dim=1, keepdim=True).clamp_min(1e-30))
        theta = v.norm(dim=1).squeeze(1)
    exponent = exponent.view(-1)
    return torch.ldexp(torch.ldexp(theta, exponent // 2), exponent - exponent // 2).max()
