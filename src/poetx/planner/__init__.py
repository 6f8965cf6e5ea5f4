"""Will it fit: the memory of a training step, predicted before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poetx.lazy import lazy_names

if TYPE_CHECKING:
    from poetx.planner.batch_limit import BatchLimit, largest_batch
    from poetx.planner.estimate import GIB, MemoryEstimate, estimate_memory
    from poetx.planner.setup import METHODS, SHAPES, TrainingSetup, full_stack, paper

__all__ = [
    "GIB",
    "METHODS",
    "SHAPES",
    "BatchLimit",
    "MemoryEstimate",
    "TrainingSetup",
    "estimate_memory",
    "full_stack",
    "largest_batch",
    "paper",
]

__getattr__ = lazy_names(
    __name__,
    {
        "poetx.planner.estimate": ("GIB", "MemoryEstimate", "estimate_memory"),
        "poetx.planner.batch_limit": ("BatchLimit", "largest_batch"),
        "poetx.planner.setup": ("METHODS", "SHAPES", "TrainingSetup", "full_stack", "paper"),
    },
)
