"""``OFTLinear``: a linear layer whose input is rotated before its frozen weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from poetx.layers.poet import PoetLinear
from poetx.ops.one_sided import one_sided_linear
from poetx.ops.side import Sides


class OFTLinear(PoetLinear):
    """``y = x · P · Wᵀ + bias`` with P of orthogonal blocks of neighbours: OFTv2 (arXiv 2506.19847).

    A :class:`PoetLinear` with one side and without permutations, ``method="oft"``: ``skew_out`` has no entries, and
    both permutations are the identity. Nothing needs a merge: :func:`poetx.to_dense_` folds P into the weight.

    Saved for backward: x and the packed rotation, whatever ``config.mode`` says.
    """

    one_sided = True

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.skew_out.requires_grad_(False)

    def mode_for(self, x: Tensor) -> str:
        return "mem"

    def _rotated(
        self, x: Tensor, mode: str, both: Sides, bias: Tensor | None, factors: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        return one_sided_linear(x, self.frozen_weight.stored, both[0], order=self.order, bias=bias, factors=factors)
