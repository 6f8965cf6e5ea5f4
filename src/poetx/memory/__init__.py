"""What a training step took, measured while it runs; what it will take is predicted by :mod:`poetx.planner`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from poetx.lazy import lazy_names, moved_names

if TYPE_CHECKING:
    from poetx.memory.measure import MemoryProbe, measure_memory
    from poetx.memory.tracker import PhasePeak

__all__ = ["MemoryProbe", "PhasePeak", "measure_memory"]

_OWN = {"poetx.memory.measure": ("MemoryProbe", "measure_memory"), "poetx.memory.tracker": ("PhasePeak",)}
_own = lazy_names(__name__, _OWN)
_moved = moved_names(
    __name__,
    {
        "poetx.planner.estimate": ("GIB", "MemoryEstimate", "estimate_memory"),
        "poetx.planner.batch_limit": ("BatchLimit", "largest_batch"),
    },
)


def __getattr__(name: str) -> Any:
    return _own(name) if name in __all__ else _moved(name)
