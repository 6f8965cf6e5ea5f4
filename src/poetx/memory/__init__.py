"""Memory: what a training step will take, before it runs, and what it took, while it runs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from poetx.memory.estimate import GIB, MemoryEstimate, PhasePeak, estimate_memory
    from poetx.memory.measure import MemoryProbe, measure_memory
    from poetx.memory.plan import BatchLimit, largest_batch
    from poetx.memory.setup import METHODS, SHAPES, TrainingSetup, full_stack, paper

__all__ = [
    "GIB",
    "METHODS",
    "SHAPES",
    "BatchLimit",
    "MemoryEstimate",
    "MemoryProbe",
    "PhasePeak",
    "TrainingSetup",
    "estimate_memory",
    "full_stack",
    "largest_batch",
    "measure_memory",
    "paper",
]

# Looked up when first used, as in the package: the command line registers `poetx memory` without torch.
_HOMES = {
    "estimate": ("GIB", "MemoryEstimate", "PhasePeak", "estimate_memory"),
    "measure": ("MemoryProbe", "measure_memory"),
    "plan": ("BatchLimit", "largest_batch"),
    "setup": ("METHODS", "SHAPES", "TrainingSetup", "full_stack", "paper"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
