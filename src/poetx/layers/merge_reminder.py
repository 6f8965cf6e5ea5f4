"""A warning, once a model, where rotations train and nothing merges them: only the loss would tell."""

from __future__ import annotations

import logging
from typing import Any

import torch

from poetx.layers.poet import PoetLinear
from poetx.ops.fold import largest_angle

logger = logging.getLogger(__name__)

#: Forward passes after which it looks for the first time, and after which even small rotations are spoken of.
_FIRST, _LATE = 128, 4096
#: Radians; the third-order series is off by 1 % there.
_LARGE_ANGLE = 0.32


class MergeReminder:
    """A forward hook that warns where its layer's rotations have grown large without a merge.

    It looks after 128, 256, 512, … training passes of the layer, and never again after its warning or a first merge.

    And it warns where the layer's buffers were written, by a merge, a state dict or an average of models, and its
    weight has another norm than they say: a mean of weights from both sides of a merge has.
    """

    def __init__(self) -> None:
        self.passes, self.done = 0, False
        self._seen = 0  # writes to merge_count

    def __call__(self, layer: PoetLinear, inputs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._check_norm(layer)
        if self.done or not (layer.training and torch.is_grad_enabled()):
            return
        self.passes += 1
        if self.passes < _FIRST or self.passes & (self.passes - 1) or layer.skew_in.is_meta:
            return
        self.done = int(layer.merge_count) > 0
        if self.done:
            return
        with torch.no_grad():
            angle = float(torch.maximum(*(largest_angle(side) for side in layer.sides)))
        if angle > _LARGE_ANGLE or self.passes >= _LATE:
            self.done = True
            logger.warning(
                "%s: %d forward passes, rotations at an angle of %.2f, and no merge yet; call poetx.merge_every("
                "optimizer, model, steps=200) after building the optimizer: only coordinates of one block mix until "
                "then, and the series that trains them is exact for small angles only",
                layer.label,
                self.passes,
                angle,
            )

    def _check_norm(self, layer: PoetLinear) -> None:
        count = layer.merge_count
        if type(count) is not torch.Tensor or count.is_meta or count.is_inference() or count._version == self._seen:
            return
        self._seen = count._version
        if layer.packed_weight is None:
            norm = torch.linalg.vector_norm(layer.frozen_weight.precise(), dtype=torch.float64)
            ratio = float(norm / layer.base_norm)
            if abs(ratio - 1) > layer.rounding_limit:
                logger.warning(
                    "%s: the weight's norm is %.3g of what its state says. If this is an average of models (EMA, SWA), "
                    "it reaches across a merge and means nothing: average layer.dense_weight(), or train by "
                    "method='single-step'. If the weight was written on purpose, all is well",
                    layer.label,
                    ratio,
                )


def remind_of_merging(layer: PoetLinear) -> None:
    """Register a :class:`MergeReminder` on ``layer``, one of its model's: the others are merged with it."""
    layer.register_forward_pre_hook(MergeReminder())
