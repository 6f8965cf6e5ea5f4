"""Will it fit: the memory of a training step, predicted from its recipe before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poetx.lazy import lazy_names

if TYPE_CHECKING:
    from poetx.planner.batch_limit import BatchLimit, largest_batch
    from poetx.planner.estimate import GIB, MemoryEstimate, estimate_memory

__all__ = ["GIB", "BatchLimit", "MemoryEstimate", "estimate_memory", "largest_batch"]

__getattr__ = lazy_names(
    __name__,
    {
        "poetx.planner.estimate": ("GIB", "MemoryEstimate", "estimate_memory"),
        "poetx.planner.batch_limit": ("BatchLimit", "largest_batch"),
    },
)
