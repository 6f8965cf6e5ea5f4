"""Dequantizing in one pass: a weight costs its code's bits read and its own bits written.

Plain torch takes five passes over float32 temporaries. The product that follows stays the vendor's.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from poetx.ops.triton.tuning import ceil_div, launch

_TILE = 1024


@triton.jit
def dequantize_kernel(
    codes,
    scale,
    offset,
    levels,
    out,
    C,
    run,
    row_bytes,
    groups,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    MASK: tl.constexpr,
    TOP: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    """One row's tile of columns: column c is in slot c // run of byte c mod run, and in group c // GROUP."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = c < C
    byte = tl.load(codes + row * row_bytes + c % run, mask=inside, other=0).to(tl.int32)
    code = (byte >> (c // run * WIDTH)) & MASK
    group = row * groups + c // GROUP
    s = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
    if KIND == "table":
        value = tl.load(levels + code, mask=inside, other=0.0) * s
    elif KIND == "bipolar":
        value = code.to(tl.float32) * (2 * s) - TOP * s
    else:
        value = code.to(tl.float32) * s + tl.load(offset + group, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * C + c, value.to(out.dtype.element_ty), mask=inside)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    levels: Tensor | None,
    out: Tensor,
    *,
    group_size: int,
    bits: int,
    top: float,
    kind: str,
) -> Tensor:
    """The twin of :func:`poetx.ops.quantize.dequantize` for codes of one plane (8, 4 or 2 bits), into ``out`` [m, n].

    ``levels``: float32 [2^bits] by code, for table formats.
    """
    rows, columns = out.shape
    if out.numel():
        launch(
            dequantize_kernel,
            (rows, ceil_div(columns, _TILE)),
            codes,
            scale,
            scale if offset is None else offset,
            scale if levels is None else levels,
            out,
            columns,
            ceil_div(columns * bits, 8),
            codes.shape[1],
            scale.shape[1],
            GROUP=group_size,
            WIDTH=bits,
            MASK=2**bits - 1,
            TOP=top,
            KIND=kind,
            TILE=_TILE,
        )
    return out
