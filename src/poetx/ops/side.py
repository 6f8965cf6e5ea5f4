"""One side of a rotated weight: what its rotation is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


def block_count(size: int, block_size: int) -> int:
    """Blocks that cover ``size``; the last one may reach beyond it."""
    return -(-size // block_size)


class Side(NamedTuple):
    """A block-diagonal rotation of ``size`` features, in the order of ``perm``.

    packed [⌈size / block_size⌉, P]: strict upper triangles of the skew blocks. perm [size]: int32; None where a block
    is of neighbours.
    """

    packed: Tensor
    perm: Tensor | None
    size: int
    block_size: int


Sides = tuple[Side, Side]


def sides(
    packed: Sequence[Tensor],
    sizes: Sequence[int],
    block_sizes: Sequence[int],
    perms: Sequence[Tensor | None] = (None, None),
) -> Sides:
    """(input side, output side) from what an operator takes in their place."""
    side_in, side_out = map(Side, packed, perms, sizes, block_sizes)
    return side_in, side_out
