"""What a training step took, measured while it runs; what it will take is predicted by :mod:`poetx.planner`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poetx.lazy import lazy_names

if TYPE_CHECKING:
    from poetx.memory.measure import MemoryProbe, measure_memory
    from poetx.memory.tracker import PhasePeak

__all__ = ["MemoryProbe", "PhasePeak", "measure_memory"]

__getattr__ = lazy_names(
    __name__,
    {"poetx.memory.measure": ("MemoryProbe", "measure_memory"), "poetx.memory.tracker": ("PhasePeak",)},
)
