"""Partitions: which coordinates share a block, so that a rotation may mix them."""

from __future__ import annotations

import torch
from torch import Tensor

from poetx.layer import stream
from poetx.ops.single_step import strided_order


def partition(kind: str, index: int, size: int, block_size: int, *, seed: int, name: str, draw: int) -> Tensor:
    """Order of the coordinates [size], int64; blocks are ``block_size`` neighbours in it, the last one shorter.

    ``"structured"``: partition 0 is contiguous, 1 is strided (coordinates k, k + r, k + 2r, … for r blocks), further
    ones are random. ``"random"``: all are, from (seed, name, index, draw).

    With a contiguous and a strided partition and b ≥ r, any two coordinates are connected through at most two blocks.
    """
    if kind == "structured" and index == 0:
        return torch.arange(size)
    if kind == "structured" and index == 1:
        return strided_order(size, block_size)
    return torch.randperm(size, generator=stream(seed, name, draw, f"partition-{index}"), device="cpu")
