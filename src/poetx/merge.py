"""Merge-then-reinitialize: the one door through which rotations go into the weights.

Folding, drawing new permutations, dropping the stale gradient and resetting the optimizer's state happen
together here, under one counter, because keeping them apart is where public code goes wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from poetx.errors import UserError
from poetx.layers.poet import FoldStats, PoetLinear
from poetx.layers.walk import poet_layers
from poetx.ops.reference import EXACT

logger = logging.getLogger(__name__)

_KEY = "poetx"
_NOTHING = (
    "the model has no PoetLinear layer to merge; call poetx.convert_ first (with method='single-step', poetx.POETX "
    "folds at every step and there is nothing left to merge)"
)
#: Warn where the truncated series that trained a layer is off by more than this, relative.
_SERIES_ERROR = 0.01


@dataclass(frozen=True)
class MergeReport:
    """What one merge folded, worst layer first in mind.

    Attributes:
        angle: largest rotation angle θ folded, radians, and ``angle_layer``, whose it was.
        series_error: θ^(k+1) there, the relative error of the training order k; 0 for ``"exact"``.
        norm_drift: largest |‖W‖/‖W0‖ − 1| that the merge found (and corrected), and ``norm_layer``.
    """

    angle: float
    angle_layer: str
    series_error: float
    norm_drift: float
    norm_layer: str


def merge_(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> MergeReport:
    """Fold every rotation of ``model`` into its weight, in place, and start the rotations anew.

    The rotations become zero, their gradients None (they belonged to the old frame), and their entries in
    ``optimizer.state`` are dropped, so that first moment, second moment and step count all start again. The
    model's function is preserved up to the training order's own error (θ⁴ for order 3) and the weight's dtype.
    Where that error passes 1 %, a warning is logged.

    Raises:
        UserError: the model has no rotated layer.
    """
    layers = dict(poet_layers(model))
    if not layers:
        raise UserError(_NOTHING)
    stats = []
    for layer in layers.values():
        stats.append(layer.merge_())
        for parameter in layer.rotations:
            parameter.grad = None
            if optimizer is not None:
                optimizer.state.pop(parameter, None)
    return _report(layers, stats)


def _report(layers: Mapping[str, PoetLinear], stats: list[FoldStats]) -> MergeReport:
    names = list(layers)
    angles, ratios = (torch.stack(list(column)).cpu() for column in zip(*stats, strict=True))
    orders = [layer.order for layer in layers.values()]
    errors = torch.tensor(
        [0.0 if k == EXACT else angle ** (k + 1) for k, angle in zip(orders, angles.tolist(), strict=True)]
    )
    worst, moved = int(errors.argmax()), int((ratios - 1).abs().argmax())
    largest = int(angles.argmax())
    if errors[worst] > _SERIES_ERROR:
        remedy = "neumann_order=7" if orders[worst] == 3 else "neumann_order='exact'"
        logger.warning(
            "%s: rotations reached an angle of %.2f, where the order-%d series is off by %.1f %%; merge more "
            "often, lower poet_lr, or use %s",
            names[worst],
            angles[worst],
            orders[worst],
            100 * errors[worst],
            remedy,
        )
    return MergeReport(
        angle=float(angles[largest]),
        angle_layer=names[largest],
        series_error=float(errors[worst]),
        norm_drift=float((ratios[moved] - 1).abs()),
        norm_layer=names[moved],
    )


class MergeHandle:
    """What :func:`merge_every` returns.

    Attributes:
        steps: optimizer steps between merges.
        steps_since_merge: steps taken since the last one, 0 … steps − 1.
        merges: merges done through this handle, counted over resumes.
        report: of the last merge in this process, or None.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> None:
        self.steps, self.steps_since_merge, self.merges = steps, 0, 0
        self.report: MergeReport | None = None
        self._model = model
        self._hooks = [
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._load),
        ]

    def remove(self) -> None:
        """Stop merging; the counter leaves the optimizer's ``state_dict``."""
        for hook in self._hooks:
            hook.remove()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # A fused optimizer is stepped by a gradient scaler even where it then does nothing.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf):
            return
        self.steps_since_merge += 1
        if self.steps_since_merge >= self.steps:
            self.report = merge_(self._model, optimizer)
            self.steps_since_merge = 0
            self.merges += 1

    def _save(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        counter = {"steps_since_merge": self.steps_since_merge, "merges": self.merges}
        return state_dict | {_KEY: counter}

    def _load(self, optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        if _KEY not in state_dict:
            raise UserError(
                "this optimizer state was saved without poetx.merge_every, so it does not say when the last merge "
                "was; remove the handle before loading it, or start the optimizer anew"
            )
        counter = state_dict[_KEY]
        self.steps_since_merge, self.merges = counter["steps_since_merge"], counter["merges"]
        return {key: value for key, value in state_dict.items() if key != _KEY}


def merge_every(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int = 200) -> MergeHandle:
    """Call :func:`merge_` inside ``optimizer.step()`` after every ``steps``-th step, for any torch optimizer.

    The counter travels in ``optimizer.state_dict()["poetx"]``; call this before ``load_state_dict``. A step that a
    gradient scaler skips does not count. The paper uses 200 (400 on a quantized base).

    Raises:
        UserError: ``steps`` below 1, a model with no rotated layer, rotations missing from the optimizer, or a
            second call for the same optimizer.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UserError(f"steps={steps!r}: must be a whole number of at least 1 (200 is the paper's)")
    layers = dict(poet_layers(model))
    if not layers:
        raise UserError(_NOTHING)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, layer in layers.items():
        for side, parameter in zip(("skew_in", "skew_out"), layer.rotations, strict=True):
            if parameter.requires_grad and id(parameter) not in held:
                raise UserError(
                    f"{name}.{side} is not in this optimizer, so its state could not be reset; build the "
                    "optimizer from poetx.param_groups(model, ...) after convert_"
                )
    if any(
        isinstance(getattr(hook, "__self__", None), MergeHandle)
        for hook in optimizer._optimizer_step_post_hooks.values()
    ):
        raise UserError("merge_every is already registered on this optimizer; remove() the first handle")
    return MergeHandle(optimizer, model, steps)
