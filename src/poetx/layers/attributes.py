"""What a user has hung on a layer or on its weight, for the layer that takes its place."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

#: Set by transformers, or by a layer of ours while it is used; nobody misses them.
_PASSING = {"_is_hf_initialized", "_hollow", "shared_blocks", "shared_in", "shared_out", "blocks_together", "_mark"}
_PASSING |= {"states_loaded"}


def carry_attributes(source: nn.Module, target: nn.Module) -> list[str]:
    """Give ``target`` the attributes that somebody set on ``source`` or its weight; the names of those it cannot have.

    These are names that ``target`` uses itself, methods that are bound to ``source``, and attributes of a weight
    where ``target`` stores it quantized.
    """
    lost = [key for key in vars(source).keys() - _usual(type(source)) if not _take(source, target, key)]
    weight, successor = _weight(source), _weight(target)
    if weight is not None:
        lost += [f"weight.{key}" for key in vars(weight) if successor is None or not _take(weight, successor, key)]
    return sorted(key for key in lost if key.removeprefix("weight.") not in _PASSING)


def _take(source: Any, target: Any, key: str) -> bool:
    value, own = vars(source)[key], vars(target)
    if (
        key not in {*own, *_PASSING}
        and not hasattr(type(target), key)
        and getattr(value, "__self__", None) is not source
    ):
        own[key] = value
    if key not in own:
        return False
    return own[key] is value or (isinstance(value, str) and own[key] == value)  # layers named by their owner


def _weight(layer: nn.Module) -> nn.Parameter | None:
    return layer._parameters.get(getattr(layer, "weight_name", "weight"))


@functools.cache
def _usual(kind: type) -> set[str]:
    """Names in the ``__dict__`` of every layer of a class."""
    with torch.device("meta"):
        return {*vars(kind(2, 2))}
