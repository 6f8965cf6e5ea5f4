"""The blocks of several layers, made together: by the launches of one layer's, where each would have had its own.

A layer asks a GPU for three kernels to make its blocks (four for order 7) and for four to six to turn their gradients
into those of its packed tensors; a decoder layer of seven matrices asked for seven times as many small ones, and its
host, which launches them, was the limit. The numbers are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from poetx.ops.cayley import many_blocks, many_blocks_backward
from poetx.ops.library import first_derivatives_only
from poetx.ops.side import Side, Sides

Pair = tuple[Tensor, Tensor]


class Taken(NamedTuple):
    """What one layer has of :class:`Together`, for (input side, output side).

    blocks: [K, B, B] each, not differentiable. handles: without memory or values, in place of the packed tensors: the
    blocks' gradients, float32 (float64), are theirs. again: the blocks for a backward pass that has not kept them.
    """

    blocks: Pair
    handles: Pair
    again: Callable[[], Pair]


class Together:
    """Blocks of several layers for one forward pass, taken once by each, and made once more for backward by need.

    Args:
        layers: the sides of each; all their packed tensors require a gradient, or none, and are on one device.
        order: 3, 7, or :data:`poetx.ops.reference.EXACT`.
        dtype: of the blocks.
        made: the blocks of a layer, where somebody has them.
    """

    def __init__(
        self, layers: Sequence[Sides], order: int, dtype: torch.dtype, made: Sequence[Pair | None] = ()
    ) -> None:
        self._order, self._dtype = order, dtype
        self._layers = [tuple(side._replace(perm=None) for side in both) for both in layers]
        self._versions = [_versions(both) for both in layers]
        sides = [side for both in layers for side in both]
        handles: Sequence[Tensor] = [side.packed for side in sides]
        if torch.is_grad_enabled() and handles[0].requires_grad:
            handles = _Handles.apply([side._replace(packed=None) for side in sides], order, dtype, *handles)
        ready = {number: pair for number, pair in enumerate(made) if pair is not None}
        missing = [number for number in range(len(layers)) if number not in ready]
        blocks = ready | dict(zip(missing, self._make(missing), strict=True))
        self._left = {number: (blocks[number], pair) for number, pair in enumerate(_pairs(handles))}
        self._wanted: set[int] = set()
        self._made_again: dict[int, Pair] = {}

    def take(self, number: int, *, again: bool) -> Taken:
        """What layer ``number`` computes with, once. ``again``: it will ask for the blocks in backward."""
        blocks, handles = self._left.pop(number)
        if again:
            self._wanted.add(number)
        return Taken(blocks, handles, functools.partial(self._again, number))

    def fits(self, number: int, both: Sides) -> bool:
        """Whether the layer has not taken its blocks yet, and they are still those of these sides."""
        return (
            number in self._left
            and all(a.packed is b.packed for a, b in zip(both, self._layers[number], strict=True))
            and self._versions[number] == _versions(both)
        )

    def _make(self, numbers: Iterable[int]) -> list[Pair]:
        sides = [side for number in numbers for side in self._layers[number]]
        with torch.no_grad():
            return _pairs(many_blocks(sides, self._order, self._dtype))

    def _again(self, number: int) -> Pair:
        _check_versions(self._versions[number], self._layers[number])
        if number not in self._made_again:
            numbers = sorted({*self._wanted, number})
            self._made_again = dict(zip(numbers, self._make(numbers), strict=True))
        return self._made_again.pop(number)


class _Handles(torch.autograd.Function):
    """Saves nothing: the packed tensors are kept anyway, and layers that are run again, checkpointed, need none."""

    @staticmethod
    def forward(ctx, sides, order, dtype, *packed):
        ctx.settings = [side._replace(packed=q) for side, q in zip(sides, packed, strict=True)], order, dtype
        ctx.versions = _versions(ctx.settings[0])
        ctx.set_materialize_grads(False)
        wide = torch.promote_types(dtype, torch.float32)
        shapes = [(len(q), side.block_size, side.block_size) for q, side in zip(packed, sides, strict=True)]
        return tuple(torch.empty((), dtype=wide, device=packed[0].device).expand(shape) for shape in shapes)

    @staticmethod
    def backward(ctx, *grads):
        first_derivatives_only()
        sides, order, dtype = ctx.settings
        given = [number for number, grad in enumerate(grads) if grad is not None]
        _check_versions([ctx.versions[n] for n in given], [sides[n] for n in given])
        found: list[Tensor | None] = [None] * len(grads)
        each = many_blocks_backward([grads[n] for n in given], [sides[n] for n in given], order, dtype)
        for number, dq in zip(given, each, strict=True):
            found[number] = dq
        return None, None, None, *found


def _pairs(tensors: Sequence[Tensor]) -> list[Pair]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def _versions(both: Sequence[Side]) -> list[int]:
    return [0 if side.packed.is_inference() else side.packed._version for side in both]


def _check_versions(before: Sequence[int], sides: Sequence[Side]) -> None:
    if before != _versions(sides):
        raise RuntimeError(
            "rotations were modified by an inplace operation between the forward and the backward pass of their layer; "
            "step the optimizer and merge after backward"
        )
