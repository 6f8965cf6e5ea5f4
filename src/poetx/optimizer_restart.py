"""Restarting what an optimizer keeps of the rotations, as if they had never been stepped: a merge's other half."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor

from poetx.errors import UserError
from poetx.layers.poet import PoetLinear
from poetx.layers.rebased import is_up_to_date, restart_at_next_step

#: What counts merges, in every parameter group that holds rotations.
COUNTERS = ("steps_since_merge", "merges")
#: Step counts that optimizers of other libraries keep in a group; :func:`merge_every` sees whatever a step writes.
_STEP_COUNTS = ("step", "steps", "count", "k", "counter", "update_counter", "looksam_step", "weight_sum", "lr_max")
#: Optimizers for which zeros are the state of a parameter that was never stepped. Their entries stay, because
#: ``torch.distributed.checkpoint`` wants the same ones always; those of other optimizers are dropped.
_FRESH_IS_ZERO = (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adafactor, torch.optim.Adagrad, torch.optim.RMSprop)


def reset_rotations(layer: PoetLinear, optimizer: torch.optim.Optimizer | None) -> None:
    """Drop gradient and state that belong to the rotations before a merge; harmless when done twice.

    Without an optimizer the one that steps them next drops that state.
    """
    for parameter in layer.rotations:
        parameter.grad = None
        if optimizer is not None:
            _reset(optimizer, parameter)
    if optimizer is None:
        restart_at_next_step(layer.label, layer.rotations)
    else:
        is_up_to_date(layer.rotations)


def _reset(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Make the state of one parameter what it was before its first step."""
    state = optimizer.state.get(parameter)
    if not state:
        return
    group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    owner = _owner(optimizer, group)
    plain = type(owner) is torch.optim.SGD and group["dampening"] == 0  # which a first step does without
    if not (plain or fresh_is_zero(owner)):
        optimizer.state.pop(parameter)
        return
    for key, value in state.items():
        if isinstance(value, Tensor):
            value.fill_(
                group["initial_accumulator_value"] if type(owner) is torch.optim.Adagrad and key == "sum" else 0
            )
        elif isinstance(value, (int, float)):
            state[key] = type(value)(0)


def fresh_is_zero(optimizer: torch.optim.Optimizer) -> bool:
    """Whether zeros are the state of a parameter that ``optimizer`` never stepped."""
    return type(optimizer) in _FRESH_IS_ZERO or getattr(optimizer, "fresh_is_zero", False)


def _owner(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimizer that steps this group: one of several, if ``optimizer`` combines them."""
    return optimizer.optimizers[group["optimizer"]] if hasattr(optimizer, "optimizers") else optimizer  # type: ignore[attr-defined]


def groups_of(optimizer: torch.optim.Optimizer, rotations: Set[int]) -> list[dict[str, Any]]:
    """The parameter groups that hold rotations, given by their ids."""
    return [group for group in optimizer.param_groups if any(id(p) in rotations for p in group["params"])]


def check_optimizer(optimizer: object) -> None:
    """Raise :class:`UserError` where something else was given for an optimizer."""
    if not hasattr(optimizer, "param_groups"):
        raise UserError(f"{type(optimizer).__name__} was given for an optimizer, such as torch.optim.AdamW(...)")


def refuse_unfit(optimizer: torch.optim.Optimizer) -> None:
    """Refuse wrappers whose step runs no hooks, and optimizers with state that is not of one parameter."""
    check_optimizer(optimizer)
    kind = type(optimizer).__name__
    if not hasattr(optimizer, "_optimizer_load_state_dict_pre_hooks"):  # made without torch's own __init__
        inner = type(getattr(optimizer, "optimizer", None)).__name__
        raise UserError(
            f"{kind} only wraps an optimizer, so a merge could not reset what it keeps itself; give the {inner} "
            f"inside, and step that without {kind} if it keeps copies of parameters, as Lookahead does"
        )
    if isinstance(inner := getattr(optimizer, "optim", None), torch.optim.Optimizer):  # ZeroRedundancyOptimizer
        raise UserError(
            f"{kind} keeps its state in an {type(inner).__name__} of its own, each rank a part of it, which a merge "
            "could not reset; use the optimizer itself (rotations have little state), or fully_shard"
        )
    joint = next((key for key in optimizer.state if not isinstance(key, Tensor)), None)
    if joint is not None or isinstance(optimizer, torch.optim.LBFGS):
        raise UserError(
            f"{kind} keeps {'curvature' if joint is None else repr(joint)} of all parameters together, which can "
            "neither restart nor be saved for some of them; use an optimizer whose state is by parameter, such as AdamW"
        )


def idle_arguments(optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """Texts about arguments of an optimizer that no parameter group takes, all of which have another value."""
    usual = inspect.signature(type(optimizer)).parameters
    for key, value in optimizer.defaults.items():
        own = [group.get(f"initial_{key}", group.get(key)) for group in optimizer.param_groups]
        number = isinstance(value, (int, float)) and key in usual and value != usual[key].default
        if number and not any(isinstance(other, Tensor) or other == value for other in own):
            values = ", ".join(sorted({f"{other:g}" for other in own if isinstance(other, (int, float))}))
            yield (
                f"{type(optimizer).__name__}'s {key}={value:g} is without effect: every parameter group has its own "
                f"({values}); give it to poetx.param_groups(model, ...)"
            )


class GroupRestart:
    """Restarts what an optimizer itself counts in the groups of the rotations.

    Whatever ``step()`` changes in a group, but the learning rate, is state: every optimizer of ``pytorch_optimizer``
    has its step count there, others a step size that they found.
    """

    def __init__(self, groups: Iterable[dict[str, Any]] = ()) -> None:
        self._written: set[str] = set(_STEP_COUNTS)
        self._before: list[dict[str, Any]] = []
        self._fresh = [self._entries(group) for group in groups]

    def _entries(self, group: dict[str, Any]) -> dict[str, Any]:
        return {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "lr", *COUNTERS)}

    def before_step(self, groups: list[dict[str, Any]]) -> None:
        self._before = [{key: self._mark(value) for key, value in group.items()} for group in groups]

    def after_step(self, groups: list[dict[str, Any]]) -> None:
        for group, before in zip(groups, self._before, strict=False):
            for key, value in group.items():
                if key not in ("params", "lr", *COUNTERS) and (key not in before or before[key] != self._mark(value)):
                    self._written.add(key)

    @staticmethod
    def _mark(value: Any) -> Any:
        return (id(value), value._version) if isinstance(value, Tensor) else value

    def check(self, optimizer: torch.optim.Optimizer, rotations: Set[int]) -> None:
        """Refuse state that cannot start anew without that of other parameters."""
        refuse_unfit(optimizer)
        for group in groups_of(optimizer, rotations):
            found = sorted(self._written & group.keys())
            if found and any(id(p) not in rotations for p in group["params"]):
                raise UserError(
                    f"{type(_owner(optimizer, group)).__name__} keeps {found[0]!r} in the parameter group, and this "
                    "group holds rotations and other parameters, so a merge could not reset it for the rotations "
                    "alone; build the optimizer from poetx.param_groups(model, ...)"
                )

    def __call__(self, optimizer: torch.optim.Optimizer, rotations: Set[int]) -> None:
        for index, group in enumerate(groups_of(optimizer, rotations)):
            fresh = self._fresh[index] if index < len(self._fresh) else _owner(optimizer, group).defaults
            for key in self._written & group.keys():
                if key in fresh:
                    group[key] = copy.deepcopy(fresh[key])
                else:
                    del group[key]
