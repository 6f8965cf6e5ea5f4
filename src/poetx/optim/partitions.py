"""Partitions: which coordinates share a block, so that a rotation may mix them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poetx.config import PoetConfig
from poetx.layers.poet import stream
from poetx.ops.single_step import block_count, strided_order
from poetx.optim.orthogonalize import Move


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


class Orders:
    """The partitions in force, on their devices; structured ones are shared by all sides of one size.

    ``resample_every``: random ones are drawn anew after so many steps.
    """

    def __init__(self, config: PoetConfig, resample_every: int | None) -> None:
        self._config, self._resample = config, resample_every
        self._orders: dict[tuple[Any, ...], Tensor] = {}
        self._drawn: dict[tuple[Any, ...], int] = {}

    def get(self, move: Move, size: int, block_size: int, name: str, step: int, device: torch.device) -> Tensor:
        """That of one (side, index) of the matrix ``name`` after so many steps, in the form of ``Sinks``."""
        kind, seed = self._config.partition_kind, self._config.seed
        own = "" if kind == "structured" and move.index < 2 else f"{name}/{move.side}"
        draw = step // self._resample if self._resample else 0
        key = (move.index, size, block_size, own, device)
        if key not in self._orders or self._drawn.get(key) != draw:
            order = partition(kind, move.index, size, block_size, seed=seed, name=own, draw=draw)
            order = order.to(device, torch.int32)
            if kind == "structured" and move.index == 0:
                order = order[:0]
            # In place, so that the layer that reads it, compiled or not, sees the new one.
            self._orders[key] = self._orders[key].copy_(order) if key in self._orders else order
            self._drawn[key] = draw
        return self._orders[key]
