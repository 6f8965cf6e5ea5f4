"""A frozen weight as an operator takes it: tensors, and what they mean.

A new way of storing weights is a new ``kind`` here and an object in :mod:`poetx.layers.weights`; neither the layers nor
the autograd functions know one from another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from poetx.ops.quantize import Packed, dequantize, format_of


class Stored(NamedTuple):
    """A weight [rows, columns].

    tensors: ``(weight,)`` for ``kind="dense"``; ``(codes, scale)`` or ``(codes, scale, offset)`` for a weight format,
    whose groups have ``group_size`` neighbours of a row.
    """

    tensors: tuple[Tensor, ...]
    kind: str = "dense"
    group_size: int = 0


def fetch(tensors: Sequence[Tensor], kind: str, group_size: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight [rows, columns] in ``dtype``: the very tensor where that is what is stored, else a new one."""
    if kind == "dense":
        return tensors[0].to(dtype)
    codes, scale, *offset = tensors
    return dequantize(Packed(codes, scale, offset[0] if offset else None, columns, format_of(kind), group_size), dtype)
