"""The single step on the GPU: gradients added to a momentum, a fold in one pass, what the step leaves of the state.

Plain torch takes 7 to 16 kernels where a backward pass adds to a momentum, and some ten a slice of a weight to fold it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx.ops.triton.rounding import rounded
from poetx.ops.triton.tuning import ceil_div, interpreted, launch, power_of_2, tile_size

#: Elements of a block, or of a momentum, to a program.
_ELEMENTS = 1024
#: Features to a program of a fold: rotated ones (twice as many spill registers on Ampere and Ada), and others, a
#: multiple of the 8 that share one draw of noise.
_ROWS, _COLUMNS = 64, 128
#: Rounds of Philox for the noise of a fold, the fewest that pass all statistical tests (Salmon et al. 2011).
_ROUNDS = tl.constexpr(7)


# -- backward: M is added to the momenta ------------------------------------------------------------------------------


@triton.jit
def gradient_tile(M, number, B: tl.constexpr, PACKED: tl.constexpr):
    """Entries ``number`` of a block's gradient: those of M, or of 2 (M − Mᵀ) above the diagonal and 0 below it."""
    inside = number < B * B
    own = tl.load(M + number, mask=inside, other=0.0)
    if PACKED:
        i, j = number // B, number % B
        own = tl.where(i < j, 2 * (own - tl.load(M + j * B + i, mask=inside & (i < j), other=0.0)), 0.0)
    return own


@triton.jit
def peaks_kernel(
    M0, M1, added, count0, bound, B0: tl.constexpr, B1: tl.constexpr, PACKED: tl.constexpr, SIZE: tl.constexpr
):
    """added [K0 + K1]: the largest entry of each block's gradient; infinite where one is beyond ``bound`` or NaN."""
    k = tl.program_id(0)
    largest = tl.full([SIZE], 0.0, tl.float32)
    if k < count0:
        for start in range(0, B0 * B0, SIZE):
            size = tl.abs(gradient_tile(M0 + k * (B0 * B0), start + tl.arange(0, SIZE), B0, PACKED))
            largest = tl.maximum(largest, tl.where(size <= bound, size, float("inf")))
    else:
        for start in range(0, B1 * B1, SIZE):
            size = tl.abs(gradient_tile(M1 + (k - count0) * (B1 * B1), start + tl.arange(0, SIZE), B1, PACKED))
            largest = tl.maximum(largest, tl.where(size <= bound, size, float("inf")))
    tl.store(added + k, tl.max(largest, 0))


@triton.jit
def add_block(
    M,
    momentum,
    added,
    peaks,
    k,
    count,
    seed,
    B: tl.constexpr,
    PACKED: tl.constexpr,
    SIZE: tl.constexpr,
    COUNT: tl.constexpr,
):
    """One program's part of block k of one side."""
    blocks = tl.arange(0, COUNT)
    fits = tl.max(tl.load(added + blocks, mask=blocks < count, other=0.0), 0) < float("inf")
    number = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    gradient = tl.where(fits, gradient_tile(M + k * (B * B), number, B, PACKED), 0.0)
    if PACKED:
        i, j = number // B, number % B
        place, inside = k * (B * (B - 1) // 2) + i * (2 * B - i - 1) // 2 + j - i - 1, (i < j) & (number < B * B)
    else:
        place, inside = k * (B * B) + number, number < B * B
    value = tl.load(momentum + place, mask=inside, other=0.0).to(tl.float32) + gradient
    noise = value
    if momentum.dtype.element_ty == tl.bfloat16:
        noise = tl.randint(seed, place)
    tl.store(momentum + place, rounded(value, noise, momentum.dtype.element_ty), mask=inside)
    if tl.program_id(0) == 0:
        peak = tl.where(fits, tl.load(added + k), 0.0)
        tl.store(peaks + k, tl.maximum(tl.load(peaks + k), peak))


@triton.jit(do_not_specialize=["seed"])
def add_kernel(
    M0,
    M1,
    momentum0,
    momentum1,
    added,
    peaks0,
    peaks1,
    count0,
    count1,
    seed,
    B0: tl.constexpr,
    B1: tl.constexpr,
    PACKED: tl.constexpr,
    SIZE: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Momenta of both sides += their gradients, nothing where any block of the side is not finite; peaks follow."""
    k = tl.program_id(1)
    if k < count0:
        add_block(M0, momentum0, added, peaks0, k, count0, seed, B0, PACKED, SIZE, COUNT)
    else:
        add_block(M1, momentum1, added + count0, peaks1, k - count0, count1, seed + 1, B1, PACKED, SIZE, COUNT)


def add_(momenta: Sequence[Tensor], peaks: Sequence[Tensor], Ms: Sequence[Tensor], *, bound: float, seed: int) -> None:
    """Twin of :func:`poetx.ops.single_step.add_to_` for both sides at once, in two launches; M float32 [K, B, B]."""
    (count0, B0, _), (count1, B1, _) = (M.shape for M in Ms)
    M0, M1 = (M.contiguous() for M in Ms)
    added = torch.empty(count0 + count1, dtype=torch.float32, device=M0.device)
    settings = {"B0": B0, "B1": B1, "PACKED": momenta[0].ndim == 2, "SIZE": _ELEMENTS}
    launch(peaks_kernel, (count0 + count1,), M0, M1, added, count0, bound, **settings)
    grid = (ceil_div(max(B0, B1) ** 2, _ELEMENTS), count0 + count1)
    arguments = (M1, *momenta, added, *peaks, count0, count1, seed)
    launch(add_kernel, grid, M0, *arguments, **settings, COUNT=power_of_2(max(count0, count1)))


# -- the step ---------------------------------------------------------------------------------------------------------


@triton.jit
def noise_tile(seed, f, t, T, F_TILE: tl.constexpr, T_TILE: tl.constexpr):
    """16 bits of noise for every element of a tile, by its place in the weight alone; eight share one draw."""
    eighth = t + tl.arange(0, T_TILE // 8)
    number = f[:, None].to(tl.int64) * tl.cdiv(T, 8) + eighth[None, :]
    a, b, c, d = tl.randint4x(seed, number, _ROUNDS)  # pyright: ignore[reportGeneralTypeIssues]
    whole = tl.join(tl.join(a, b), tl.join(c, d)).to(tl.int32, bitcast=True)
    return tl.reshape(tl.join(whole & 0xFFFF, (whole >> 16) & 0xFFFF), [F_TILE, T_TILE])


@triton.jit(do_not_specialize=["seed"])
def fold_kernel(
    W,
    E,
    touched,
    scale,
    out,
    squares,
    F,
    T,
    seed,
    w_e,
    w_f,
    w_t,
    out_e,
    out_f,
    out_t,
    e_row,
    e_column,
    B: tl.constexpr,
    TILES: tl.constexpr,
    F_TILE: tl.constexpr,
    T_TILE: tl.constexpr,
    STEP: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """out = scale · (I + E) · W along features f of W [e, F, T] in blocks of B; sums of squares of both, a tile each.

    bfloat16 weights are multiplied by three bfloat16 parts of E, 24 bits together, with sums in float32.
    """
    k, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    e = tl.program_id(2).to(tl.int64)
    block = e * tl.cdiv(F, B) + k
    limit = tl.minimum(F - k * B, B)
    row = tile * F_TILE + tl.arange(0, F_TILE)
    t = tl.program_id(1) * T_TILE + tl.arange(0, T_TILE)
    W_k = W + e * w_e + k.to(tl.int64) * B * w_f + t[None, :].to(tl.int64) * w_t
    E_k = E + block * (B * B)
    total = tl.full([F_TILE, T_TILE], 0.0, tl.float32)
    for start in range(0, B, STEP):
        j = start + tl.arange(0, STEP)
        inside = (row < limit)[:, None] & (j < limit)[None, :]
        factor = tl.load(E_k + row[:, None] * e_row + j[None, :] * e_column, mask=inside, other=0.0)
        w = tl.load(W_k + j[:, None].to(tl.int64) * w_f, mask=(j < limit)[:, None] & (t < T)[None, :], other=0.0)
        if W.dtype.element_ty == tl.bfloat16:
            w = w.to(OPERAND)
            high = factor.to(tl.bfloat16).to(tl.float32)
            middle = (factor - high).to(tl.bfloat16).to(tl.float32)
            low = factor - high - middle
            total = tl.dot(low.to(OPERAND), w, total)
            total = tl.dot(middle.to(OPERAND), w, total)
            total = tl.dot(high.to(OPERAND), w, total)
        else:
            total = tl.dot(factor, w, total, input_precision="tf32x3")
    inside = (row < limit)[:, None] & (t < T)[None, :]
    wide = tl.load(W_k + row[:, None].to(tl.int64) * w_f, mask=inside, other=0.0).to(tl.float32)
    by = tl.where(tl.load(touched + block) != 0, tl.load(scale + e).to(tl.float32), 1.0)
    moved = (wide + total) * by
    number = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(squares + number, tl.sum(tl.sum(wide * wide, 1), 0))
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    tl.store(squares + programs + number, tl.sum(tl.sum(moved * moved, 1), 0))
    noise = moved
    if out.dtype.element_ty == tl.bfloat16:
        noise = noise_tile(seed + e, k * B + row, tl.program_id(1) * (T_TILE // 8), T, F_TILE, T_TILE)
    place = e * out_e + (k * B + row)[:, None].to(tl.int64) * out_f + t[None, :].to(tl.int64) * out_t
    tl.store(out + place, rounded(moved, noise, out.dtype.element_ty), mask=inside)


def fold(W: Tensor, E_KBB: Tensor, side: str, out: Tensor, *, touched: Tensor, scale: Tensor, seed: int) -> Tensor:
    """Twin of :func:`poetx.ops.single_step_update.fold_` in one launch; squares float32 [2, e, programs]."""
    B = E_KBB.shape[-1]
    f, t = (1, 2) if side == "out" else (2, 1)
    F, T = W.shape[f], W.shape[t]
    size = tile_size(B, _ROWS)
    tiles = ceil_div(B, size)
    grid = (ceil_div(F, B) * tiles, ceil_div(T, _COLUMNS), W.shape[0])
    squares = torch.empty(2, W.shape[0], grid[0] * grid[1], dtype=torch.float32, device=W.device)
    strides = [X.stride(axis) for X in (W, out) for axis in (0, f, t)]
    # W · (I + E) is (I + Eᵀ) · Wᵀ, transposed
    rows = (B, 1) if side == "out" else (1, B)
    operand = tl.float32 if interpreted(fold_kernel) else tl.bfloat16  # the interpreter multiplies bits of bfloat16
    settings = {"B": B, "TILES": tiles, "F_TILE": size, "T_TILE": _COLUMNS, "STEP": min(size, 32), "OPERAND": operand}
    arguments = (E_KBB.contiguous(), touched.view(torch.uint8), scale, out, squares, F, T, seed, *strides, *rows)
    launch(fold_kernel, grid, W, *arguments, **settings, num_warps=8 if size == _ROWS else 4, num_stages=2)
    return squares


@triton.jit(do_not_specialize=["steps"])
def norm_kernel(
    squares,
    touched,
    norm,
    scale,
    out,
    matrices,
    steps,
    growth,
    growth_rest,
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SAME: tl.constexpr,
    SIZE: tl.constexpr,
):
    """out [2, e]: see :func:`poetx.ops.single_step_update.norm_and_scale`."""
    e = tl.program_id(0)
    found, left = tl.full([SIZE], 0.0, tl.float64), tl.full([SIZE], 0.0, tl.float64)
    moved = tl.full([SIZE], 0, tl.int32)
    for start in range(0, PARTS, SIZE):
        i = start + tl.arange(0, SIZE)
        place = e * PARTS + i
        found += tl.load(squares + place, mask=i < PARTS, other=0.0).to(tl.float64)
        left += tl.load(squares + matrices * PARTS + place, mask=i < PARTS, other=0.0).to(tl.float64)
    for start in range(0, BLOCKS, SIZE):
        i = start + tl.arange(0, SIZE)
        moved += tl.load(touched + e * BLOCKS + i, mask=i < BLOCKS, other=0).to(tl.int32)
    rate = tl.cast(growth, tl.float64) + tl.cast(growth_rest, tl.float64)  # an argument is float32
    before = 1 + rate * steps
    held, factor = tl.load(norm + e), tl.load(scale + e)
    written = tl.sqrt(tl.sum(found, 0) / before)
    held = tl.where(tl.abs(written * factor / held - 1) < SAME, held, written)
    grown = before + rate * (tl.sum(moved, 0).to(tl.float64) / BLOCKS)
    ratio = held * tl.sqrt(grown) / tl.sqrt(tl.sum(left, 0))
    tl.store(out + e, held * tl.sqrt(grown / (before + rate)))
    tl.store(out + matrices + e, tl.where((ratio > 0) & (ratio < float("inf")), ratio, 1.0))


def norm_and_scale(
    squares: Tensor, touched: Tensor, norm: Tensor, scale: Tensor, *, steps: int, growth: float, same: float
) -> Tensor:
    """Twin of :func:`poetx.ops.single_step_update.norm_and_scale` in one launch, from the squares of :func:`fold`."""
    matrices, parts = squares.shape[1:]
    out = torch.empty(2, matrices, dtype=torch.float64, device=squares.device)
    rounded_growth = struct.unpack("f", struct.pack("f", growth))[0]
    arguments = (touched.view(torch.uint8), norm, scale, out, matrices, steps, rounded_growth, growth - rounded_growth)
    settings = {"PARTS": parts, "BLOCKS": touched.numel() // matrices, "SAME": same, "SIZE": _ELEMENTS}
    launch(norm_kernel, (matrices,), squares, *arguments, **settings)
    return out


@triton.jit(do_not_specialize=["seed"])
def decay_kernel(momenta, out, N, start, stop, factor, seed, SIZE: tl.constexpr):
    """out[:N] = factor · momenta[:N], and from N on once more what is in ``start`` to ``stop`` of it."""
    number = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = number < N
    value = tl.load(momenta + number, mask=inside, other=0.0).to(tl.float32) * factor
    noise = value
    if out.dtype.element_ty == tl.bfloat16:
        noise = tl.randint(seed, number)
    value = rounded(value, noise, out.dtype.element_ty)
    tl.store(out + number, value, mask=inside)
    tl.store(out + N + number - start, value, mask=(number >= start) & (number < stop))


def decay(momenta: Tensor, out: Tensor, copied: slice, factor: float, *, seed: int) -> None:
    """``out`` becomes ``factor`` · momenta, flat, with what is in ``copied`` of it once more at the end; one launch."""
    number = momenta.numel()
    launch(
        decay_kernel,
        (ceil_div(number, _ELEMENTS),),
        *(momenta, out, number, copied.start, copied.stop, factor, seed),
        SIZE=_ELEMENTS,
    )
