"""Finding the layers that :func:`poetx.convert_` made."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from poetx.layers.poet import PoetLinear
from poetx.layers.single_step import SingleStepLinear


def poet_layers(model: nn.Module) -> Iterator[tuple[str, PoetLinear]]:
    """Every :class:`PoetLinear` of ``model`` once, with its dotted name."""
    for name, module in model.named_modules():
        if isinstance(module, PoetLinear):
            yield name, module


def single_step_layers(model: nn.Module) -> Iterator[tuple[str, SingleStepLinear]]:
    """Every :class:`SingleStepLinear` of ``model`` once, with its dotted name."""
    for name, module in model.named_modules():
        if isinstance(module, SingleStepLinear):
            yield name, module


def converted_layers(model: nn.Module) -> Iterator[tuple[str, PoetLinear | SingleStepLinear]]:
    """Every layer that :func:`convert_` made, of either method, once, with its dotted name."""
    for name, module in model.named_modules():
        if isinstance(module, (PoetLinear, SingleStepLinear)):
            yield name, module
