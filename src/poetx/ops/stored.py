"""A frozen weight as an operator takes it: tensors, and what they mean.

To store weights in a new way, add a ``kind`` here and an object to :mod:`poetx.layers.weights`; layers and autograd
functions stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from poetx.ops.host import bring
from poetx.ops.quantize import Quantized, dequantize, format_of

#: Begins the kind of weights that are brought to the device at every use.
HOST = "host "


class Stored(NamedTuple):
    """The tensors of one weight [rows, columns], and how :func:`fetch` reads them.

    kind: ``"dense"``, or the name of a weight format (:func:`poetx.ops.quantize.format_of`); after :data:`HOST` where
        the tensors are in host memory.
    tensors: ``(weight,)`` if dense; else ``(codes, scale)``, or ``(codes, scale, offset)`` for an affine format.
    group_size: neighbours of a row that share a scale; 0 if dense.
    """

    tensors: tuple[Tensor, ...]
    kind: str = "dense"
    group_size: int = 0


def fetch(
    tensors: Sequence[Tensor], kind: str, group_size: int, columns: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The weight [rows, columns] in ``dtype`` on ``device``: the very tensor where that is stored, else a new one."""
    if kind.startswith(HOST):
        tensors, kind = bring(tuple(tensors), device), kind.removeprefix(HOST)
    if kind == "dense":
        return tensors[0].to(dtype)
    codes, scale, *offset = tensors
    weight = Quantized(codes, scale, offset[0] if offset else None, columns, format_of(kind), group_size)
    return dequantize(weight, dtype)
