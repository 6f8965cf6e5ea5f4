"""Settings of optimizers and of parameter groups: which there are, and which values they take."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from poetx.errors import UserError, nearest

#: Optimizers that :func:`poetx.optim.build_optimizer` knows by name.
OPTIMIZERS = ("adamw", "sgd", "adafactor", "smmf", "hfac")
#: Optimizers of dense matrices, beside AdamW on the rest: :mod:`poetx.optim.baselines.rules`.
LOW_RANK = ("galore", "fira", "apollo")
#: Rules that step an end of the model, embedding or head, too.
WITH_ENDS = ("scale", "racs")
MATRIX_OPTIMIZERS = ("muon", "muon-hyperball", "rmnp", "scale", "sinkgd", "racs", *LOW_RANK, "apollo-mini")

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda v: v >= 0, "must be a finite number of at least 0"),
    "poet_lr": (lambda v: v >= 0, "must be a finite number of at least 0"),
    "weight_decay": (lambda v: v >= 0, "must be a finite number of at least 0"),
    "eps": (lambda v: v > 0, "must be positive and finite, or a gradient of zero divides 0 by 0"),
    "betas": (lambda v: 0 <= v < 1, "must be numbers of at least 0 and below 1"),
    "beta": (lambda v: 0 <= v < 1, "must be at least 0 and below 1"),
    "momentum": (lambda v: 0 <= v < 1, "must be at least 0 and below 1"),
    "clip": (lambda v: v > 0, "must be positive and finite (1 is the paper's)"),
    "max_norm": (lambda v: v > 0, "must be positive and finite, or None for no clipping"),
    "growth": (lambda v: 0 <= v <= 1, "must be between 0 and 1 (0.999 is usual)"),
    "decay": (lambda v: -1 <= v <= 0, "must be between -1 and 0 (-0.8 for transformers, else -0.5)"),
    "angle": (lambda v: 0 < v < 0.5, "radians a step, between 0 and 0.5 (0.012 is usual)"),
    "norm_growth": (lambda v: 0 <= v < 1, "must be at least 0 and below 1 (8 / steps is usual)"),
    "row_momentum": (lambda v: 0 <= v < 1, "must be at least 0 and below 1"),
    "ball_momentum": (lambda v: 0 <= v < 1, "must be at least 0 and below 1"),
    "racs_beta": (lambda v: 0 <= v < 1, "must be at least 0 and below 1"),
    "rank": (lambda v: v >= 1 and v == int(v), "must be a whole number of at least 1"),
    "scale": (lambda v: v > 0, "must be positive and finite"),
    "limit": (lambda v: v >= 1, "must be at least 1 (1.01 is usual)"),
    "over": (lambda v: v in (0, 1), "must be 1, for rows, or 0, for columns"),
    "iterations": (lambda v: v >= 1 and v == int(v), "must be a whole number of at least 1"),
    "subspace_gap": (lambda v: v >= 1 and v == int(v), "must be a whole number of at least 1 (200 is usual)"),
    "sketch_gap": (lambda v: v >= 1 and v == int(v), "must be a whole number of at least 1 (200 is usual)"),
    "seed": (lambda v: v == int(v), "must be a whole number"),
}
_SEVERAL = ("betas", "eps")  # Adafactor's eps is a pair
#: Keys of groups that are no argument of an optimizer: ours, and those that schedulers write.
_GROUP_KEYS = (
    "name",
    "params",
    "param_names",
    "optimizer",
    "rotate",
    "state_dtype",
    "eps_mode",
    "growth",
    "decay",
    "clip",
)
#: What torch's AdamW leaves in the groups that it was given: true of ours as well.
_GROUP_KEYS += ("decoupled_weight_decay",)
_GROUP_KEYS += ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")
#: Settings of torch's optimizers that change no number.
_SPEED = ("foreach", "fused", "capturable", "differentiable")
#: How alike an unknown key of a group and a known one must be to be a slip; other keys may be labels of the user's own.
_SLIP = 0.82


def check_numbers(settings: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` on a number that is not finite or outside its range; None and other settings pass."""
    for name, value in settings.items():
        if name not in _RANGES or value is None:
            continue
        holds, words = _RANGES[name]
        several = isinstance(value, (tuple, list))
        good = name in _SEVERAL if several else name != "betas"
        for part in value if several else (value,):
            number = _number(part)
            good = good and (part is None or (number is not None and holds(number)))
        if not good:
            raise UserError(f"{name}={value!r}: {words}")


def _number(value: Any) -> float | None:
    """A finite number, also one in a tensor, as a float; None for anything else."""
    if isinstance(value, (bool, str, bytes)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def check_group(group: Mapping[str, Any], who: str, known: tuple[str, ...] | None = None) -> None:
    """Raise :class:`UserError` on numbers outside their range, and on a key that is nearly one of ``known``.

    Args:
        who: for messages. known: None for the settings of every optimizer of torch and poetx.
    """
    check_numbers(group)
    known = known_settings() if known is None else known
    for key, value in group.items():
        if key not in known and (guess := nearest(key, known, cutoff=_SLIP)):
            raise UserError(f"{who}: {key}={value!r} in a parameter group would have no effect{guess}")


def check_effect(group: Mapping[str, Any], who: str, own: Iterable[str]) -> None:
    """Raise :class:`UserError` on a setting of torch's optimizers that is not one of ``own`` and changes something."""
    usual = _torch_settings()
    for key in group.keys() - set(own) - {*_GROUP_KEYS, *_SPEED}:
        value = group[key]
        if key in usual and value not in (None, 0, usual[key]):
            raise UserError(
                f"{who}: {key}={value!r} in a parameter group is a setting of other optimizers, and would have no "
                "effect; leave it out"
            )


@functools.cache
def known_settings() -> tuple[str, ...]:
    """Arguments of the optimizers of torch and poetx, and the keys that groups have beside them."""
    return (*sorted(_torch_settings()), *_GROUP_KEYS)


@functools.cache
def _torch_settings() -> dict[str, Any]:
    """Every argument of an optimizer of torch, with the value that Adam has where nobody gives one."""
    import torch

    kinds = [
        kind for kind in vars(torch.optim).values() if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
    ]
    arguments = {name for kind in kinds for name in inspect.signature(kind).parameters}
    adam = inspect.signature(torch.optim.Adam).parameters
    names = arguments - {"args", "kwargs", "defaults"}
    return {name: adam[name].default if name in adam else None for name in names}
