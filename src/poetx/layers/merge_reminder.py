"""Warnings, once each, that only the loss would give: nothing merges the rotations; a model is a mean of several."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from poetx.layers.poet import PoetLinear
from poetx.layers.walk import poet_layers
from poetx.ops.fold import largest_angle

logger = logging.getLogger(__name__)

#: Forward passes after which it looks for the first time, and after which even small rotations are spoken of.
_FIRST, _LATE = 128, 4096
#: Radians; the third-order series is off by 1 % there.
_LARGE_ANGLE = 0.32


class MergeReminder:
    """A forward hook that warns where its layer's rotations have grown large without a merge.

    It looks after 128, 256, 512, … training passes of the layer, and never again after its warning or a first merge.

    And it warns of averages that reach across a merge: where the weight has another norm than the layer's state says
    (looked at when that was written, when the mode changed, and every 128 passes); and in a copy that trains on nothing
    itself, where the rotations were written, and not by a state dict, and the original has been merged since.
    """

    def __init__(self, layer: PoetLinear | None = None) -> None:
        self.passes, self.done = 0, False
        self._calls, self._seen, self._odd = 0, (-1, -1, -1, False), False
        self._layer: Callable[[], PoetLinear | None] = _nothing if layer is None else weakref.ref(layer)
        self._original: Callable[[], PoetLinear | None] = (
            _nothing  # what its layer is a copy of, and what that was then
        )
        self._then: tuple[int, int, Tensor] | None = None

    def __deepcopy__(self, memo: Any) -> MergeReminder:
        copied, layer = MergeReminder(), self._layer()
        if layer is not None and _has_values(layer):
            copied._original = self._layer
            copied._then = layer.merge_count._version, layer.states_loaded, _sums(layer)
        return copied

    def __reduce__(self) -> Any:
        return MergeReminder, ()

    def __call__(self, layer: PoetLinear, inputs: Any) -> None:
        if torch.compiler.is_compiling() or is_capturing(layer):
            return
        if self._layer() is not layer:
            self._layer = weakref.ref(layer)
        trains = layer.training and torch.is_grad_enabled()
        self.check_average(layer, trains=trains)
        if self.done or not trains:
            return
        self.passes += 1
        if self.passes < _FIRST or self.passes & (self.passes - 1) or layer.skew_in.is_meta:
            return
        self.done = int(layer.merge_count) > 0
        if self.done:
            return
        with torch.no_grad():
            angle = float(torch.maximum(*(largest_angle(side) for side in layer.sides)))
        if angle == 0 and self.passes == _FIRST and layer.skew_in.requires_grad:
            logger.warning(
                "%s: %d training passes, and its rotations are where they were: no optimizer holds them, as when that "
                "was built before poetx.convert_, or it has not stepped; build it from poetx.param_groups(model, ...)",
                layer.label,
                self.passes,
            )
        elif angle > _LARGE_ANGLE or self.passes >= _LATE:
            self.done = True
            logger.warning(
                "%s: %d forward passes, rotations at an angle of %.2f, and no merge yet; call poetx.merge_every("
                "optimizer, model, steps=200) after building the optimizer: only coordinates of one block mix until "
                "then, and the series that trains them is exact for small angles only",
                layer.label,
                self.passes,
                angle,
            )

    def check_average(self, layer: PoetLinear, *, trains: bool = False, at_once: bool = False) -> None:
        """Say where ``layer`` looks like an average of models from both sides of a merge.

        Args:
            trains: it is in a pass whose gradients are wanted.
            at_once: look, even if nothing seems to have changed: writes through ``.data`` are not counted.
        """
        if not _has_values(layer):
            return
        original, then = self._original(), self._then
        if original is not None and then is not None:
            if trains or layer.states_loaded != then[1]:  # it merges itself; a target network takes the whole state
                self._original = _nothing
            elif original.merge_count._version != then[0]:
                self._then = original.merge_count._version, *then[1:]
                if not torch.equal(_sums(layer), then[2]):
                    self._original, self._odd = _nothing, True
                    self._tell(layer, "a copy whose rotations were written, of a layer that was merged since")
        self._calls += 1
        written = (layer.merge_count, layer.perm_in, layer.base_weight)
        seen = (*(0 if tensor is None else tensor._version for tensor in written), layer.training)
        if not at_once and self._seen == seen and self._calls % _FIRST:
            return
        self._seen = seen
        layer.check_permutations()
        if layer.packed_weight is not None:
            return
        norm = torch.linalg.vector_norm(layer.frozen_weight.precise().detach(), dtype=torch.float64)
        ratio = float(norm / layer.base_norm)
        odd, self._odd = self._odd, abs(ratio - 1) > layer.rounding_limit
        if self._odd and not odd:
            self._tell(layer, f"the weight's norm is {ratio:.3g} of what its state says")

    def _tell(self, layer: PoetLinear, what: str) -> None:
        logger.warning(
            "%s: %s. If this is an average of models (EMA, SWA), it reaches across a merge and means nothing: average "
            "layer.dense_weight(), or train by method='single-step'. If it was meant so, all is well",
            layer.label,
            what,
        )


def look_at_merges(model: nn.Module) -> None:
    """Have every layer's reminder look at what a merge has written, for passes in which no hook runs."""
    for _, layer in poet_layers(model):
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, MergeReminder):
                hook.check_average(layer, trains=True)


def is_capturing(layer: PoetLinear) -> bool:
    """Whether the kernels of this pass go into a CUDA graph, so that the host can look at no value."""
    return layer.skew_in.is_cuda and torch.cuda.is_current_stream_capturing()


def _nothing() -> None:
    """A reference that is dead."""


def _has_values(layer: PoetLinear) -> bool:
    tensors = (layer.merge_count, layer.skew_in.data)
    return not any(type(t) is not Tensor or t.is_meta or t.is_inference() for t in tensors)


def _sums(layer: PoetLinear) -> Tensor:
    return torch.stack([skew.detach().sum(dtype=torch.float64) for skew in layer.rotations])


def remind_of_merging(layer: PoetLinear) -> None:
    """Register a :class:`MergeReminder` on ``layer``, one of its model's: the others are merged with it."""
    layer.register_forward_pre_hook(MergeReminder(layer))
