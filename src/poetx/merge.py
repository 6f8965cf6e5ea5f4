"""Merge-then-reinitialize: the one door through which rotations go into the weights.

Folding, drawing new permutations, dropping the stale gradient and resetting the optimizer's state happen
together here, under one counter, because keeping them apart is where public code goes wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from poetx.distributed.checksum import check_alike
from poetx.distributed.ranks import on_any_rank
from poetx.distributed.sharded import deal_, is_sharded, local, refuse_sharded, reshard_
from poetx.errors import UserError
from poetx.layers.base import is_finite
from poetx.layers.poet import FoldStats, PoetLinear
from poetx.layers.shared_features import look_at_shared_features
from poetx.layers.walk import poet_layers, rotation_ids
from poetx.one_rate import OneRate
from poetx.ops.fold import largest_angle
from poetx.ops.reference import EXACT
from poetx.optimizer_restart import COUNTERS, GroupRestart, groups_of, idle_arguments, refuse_unfit, reset_rotations

logger = logging.getLogger(__name__)
Owner = TypeVar("Owner")

_NOTHING = (
    "the model has no PoetLinear layer to merge; call poetx.convert_ first (with method='single-step', poetx.POETX "
    "folds at every step and there is nothing left to merge)"
)
#: Steps between two looks at the largest angle, and at 1, 2 and 4: one takes some power iterations in every layer.
_LOOK_EVERY = 8
#: Angles from here on, radians, are a mistake.
_LARGEST = 100
#: Early merges after one step each, one after the other, of which nothing is left to hope.
_AT_ONCE = 5
#: Warn where the truncated series that trained a layer is off by more than this, relative.
_SERIES_ERROR = 0.01


@dataclass(frozen=True)
class MergeReport:
    """What one merge folded, worst layer first in mind. Zeros, and no names, where every layer is frozen.

    Attributes:
        angle: largest rotation angle θ folded, radians, and ``angle_layer``, whose it was.
        series_error: θ^(k+1) there, the relative error of the training order k; 0 for ``"exact"``.
        norm_drift: largest |‖W‖/‖W0‖ − 1| that the merge found, and ``norm_layer``; corrected where rounding can have
            done it, else kept, with a warning in the log: somebody has written the weight.
    """

    angle: float
    angle_layer: str
    series_error: float
    norm_drift: float
    norm_layer: str


def merge_(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> MergeReport:
    """Fold every rotation of ``model`` into its weight, in place, and start the rotations anew.

    The rotations become zero, their gradients None (they belonged to the old frame), and what ``optimizer`` keeps
    of them is as before their first step: first moment, second moment and step counts, also those in their group (other
    values that an optimizer finds and keeps there, such as a step size, only with :func:`merge_every`). The model's
    function is preserved up to the training order's own error (θ⁴ for order 3) and the weight's dtype.
    Where that error passes 1 %, a warning is logged. A frozen layer, none of whose rotations trains, stays as it is:
    rounding would change its weight at every merge.

    Whatever interrupts or fails leaves each layer, with its entries in the optimizer, as it was or merged; another call
    then merges all of them.

    Raises:
        UserError: the model has no rotated layer; inf or NaN in a weight or rotation; ``optimizer`` counts steps for
            rotations and other parameters together, wraps another one, or is LBFGS. Nothing has changed then.
    """
    layers = dict(poet_layers(model))
    if not layers:
        raise UserError(_NOTHING)
    reshard_(model)
    rotations = {id(p) for layer in layers.values() for p in layer.rotations}
    handle = None if optimizer is None else merge_handle(optimizer)
    restart = handle.restart if handle else GroupRestart()
    if optimizer is not None:
        restart.check(optimizer, rotations)
    sharded = _are_sharded(layers)
    _check_finite(list(layers.values()), sharded=sharded)
    layers = {name: layer for name, layer in layers.items() if not layer.frozen}
    if sharded:
        stats = _merge_sharded_(list(layers.values()), optimizer)
        for layer in layers.values():  # whose permutations another rank may have drawn
            look_at_shared_features(layer)
    else:
        stats = [layer.merge_(lambda layer=layer: reset_rotations(layer, optimizer)) for layer in layers.values()]
    if optimizer is not None:
        restart(optimizer, rotations)
    return _report(layers, stats)


def _are_sharded(layers: Mapping[str, PoetLinear]) -> bool:
    """Whether the rotations are sharded. Raises :class:`UserError` where the weights could not be gathered then."""
    sharded = [layer for layer in layers.values() if is_sharded(layer.skew_in)]
    for layer in sharded:
        if layer.host is not None:
            raise UserError(f"{layer.label}: sharded, and its weight in host memory; leave out offload_frozen_")
    return bool(sharded)


def _check_finite(layers: list[PoetLinear], *, sharded: bool) -> None:
    """Refuse inf and NaN before anything changes; in shards, on every rank alike."""
    broken = []
    for layer in layers:
        tensors = [local(t) for t in (*layer.frozen_weight.stored.tensors, *layer.rotations)]
        broken.append(not all(map(is_finite, tensors)))
    if sharded:
        broken = on_any_rank(broken, layers[0].perm_in.device)
    for layer, is_broken in zip(layers, broken, strict=True):
        if is_broken:
            layer.refuse_not_finite()


def _merge_sharded_(layers: list[PoetLinear], optimizer: torch.optim.Optimizer | None) -> list[FoldStats]:
    """``layer.merge_`` of every layer, each on one rank of those that its rows are sharded over."""
    merged = deal_(
        layers, lambda layer: torch.stack(layer.merge_()), 2, lambda layer: reset_rotations(layer, optimizer)
    )
    return [FoldStats(*merged[layer]) for layer in layers]


def _on_cpu(scalars: Sequence[Tensor]) -> Tensor:
    """Scalars of layers, which may be on several devices, as one tensor."""
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).cpu()


def _report(layers: Mapping[str, PoetLinear], stats: list[FoldStats]) -> MergeReport:
    if not layers:
        return MergeReport(angle=0.0, angle_layer="", series_error=0.0, norm_drift=0.0, norm_layer="")
    names = list(layers)
    angles, ratios = map(_on_cpu, zip(*stats, strict=True))
    orders = [layer.order for layer in layers.values()]
    errors = torch.tensor(
        [0.0 if k == EXACT else angle ** (k + 1) for k, angle in zip(orders, angles.tolist(), strict=True)]
    )
    drifts = (ratios - 1).abs()
    worst, moved = int(errors.argmax()), int(drifts.argmax())
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
    written = [name for name, drift in zip(names, drifts.tolist(), strict=True) if drift > layers[name].rounding_limit]
    if written:
        more = f" and {len(written) - 1} more layers" if len(written) > 1 else ""
        logger.warning(
            "%s%s: the weight was written since the last merge (its norm is %.4g times what it was); kept as it is",
            written[0],
            more,
            ratios[names.index(written[0])],
        )
    return MergeReport(
        angle=float(angles[largest]),
        angle_layer=names[largest],
        series_error=float(errors[worst]),
        norm_drift=float(drifts[moved]),
        norm_layer=names[moved],
    )


class MergeHandle:
    """What :func:`merge_every` returns.

    Attributes:
        steps: optimizer steps between merges.
        angle: radians beyond which a merge comes early, or None.
        steps_since_merge: steps taken since the last one, 0 … steps − 1.
        merges: merges done through this handle, counted over resumes.
        report: of the last merge in this process, or None.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, steps: int, angle: float | None = None
    ) -> None:
        self.steps, self.angle, self._at_once = steps, angle, 0
        self.report: MergeReport | None = None
        self._model, self._optimizer = model, optimizer
        self._rotations = rotation_ids(model)
        loaded = self._counter_groups()[0]  # by a state dict, which may come first
        self._set(*(loaded.get(key, 0) for key in COUNTERS))
        self._loaded, self._ahead = self._seen()
        self.restart = GroupRestart([] if optimizer.state else self._counter_groups())
        self._rate = OneRate(*self._parted(), "the rotations")
        vars(optimizer)["__getstate__"] = _refuse_copies
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_pre_hook(self._load),
        ]

    @property
    def steps_since_merge(self) -> int:
        return self._counter_groups()[0]["steps_since_merge"]

    @property
    def merges(self) -> int:
        return self._counter_groups()[0]["merges"]

    def remove(self) -> None:
        """Stop merging; the counters leave the optimizer's groups."""
        for hook in self._hooks:
            hook.remove()
        vars(self._optimizer).pop("__getstate__", None)
        for group in self._counter_groups():
            for key in COUNTERS:
                group.pop(key, None)

    def _counter_groups(self) -> list[dict[str, Any]]:
        """The groups that carry the counters: a checkpoint of any kind saves what is in a group."""
        return groups_of(self._optimizer, self._rotations) or self._optimizer.param_groups[:1]

    def _parted(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The groups that hold rotations, and the others."""
        rotated = groups_of(self._optimizer, self._rotations)
        held = {id(group) for group in rotated}
        return rotated, [group for group in self._optimizer.param_groups if id(group) not in held]

    def _set(self, steps_since_merge: int, merges: int) -> None:
        for group in self._counter_groups():
            group |= {"steps_since_merge": steps_since_merge, "merges": merges}

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(getattr(p, "made_dense", False) for group in self._counter_groups() for p in group["params"]):
            raise UserError(
                "merge_every: layers of the model were made dense by to_dense_, and this optimizer holds their "
                "rotations, not their weights; build a new optimizer for the model"
            )
        self._say_if_loaded_alone()
        self._rate.check(*self._parted())
        self.restart.before_step(self._counter_groups())

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # A fused optimizer is stepped by a gradient scaler even where it then does nothing.
        found_inf = getattr(optimizer, "found_inf", None)
        if (found_inf is not None and float(found_inf)) or self._only_creates_state():
            return
        self.restart.after_step(self._counter_groups())
        self.restart.check(optimizer, self._rotations)
        since, merges = self.steps_since_merge + 1, self.merges
        self._set(since, merges)
        if since >= self.steps or self._is_early(since):
            _check_held(optimizer, self._model)
            self.report = merge_(self._model, optimizer)
            self._set(0, merges + 1)
            self._say_if_at_every_step(since)
            layers = [(name, [*layer.parameters(), *layer.buffers()]) for name, layer in poet_layers(self._model)]
            check_alike([(name, t) for name, tensors in layers for t in tensors], f"after merge {merges + 1}")

    def _seen(self) -> tuple[int, int]:
        """States that were loaded into the layers so far, and merges that they have had and this handle has not."""
        layers = [layer for _, layer in poet_layers(self._model)]
        counts = [int(layer.merge_count) for layer in layers[:1] if not layer.merge_count.is_meta]
        return sum(layer.states_loaded for layer in layers), max(counts, default=self.merges) - self.merges

    def _say_if_loaded_alone(self) -> None:
        """Say where the model's state was loaded since, from before or after a merge, and the optimizer's was not."""
        if sum(layer.states_loaded for _, layer in poet_layers(self._model)) == self._loaded:
            return
        self._loaded, ahead = self._seen()
        own = (p for group in self._counter_groups() for p in group["params"])
        if not any(id(p) in self._rotations and self._optimizer.state.get(p) for p in own):
            self._ahead = ahead  # there are no moments
        elif ahead != self._ahead:
            logger.warning(
                "merge_every: the model was loaded from the other side of a merge, and its optimizer keeps moments of "
                "rotations as they were here; load the optimizer's state as well, or build a new one"
            )

    def _say_if_at_every_step(self, since: int) -> None:
        self._at_once = self._at_once + 1 if since == 1 < self.steps else 0
        if self._at_once == _AT_ONCE:
            logger.warning(
                "merge_every: one step turns rotations by more than angle=%.3g, so it merges after every step; give a "
                "larger angle (0.3 is usual) or a smaller rate of the rotations",
                self.angle,
            )

    @torch.no_grad()
    def _is_early(self, since: int) -> bool:
        """Whether this is a step to look at the rotations, and one of them has passed the angle, on any rank."""
        if self.angle is None or (since % _LOOK_EVERY and since & (since - 1)):
            return False
        layers = [layer for _, layer in poet_layers(self._model)]
        angles = [largest_angle(side) for layer in layers if not layer.frozen for side in layer.sides]
        passed = bool(angles) and bool((_on_cpu(angles) > self.angle).any())
        return on_any_rank([passed], layers[0].skew_in.device)[0]

    def _only_creates_state(self) -> bool:
        """Whether this step had rate and gradients zero, as ``torch.distributed.checkpoint`` takes one to load into."""
        groups = self._counter_groups()
        return all(group.get("lr") == 0 for group in groups) and not any(
            p.grad is not None and local(p.grad).any() for group in groups for p in group["params"]
        )

    def _load(self, optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        former = state_dict.get("poetx", {})  # where the counters were up to version 0.1
        carriers = [any(group is other for other in self._counter_groups()) for group in optimizer.param_groups]
        groups = [
            group | former if carries else group
            for group, carries in zip(state_dict["param_groups"], carriers, strict=False)
        ]
        if any(
            carries and key not in group for group, carries in zip(groups, carriers, strict=False) for key in COUNTERS
        ):
            raise UserError(
                "this optimizer state was saved without poetx.merge_every, so it does not say when the last merge "
                "was; remove the handle before loading it, or start the optimizer anew"
            )
        return {**{key: value for key, value in state_dict.items() if key != "poetx"}, "param_groups": groups}


def _check_held(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, layer in poet_layers(model):
        for side, parameter in zip(("skew_in", "skew_out"), layer.rotations, strict=True):
            if parameter.requires_grad and id(parameter) not in held:
                raise UserError(
                    f"{name}.{side} is not in this optimizer, so its state could not be reset; build the "
                    "optimizer from poetx.param_groups(model, ...) after convert_"
                )


def _refuse_copies() -> Any:
    """``optimizer.__getstate__``: torch leaves hooks out of a copy or pickle, which would then never merge."""
    raise UserError(
        "an optimizer with poetx.merge_every cannot be copied or pickled: the copy would not merge; save its "
        "state_dict(), and load that after merge_every of a new one"
    )


def hook_owner(optimizer: torch.optim.Optimizer, kind: type[Owner]) -> Owner | None:
    """The object of ``kind`` that registered one of its methods to run after ``optimizer.step()``, or None."""
    owners = (getattr(hook, "__self__", None) for hook in getattr(optimizer, "_optimizer_step_post_hooks", {}).values())
    return next((owner for owner in owners if isinstance(owner, kind)), None)


def merge_handle(optimizer: torch.optim.Optimizer) -> MergeHandle | None:
    """What :func:`merge_every` registered on ``optimizer``, or None."""
    return hook_owner(optimizer, MergeHandle)


def merge_every(
    optimizer: torch.optim.Optimizer, model: nn.Module, steps: int = 200, *, angle: float | None = None
) -> MergeHandle:
    """Call :func:`merge_` inside ``optimizer.step()`` after every ``steps``-th step, for any torch optimizer.

    And earlier where a rotation has turned by more than ``angle`` radians, looked at 1, 2, 4, 8, 16, 24, … steps after
    the last merge, so that hardly one turns by more than twice as much: at large rates the series that trains rotations
    would leave the orthogonal matrices before ``steps`` are over (its relative error is angle⁴ for order 3, angle⁸ for
    order 7).

    The counters are in the parameter groups of the rotations, so ``optimizer.state_dict()`` and
    ``torch.distributed.checkpoint`` save them; call this before ``load_state_dict``. A step that a gradient scaler
    skips does not count. The optimizer cannot be copied or pickled then, which would lose the handle. The paper uses
    200 (400 on a quantized base). In a process group every rank merges alike, and a checksum of each layer, compared
    over the ranks after each merge, tells whether it did.

    Raises:
        UserError: ``steps`` below 1, an ``angle`` that is not above 0 or where the series has ended, or with one step
            or sharded parameters, a model with no rotated layer, rotations missing from the optimizer, a wrapper
            without hooks, LBFGS, or a second call for the same optimizer; at the first step, an optimizer that counts
            steps for rotations and other parameters together; after a merge, layers that differ between ranks.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UserError(f"steps={steps!r}: must be a whole number of at least 1 (200 is the paper's)")
    if angle is not None:
        if isinstance(angle, bool) or not isinstance(angle, (int, float)) or not 0 < angle < _LARGEST:
            given = "angle: a larger one" if isinstance(angle, int) and angle >= _LARGEST else f"angle={angle!r}"
            raise UserError(
                f"{given}: must be above 0 and below {_LARGEST}, radians; or None: only every {steps} steps"
            )
        if steps == 1:
            raise UserError(f"angle={angle:g}: has no effect with steps=1; leave it out, or give more steps")
    layers = dict(poet_layers(model))
    if not layers:
        raise UserError(_NOTHING)
    if angle is not None and angle >= 1 and any(layer.order != EXACT for layer in layers.values()):
        raise UserError(f"angle={angle:g}: the series that trains rotations ends below 1; 0.3 is usual")
    if angle is not None and any(is_sharded(layer.skew_in) for layer in layers.values()):
        raise UserError(f"angle={angle:g}: no rank has whole rotations to look at; leave it out and give fewer steps")
    refuse_unfit(optimizer)
    refuse_sharded((p for group in optimizer.param_groups for p in group["params"]), "merge_every", rows=True)
    _check_held(optimizer, model)
    own = rotation_ids(model)
    if any(id(p) not in own for g in optimizer.param_groups if g.get("name") == "rotations" for p in g["params"]):
        raise UserError(
            "merge_every: the optimizer holds rotations of another model, too, which nothing would merge; give one "
            "module that has both, as nn.ModuleList([first, second])"
        )
    if decay := max((g.get("weight_decay") or 0 for g in groups_of(optimizer, own)), default=0):
        logger.warning(
            "merge_every: weight_decay=%.3g of the rotations pulls them back to where the last merge put them; build "
            "the optimizer from poetx.param_groups(model, ...), which decays the rest alone",
            decay,
        )
    for text in idle_arguments(optimizer):
        logger.warning("merge_every: %s", text)
    if merge_handle(optimizer) is not None:
        raise UserError("merge_every is already registered on this optimizer; remove() the first handle")
    return MergeHandle(optimizer, model, steps, angle)
