"""Dequantizing in one pass, and the product with a stored weight that never leaves the registers.

Plain torch takes five passes over float32 temporaries to dequantize; here a weight costs its code's bits read and its
own bits written, and the product that follows stays the vendor's. A product of few tokens takes as long as reading its
weight does: :func:`product` reads the codes alone, a fifth of the bytes for int8 and a ninth for int4 of reading them,
writing bfloat16 and reading that. Every tile of tokens decodes the whole weight anew, though.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx.ops.triton.tuning import ceil_div, float32_precision, interpreted, launch, tile_size

_TILE = 1024
#: Of a program of the product: tokens at most, rows of the weight, and bytes of each at once.
_TOKENS, _ROWS, _BYTES = 64, 32, 64


@triton.jit
def _decode(code, s, levels, offset, mask, TOP: tl.constexpr, KIND: tl.constexpr):
    """float32 of codes with scale s; pointers to the levels by code and to each weight's offset, where there are."""
    if KIND == "table":
        value = tl.load(levels + code, mask=mask, other=0.0) * s
    elif KIND == "bipolar":
        value = code.to(tl.float32) * (2 * s) - TOP * s
    else:
        value = code.to(tl.float32) * s + tl.load(offset, mask=mask, other=0.0).to(tl.float32)
    return value


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
    value = _decode(code, s, levels, offset + group, inside, TOP, KIND)
    tl.store(out + row * C + c, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def product_kernel(
    x,
    codes,
    scale,
    offset,
    levels,
    out,
    N,
    R,
    C,
    row_bytes,
    groups,
    x_row,
    x_column,
    RUN: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    MASK: tl.constexpr,
    TOP: tl.constexpr,
    KIND: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_R: tl.constexpr,
    STEP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = x · Wᵀ: TILE_N tokens by TILE_R rows of W, STEP bytes of each row at a time, which are read once.

    The codes in one byte belong to columns that are RUN apart: one product for each of the byte's slots.
    """
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    r = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)
    row = r.to(tl.int64)[:, None]
    total = tl.full([TILE_N, TILE_R], 0.0, tl.float32)
    for start in range(0, RUN, STEP):
        place = start + tl.arange(0, STEP)
        here = (r < R)[:, None] & (place < RUN)[None, :]
        byte = tl.load(codes + row * row_bytes + place[None, :], mask=here, other=0).to(tl.int32)
        for slot in tl.static_range(0, 8 // WIDTH):  # pyright: ignore[reportGeneralTypeIssues]
            c = slot * RUN + place
            inside = (place < RUN) & (c < C)
            mask = here & inside[None, :]
            group = row * groups + (c // GROUP)[None, :]
            s = tl.load(scale + group, mask=mask, other=0.0).to(tl.float32)
            W = _decode((byte >> (slot * WIDTH)) & MASK, s, levels, offset + group, mask, TOP, KIND)
            W = W.to(x.dtype.element_ty)  # rounded as a dequantized weight is
            at = n.to(tl.int64)[:, None] * x_row + c[None, :] * x_column
            left = tl.load(x + at, mask=(n < N)[:, None] & inside[None, :], other=0.0)
            total = tl.dot(left.to(OPERAND), tl.trans(W).to(OPERAND), total, input_precision=PRECISION)
    mask = (n < N)[:, None] & (r < R)[None, :]
    tl.store(out + n.to(tl.int64)[:, None] * R + r[None, :], total.to(out.dtype.element_ty), mask=mask)


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


def product(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    levels: Tensor | None,
    *,
    group_size: int,
    bits: int,
    top: float,
    kind: str,
) -> Tensor:
    """x [N, n] · Wᵀ → [N, m] in x's dtype, sums in float32, with W [m, n] stored as for :func:`dequantize`."""
    tokens, columns = x.shape
    rows = codes.shape[0]
    out = x.new_empty(tokens, rows)
    if out.numel():
        narrow, tile = x.dtype == torch.bfloat16, tile_size(tokens, _TOKENS)
        launch(
            product_kernel,
            (ceil_div(rows, _ROWS), ceil_div(tokens, tile)),
            x,
            codes,
            scale,
            scale if offset is None else offset,
            scale if levels is None else levels,
            out,
            tokens,
            rows,
            columns,
            codes.shape[1],
            scale.shape[1],
            x.stride(0),
            x.stride(1),
            RUN=ceil_div(columns * bits, 8),  # a bound known when compiling: the interpreter takes no other
            GROUP=group_size,
            WIDTH=bits,
            MASK=2**bits - 1,
            TOP=top,
            KIND=kind,
            TILE_N=tile,
            TILE_R=_ROWS,
            STEP=_BYTES,
            # The interpreter multiplies the bit patterns of bfloat16; in float32 the products of bfloat16 are exact.
            OPERAND=tl.bfloat16 if narrow and not interpreted(product_kernel) else tl.float32,
            PRECISION=float32_precision(narrow),
        )
    return out
