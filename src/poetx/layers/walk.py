"""Finding the layers that :func:`poetx.convert_` made."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from poetx.errors import UserError
from poetx.layers.base import ConvertedLinear
from poetx.layers.hosted import HostedLinear
from poetx.layers.poet import PoetLinear
from poetx.layers.single_step import SingleStepLinear

logger = logging.getLogger(__name__)
L = TypeVar("L", bound=ConvertedLinear)


def poet_layers(model: nn.Module) -> Iterator[tuple[str, PoetLinear]]:
    """Every :class:`PoetLinear` of ``model`` once, with its dotted name."""
    return _layers(model, PoetLinear)


def single_step_layers(model: nn.Module) -> Iterator[tuple[str, SingleStepLinear]]:
    """Every :class:`SingleStepLinear` of ``model`` once, with its dotted name."""
    return _layers(model, SingleStepLinear)


def converted_layers(model: nn.Module) -> Iterator[tuple[str, HostedLinear]]:
    """Every layer that :func:`convert_` made, of either method, once, with its dotted name."""
    return _layers(model, HostedLinear)


def rotation_ids(model: nn.Module) -> set[int]:
    """``id`` of every packed rotation of ``model``."""
    return {id(p) for _, layer in poet_layers(model) for p in layer.rotations}


def warn_of_one_name(model: nn.Module) -> None:
    """Warn where fresh layers of one shape have one name and seed, as layers made by hand without ``name=``."""
    seen: dict[tuple[Any, ...], str] = {}
    for name, layer in converted_layers(model):
        first = seen.setdefault((layer.config.seed, layer.name, layer.out_features, layer.in_features), name)
        if first != name and layer.config.init != "keep":
            logger.warning(
                "%s and %s were both made as name=%r with seed=%d, which decide fresh weights and permutations: they "
                "are the same in both; give each its own name, as %s(..., name=%r)",
                first,
                name,
                layer.name,
                layer.config.seed,
                type(layer).__name__,
                name,
            )
            return


def check_model(model: object) -> None:
    """Raise :class:`UserError` where something else was given for a model, such as the argument before or after it."""
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        hint = "check the arguments' order"
        if kind == "ConversionReport":
            hint = "convert_ changes the model in place, and what it returns is a report"
        raise UserError(f"{kind} was given for a model, which must be a torch.nn.Module; {hint}")


def _layers(model: nn.Module, kind: type[L]) -> Iterator[tuple[str, L]]:
    check_model(model)
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kind))
