"""Memory: what a training step will take, before it runs, and what it took, while it runs."""

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
