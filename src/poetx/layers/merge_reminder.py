"""Says once that rotations train and nothing merges them, which would otherwise show in the loss alone."""

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
    """A forward hook of one layer. Looks after 128, 256, 512, … training passes; a first merge ends it."""

    def __init__(self) -> None:
        self.passes, self.done = 0, False

    def __call__(self, layer: PoetLinear, inputs: Any) -> None:
        if self.done or torch.compiler.is_compiling() or not (layer.training and torch.is_grad_enabled()):
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
                layer.name or "PoetLinear",
                self.passes,
                angle,
            )


def remind_of_merging(layer: PoetLinear) -> None:
    """Watch ``layer`` for its whole model."""
    layer.register_forward_pre_hook(MergeReminder())
