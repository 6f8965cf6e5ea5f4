"""The weight-centric way of the original POET (arXiv 2506.08001): R · W0 · P from dense rotations, by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from poetx.ops.block_diagonal import inverse
from poetx.ops.cayley import cayley
from poetx.ops.side import Side, Sides


def original_weight(weight: Tensor, both: Sides, *, order: int) -> Tensor:
    """R · W0 · P [m, n] in the weight's dtype; differentiable in both sides.

    Dense [m, m] and [n, n] rotations by ``torch.block_diag``, products with the whole weight, and every intermediate
    kept for backward: for comparison with what forward does instead.

    Args:
        weight: W' = W0[perm_out][:, perm_in], or W0 where blocks are of neighbours; frozen.
    """
    P, R = (_dense_rotation(side, order).to(weight.dtype) for side in both)
    product = R.T @ weight @ P.T
    for dim, side in enumerate(both[::-1]):
        if side.perm is not None:
            product = product.index_select(dim, inverse(side.perm))
    return product


def _dense_rotation(side: Side, order: int) -> Tensor:
    G_KBB = cayley(side.packed, size=side.size, block_size=side.block_size, order=order)
    return torch.block_diag(*G_KBB)[: side.size, : side.size]
