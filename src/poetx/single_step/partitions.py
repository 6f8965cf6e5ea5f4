"""Partitions: which coordinates share a block, so that a rotation may mix them."""

from __future__ import annotations

import torch
from torch import Tensor

from poetx.layer import stream
from poetx.ops.single_step import block_count, strided_order


def partition(kind: str, index: int, size: int, block_size: int, *, seed: int, name: str, draw: int) -> Tensor:
    """Order of the coordinates [size], int64; blocks are ``block_size`` neighbours in it, the last one shorter.

    ``"structured"``: partition 0 is contiguous, 1 is strided (coordinates k, k + r, k + 2r, … for r blocks) where
    b ≥ r, further ones are random. ``"random"``: all are, from (seed, name, index, draw).

    A write mixes the pairs that share a block, (b − 1)/(n − 1) of all, and one fixed partition never mixes others.
    Contiguous and strided together connect any two coordinates by at most two writes of their side, so within one
    turn of 2K steps. With b < r they would leave b² coordinates to themselves for ever, hence the random one.
    Partitions drawn anew mix every pair directly in about ``2 ln(n) · n/b`` draws.
    """
    if kind == "structured" and index == 0:
        return torch.arange(size)
    if kind == "structured" and index == 1 and block_count(size, block_size) <= block_size:
        return strided_order(size, block_size)
    return torch.randperm(size, generator=stream(seed, name, draw, f"partition-{index}"), device="cpu")
