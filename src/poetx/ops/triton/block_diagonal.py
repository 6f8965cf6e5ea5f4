"""Permuted block-diagonal products and block outer products on the GPU.

One kernel multiplies by the blocks, reading its input and writing its output through a permutation where there is one,
so that no permuted copy of an activation is written. Reading single features at random costs a GPU a whole 32-byte
sector each, though, so a second plan moves whole rows through shared memory first (:func:`permute`) and runs the same
kernel without the permutation: the same sums in the same order. Which is faster depends on sizes and device and is
timed once (:func:`poetx.ops.triton.tuning.fastest`).

bfloat16 operands are multiplied as such and summed in float32; float32 operands as
:func:`poetx.ops.triton.tuning.float32_precision` says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx.ops.triton.tuning import ceil_div, fastest, float32_precision, interpreted, launch, power_of_2, tile_size


@triton.jit
def rotate_kernel(
    x,
    G,
    source,
    target,
    bias,
    out,
    N,
    F,
    x_row,
    x_column,
    B: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
    BIAS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_J: tl.constexpr,
    STEP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[:, target] = x[:, source] · Diag(G) + bias[target], or by the blocks' transposes.

    With BIAS but without WRITES the bias is read through ``target`` all the same, for the permutation to follow.

    Program: TILE_N tokens × TILE_J features of one block. The blocks of a token tile are neighbours in the launch
    order, so that its rows are read from memory once and from the L2 cache after that.
    """
    tiles: tl.constexpr = (B + TILE_J - 1) // TILE_J
    blocks = (F + B - 1) // B
    place = tl.program_id(0) % (blocks * tiles)
    k = place // tiles
    n = tl.program_id(0) // (blocks * tiles) * TILE_N + tl.arange(0, TILE_N)
    j = place % tiles * TILE_J + tl.arange(0, TILE_J)
    limit = tl.minimum(F - k * B, B)
    x_n = x + n.to(tl.int64)[:, None] * x_row
    G_k = G + k * (B * B)
    total = tl.full([TILE_N, TILE_J], 0.0, tl.float32)
    for start in range(0, B, STEP):
        i = start + tl.arange(0, STEP)
        column = k * B + i
        if READS:
            column = tl.load(source + column, mask=i < limit, other=0)
        left = tl.load(x_n + column[None, :] * x_column, mask=(n < N)[:, None] & (i < limit)[None, :], other=0.0)
        position = j[None, :] * B + i[:, None] if TRANSPOSED else i[:, None] * B + j[None, :]
        right = tl.load(G_k + position, mask=(i < limit)[:, None] & (j < limit)[None, :], other=0.0)
        total = tl.dot(left.to(OPERAND), right.to(OPERAND), total, input_precision=PRECISION)
    column = k * B + j
    if WRITES or BIAS:
        moved = tl.load(target + column, mask=j < limit, other=0)
        if BIAS:
            total += tl.load(bias + moved, mask=j < limit, other=0.0).to(tl.float32)[None, :]
        if WRITES:
            column = moved
    mask = (n < N)[:, None] & (j < limit)[None, :]
    tl.store(out + n.to(tl.int64)[:, None] * F + column[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def outer_kernel(
    x,
    y,
    x_source,
    y_source,
    out,
    N,
    F,
    x_row,
    x_column,
    y_row,
    y_column,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
    READS_X: tl.constexpr,
    READS_Y: tl.constexpr,
    TILE_I: tl.constexpr,
    TILE_J: tl.constexpr,
    STEP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[chunk, k] = x_kᵀ · y_k over one chunk of tokens, either read through a permutation; zero beyond a ragged end.

    Program: TILE_I × TILE_J of one block over one chunk. All programs of a chunk are neighbours in the launch order.
    """
    tiles_j: tl.constexpr = (B + TILE_J - 1) // TILE_J
    tiles: tl.constexpr = (B + TILE_I - 1) // TILE_I * tiles_j
    blocks = (F + B - 1) // B
    place = tl.program_id(0) % (blocks * tiles)
    part = tl.program_id(0) // (blocks * tiles)
    k, tile = place // tiles, place % tiles
    i = tile // tiles_j * TILE_I + tl.arange(0, TILE_I)
    j = tile % tiles_j * TILE_J + tl.arange(0, TILE_J)
    limit = tl.minimum(F - k * B, B)
    i_column, j_column = k * B + i, k * B + j
    if READS_X:
        i_column = tl.load(x_source + i_column, mask=i < limit, other=0)
    if READS_Y:
        j_column = tl.load(y_source + j_column, mask=j < limit, other=0)
    total = tl.full([TILE_I, TILE_J], 0.0, tl.float32)
    for start in range(0, CHUNK, STEP):
        n = part * CHUNK + start + tl.arange(0, STEP)
        row = n.to(tl.int64)[:, None]
        inside = (n < N)[:, None]
        left = tl.load(x + row * x_row + i_column[None, :] * x_column, mask=inside & (i < limit)[None, :], other=0.0)
        right = tl.load(y + row * y_row + j_column[None, :] * y_column, mask=inside & (j < limit)[None, :], other=0.0)
        total = tl.dot(tl.trans(left).to(OPERAND), right.to(OPERAND), total, input_precision=PRECISION)
    out_k = out + (part * blocks + k).to(tl.int64) * (B * B)
    tl.store(out_k + i[:, None] * B + j[None, :], total, mask=(i < B)[:, None] & (j < B)[None, :])


@triton.jit
def permute_kernel(x, source, out, N, F, x_row, x_column, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """out = x[:, source], whole rows at a time: memory is read and written in order, the shuffle is on the chip."""
    column = tl.arange(0, WIDTH)
    mask = column < F
    index = tl.load(source + column, mask=mask, other=0)
    for turn in range(ROWS):
        n = (tl.program_id(0) * ROWS + turn).to(tl.int64)
        row = tl.load(x + n * x_row + column * x_column, mask=mask & (n < N), other=0.0)
        tl.store(out + n * F + column, tl.gather(row, index, 0), mask=mask & (n < N))


@triton.jit
def inverse_kernel(perm, out, F, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + tl.load(perm + i, mask=i < F, other=0), i, mask=i < F)


class _Tile(NamedTuple):
    first: int
    second: int
    warps: int
    stages: int


#: Sizes are upper bounds: a tile never covers more than the power of two above a block. Tiles do not change the order
#: of any sum, so that the choice does not change a bit.
_SMALL, _WIDE, _LARGE = _Tile(128, 128, 8, 3), _Tile(64, 256, 8, 3), _Tile(128, 256, 8, 3)
# Three TF32 products hold more operands: the largest tile would spill registers.
_PRODUCT_TILES = {torch.bfloat16: (_SMALL, _WIDE, _LARGE), torch.float32: (_SMALL, _WIDE)}
_OUTER_TILES = {torch.bfloat16: (_SMALL, _LARGE), torch.float32: (_SMALL,)}
#: Programs that fill a large GPU about twice; a constant, so that results do not depend on the device's size.
_PROGRAMS = 264
#: Widest row, in elements, that :func:`permute` shuffles in shared memory.
_WIDEST_ROW = {2: 32768, 4: 16384}
_TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


def _operand(dtype: torch.dtype) -> tl.dtype:
    # The interpreter multiplies the bit patterns of bfloat16; in float32 the products of bfloat16 are exact.
    return tl.float32 if interpreted(rotate_kernel) else _TRITON_DTYPE[dtype]


def _key(name: str, x_NF: Tensor, block_size: int, *flags: bool) -> tuple:
    # Tokens by powers of two: sequence lengths vary from batch to batch, and one choice serves a range.
    strides = (x_NF.stride(1) == 1,)
    return name, x_NF.shape[0].bit_length(), x_NF.shape[1], block_size, x_NF.dtype, x_NF.device, *flags, *strides


def _product(
    x_NF: Tensor,
    G_KBB: Tensor,
    *,
    transposed: bool = False,
    source: Tensor | None = None,
    target: Tensor | None = None,
    bias: Tensor | None = None,
    writes: bool = False,
) -> Tensor:
    B, G_KBB = G_KBB.shape[-1], G_KBB.contiguous()

    def run(tile: _Tile) -> Tensor:
        N, F = x_NF.shape
        out = torch.empty(N, F, dtype=x_NF.dtype, device=x_NF.device)
        tile_j = tile_size(B, tile.second)
        grid = (ceil_div(N, tile.first) * ceil_div(F, B) * ceil_div(B, tile_j),)
        launch(
            rotate_kernel,
            grid,
            *(x_NF, G_KBB, source, target, bias, out, N, F, *x_NF.stride()),
            B=B,
            TRANSPOSED=transposed,
            READS=source is not None,
            WRITES=writes,
            BIAS=bias is not None,
            TILE_N=tile.first,
            TILE_J=tile_j,
            STEP=tile_size(B, 64 if x_NF.dtype == torch.bfloat16 else 32),
            OPERAND=_operand(x_NF.dtype),
            PRECISION=float32_precision(False),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return out

    flags = (transposed, source is not None, writes, bias is not None)
    tiles = _PRODUCT_TILES[x_NF.dtype]
    return fastest(_key("product", x_NF, B, *flags), x_NF.device, [partial(run, tile) for tile in tiles])


def outer(
    x_NF: Tensor,
    y_NF: Tensor,
    block_size: int,
    *,
    x_source: Tensor | None = None,
    y_source: Tensor | None = None,
) -> Tensor:
    """``x[:, x_source]_kᵀ · y[:, y_source]_k`` [K, B, B], float32, zero beyond a ragged end.

    The tokens are cut into chunks, summed in order afterwards:
    the same bits every time, which atomic additions would not give.
    """
    B, (N, F) = block_size, x_NF.shape
    blocks = ceil_div(F, B)
    step = tile_size(N, 64 if x_NF.dtype == torch.bfloat16 else 32)
    tiles = ceil_div(B, 128) ** 2
    parts = max(1, min(ceil_div(N, 8 * step), _PROGRAMS // (blocks * tiles)))
    # A power of two, because it is compiled in: few lengths, whatever the batches' are.
    chunk = max(step, power_of_2(ceil_div(N, parts)))
    parts = max(1, ceil_div(N, chunk))

    def run(tile: _Tile) -> Tensor:
        out = torch.empty(parts, blocks, B, B, dtype=torch.float32, device=x_NF.device)
        tile_i, tile_j = tile_size(B, tile.first), tile_size(B, tile.second)
        grid = (parts * blocks * ceil_div(B, tile_i) * ceil_div(B, tile_j),)
        launch(
            outer_kernel,
            grid,
            *(x_NF, y_NF, x_source, y_source, out, N, F, *x_NF.stride(), *y_NF.stride()),
            B=B,
            CHUNK=chunk,
            READS_X=x_source is not None,
            READS_Y=y_source is not None,
            TILE_I=tile_i,
            TILE_J=tile_j,
            STEP=step,
            OPERAND=_operand(x_NF.dtype),
            PRECISION=float32_precision(False),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return out[0] if parts == 1 else out.sum(0)

    key = _key("outer", x_NF, B, x_source is not None, y_source is not None, y_NF.stride(1) == 1)
    return fastest(key, x_NF.device, [partial(run, tile) for tile in _OUTER_TILES[x_NF.dtype]])


def permute(x_NF: Tensor, source: Tensor) -> Tensor:
    """``x[:, source]``, contiguous; any dtype of 2 or 4 bytes, rows of at most 64 KiB."""
    N, F = x_NF.shape
    out = torch.empty(N, F, dtype=x_NF.dtype, device=x_NF.device)
    width = max(16, power_of_2(F))
    rows = max(1, min(8, N // 512))
    settings = {"ROWS": rows, "WIDTH": width, "num_warps": 4 if width <= 2048 else 8}
    launch(permute_kernel, (ceil_div(N, rows),), x_NF, source, out, N, F, *x_NF.stride(), **settings)
    return out


def can_permute(x_NF: Tensor) -> bool:
    """Whether a row fits into shared memory for :func:`permute`."""
    return x_NF.shape[1] <= _WIDEST_ROW.get(x_NF.element_size(), 0)


def gather(x_NF: Tensor, perm: Tensor) -> Tensor:
    """Twin of :func:`poetx.ops.block_diagonal.gather` for a permutation."""
    return permute(x_NF, perm) if can_permute(x_NF) else torch.index_select(x_NF, 1, perm)


def inverse(perm: Tensor) -> Tensor:
    """The permutation that undoes ``perm``, same dtype, in one launch."""
    out, size = torch.empty_like(perm), 1024
    launch(inverse_kernel, (ceil_div(perm.numel(), size),), perm, out, perm.numel(), SIZE=size)
    return out


def gather_rotate(x_NF: Tensor, perm: Tensor, G_KBB: Tensor) -> Tensor:
    """Twin of :func:`poetx.ops.block_diagonal.gather_rotate`."""
    plans = [lambda: _product(x_NF, G_KBB, source=perm)]
    if can_permute(x_NF):
        plans.append(lambda: _product(permute(x_NF, perm), G_KBB))
    return _planned("gather_rotate", x_NF, G_KBB, plans)


def rotate_scatter(x_NF: Tensor, G_KBB: Tensor, perm: Tensor, bias: Tensor | None) -> Tensor:
    """Twin of :func:`poetx.ops.block_diagonal.rotate_scatter`; the bias is added before the one rounding."""
    return _scattered("rotate_scatter", x_NF, G_KBB, perm, bias=bias)


def gather_rotate_backward(
    x_NF: Tensor, perm: Tensor, G_KBB: Tensor, grad_NF: Tensor, needs_dx: bool
) -> tuple[Tensor, Tensor]:
    """Twin of :func:`poetx.ops.block_diagonal.gather_rotate_backward`."""
    block_size = G_KBB.shape[-1]
    plans = [lambda: outer(x_NF, grad_NF, block_size, x_source=perm)]
    if can_permute(x_NF):
        plans.append(lambda: outer(permute(x_NF, perm), grad_NF, block_size))
    dG = _planned("gathered_outer", x_NF, G_KBB, plans)
    if not needs_dx:
        return x_NF.new_empty(0), dG
    return _scattered("scattered", grad_NF, G_KBB, perm, transposed=True), dG


def rotate_scatter_backward(x_NF: Tensor, G_KBB: Tensor, perm: Tensor, grad_NF: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of :func:`poetx.ops.block_diagonal.rotate_scatter_backward`."""
    block_size = G_KBB.shape[-1]

    def direct() -> tuple[Tensor, Tensor]:
        dx = _product(grad_NF, G_KBB, transposed=True, source=perm)
        return dx, outer(x_NF, grad_NF, block_size, y_source=perm)

    def staged() -> tuple[Tensor, Tensor]:
        grad = permute(grad_NF, perm)
        return _product(grad, G_KBB, transposed=True), outer(x_NF, grad, block_size)

    plans = [direct, staged] if can_permute(grad_NF) else [direct]
    return _planned("rotate_scatter_backward", grad_NF, G_KBB, plans)


def _scattered(
    name: str, x_NF: Tensor, G_KBB: Tensor, perm: Tensor, *, bias: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """y with ``y[:, perm] = x · Diag(G)`` or its transpose, plus bias."""
    product = partial(_product, x_NF, G_KBB, transposed=transposed, target=perm, bias=bias)
    plans: list[Callable[[], Tensor]] = [partial(product, writes=True)]
    if can_permute(x_NF):
        plans.append(lambda: permute(product(), inverse(perm)))
    return _planned(name, x_NF, G_KBB, plans)


def _planned(name: str, x_NF: Tensor, G_KBB: Tensor, plans: list):
    return fastest(_key(name, x_NF, G_KBB.shape[-1]), x_NF.device, plans)
