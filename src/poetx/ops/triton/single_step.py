"""The single step on the GPU: gradients added to a momentum, a fold in one pass, what the step leaves of the state.

Plain torch takes 7 to 16 kernels where a backward pass adds to a momentum, and some ten a slice of a weight to fold it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx.ops.triton.rounding import rounded
from poetx.ops.triton.tuning import address, ceil_div, interpreted, launch, on_device, power_of_2

#: Elements of a momentum to a program, and of a block's gradient to a turn of its loop.
_ELEMENTS, _ENTRIES = 1024, 4096
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
def add_block(
    M, momentum, peak, k, bound, seed, B: tl.constexpr, PACKED: tl.constexpr, SIZE: tl.constexpr, NARROW: tl.constexpr
):
    """Block k of one side, all of it: nothing is added where an entry is beyond ``bound`` or NaN."""
    M += k * (B * B)
    largest = tl.full([SIZE], 0.0, tl.float32)
    for start in range(0, B * B, SIZE):
        size = tl.abs(gradient_tile(M, start + tl.arange(0, SIZE), B, PACKED))
        largest = tl.maximum(largest, tl.where(size <= bound, size, float("inf")))
    added = tl.max(largest, 0)
    if added < float("inf"):
        for start in range(0, B * B, SIZE):
            number = start + tl.arange(0, SIZE)
            if PACKED:
                i, j = number // B, number % B
                inside = (i < j) & (number < B * B)
                place = k * (B * (B - 1) // 2) + i * (2 * B - i - 1) // 2 + j - i - 1
            else:
                inside, place = number < B * B, k * (B * B) + number
            value = tl.load(momentum + place, mask=inside, other=0.0).to(tl.float32)
            value += gradient_tile(M, number, B, PACKED)
            noise = value
            if NARROW:
                noise = tl.randint(seed, place)
            tl.store(momentum + place, rounded(value, noise, momentum.dtype.element_ty), mask=inside)
        tl.store(peak + k, tl.maximum(tl.load(peak + k), added))


@triton.jit(do_not_specialize=["count0", "seed"])
def add_kernel(
    M0,
    M1,
    momentum0,
    momentum1,
    peaks0,
    peaks1,
    count0,
    bound,
    seed,
    B0: tl.constexpr,
    B1: tl.constexpr,
    PACKED: tl.constexpr,
    SIZE: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Momenta of both sides += their gradients, a block to a program; peaks follow."""
    k = tl.program_id(0)
    if k < count0:
        add_block(M0, momentum0, peaks0, k, bound, seed, B0, PACKED, SIZE, NARROW)
    else:
        add_block(M1, momentum1, peaks1, k - count0, bound, seed + 1, B1, PACKED, SIZE, NARROW)


def add_(momenta: Sequence[Tensor], peaks: Sequence[Tensor], Ms: Sequence[Tensor], *, bound: float, seed: int) -> None:
    """Twin of :func:`poetx.ops.single_step.add_to_` for both sides at once, in one launch; M float32 [K, B, B]."""
    M0, M1 = (M.contiguous() for M in Ms)
    settings = {"B0": M0.shape[1], "B1": M1.shape[1], "PACKED": momenta[0].ndim == 2}
    settings |= {"SIZE": _ENTRIES, "NARROW": momenta[0].dtype == torch.bfloat16, "num_warps": 8}
    launch(add_kernel, (len(M0) + len(M1),), M0, M1, *momenta, *peaks, len(M0), bound, seed, **settings)


# -- the step ---------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """What the step does to one matrix W [F, T], whose features f turn.

    Attributes:
        weight: W itself, bfloat16 or float32, contiguous along one axis; written in place.
        norm, scale: its ‖W‖ to hold, and the factor for the excess, scalars of float64; written in place.
        exact: ‖W‖ before the step in float64, where the sum of squares in float32 is not enough; or None.
        steps: taken before. seed: of the rounding.
    """

    weight: Tensor
    norm: Tensor
    scale: Tensor
    exact: Tensor | None
    steps: int
    seed: int


class Decay(NamedTuple):
    """What the step does to the momenta of one parameter.

    Attributes:
        momenta: flat, with the gradients; left as they are where ``out`` is other memory.
        out: flat, at least as long: ``factor`` · momenta, and after it what is in ``copied`` of that.
        peaks: of its blocks; become zero. seed: of the rounding.
    """

    momenta: Tensor
    out: Tensor
    copied: slice
    peaks: Tensor
    seed: int


#: Columns of the table that says where the matrices of a launch are: addresses, sizes, and where each one's blocks and
#: programs begin.
_WEIGHT, _F, _T, _ALONG_F, _ALONG_T, _BLOCK, _PROGRAM, _PROGRAMS, _SEED, _NORM, _SCALE, _STEPS = map(
    tl.constexpr, range(12)
)
_COLUMNS_OF_TURNS = tl.constexpr(12)
#: The same of momenta.
_FROM, _TO, _NUMBER, _START, _STOP, _PEAKS, _BLOCKS, _NOISE = map(tl.constexpr, range(8))
_COLUMNS_OF_DECAYS = tl.constexpr(8)


@triton.jit
def noise_tile(seed, f, t, T, F_TILE: tl.constexpr, T_TILE: tl.constexpr):
    """16 bits of noise for every element of a tile, by its place in the weight alone; eight share one draw."""
    eighth = t + tl.arange(0, T_TILE // 8)
    number = f[:, None].to(tl.int64) * tl.cdiv(T, 8) + eighth[None, :]
    a, b, c, d = tl.randint4x(seed, number, _ROUNDS)  # pyright: ignore[reportGeneralTypeIssues]
    whole = tl.join(tl.join(a, b), tl.join(c, d)).to(tl.int32, bitcast=True)
    return tl.reshape(tl.join(whole & 0xFFFF, (whole >> 16) & 0xFFFF), [F_TILE, T_TILE])


@triton.jit
def add_turn(total, E, W, j, inside_row, inside_t, limit, e_column, w_f, OPERAND: tl.constexpr):
    """total + E[:, j] · W[j, :], of pointers to the beginnings of E's rows and of W's columns."""
    e = tl.load(E + j[None, :] * e_column, mask=inside_row & (j < limit)[None, :], other=0.0)
    w = tl.load(W + j[:, None] * w_f, mask=(j < limit)[:, None] & inside_t, other=0.0)
    return tl.dot(e.to(OPERAND), w.to(OPERAND), total, input_precision="tf32x3")


@triton.jit(do_not_specialize=["matrices", "programs"])
def fold_kernel(
    turns,
    E,
    touched,
    squares,
    factor,
    matrices,
    programs,
    parts,
    e_row,
    e_column,
    B: tl.constexpr,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    DENSE: tl.constexpr,
    SIXTEENTHS: tl.constexpr,
    F_TILE: tl.constexpr,
    T_TILE: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """W ← scale · (I + factor · E) · W along features f, in blocks of B; sums of squares of both, one for a program.

    In place: a program has all of a block's rows of the columns that it writes, and has read them before. E is the sum
    of PARTS tensors, each exact in the dtype that matrices are multiplied in.
    """
    program = tl.program_id(0)
    places = tl.arange(0, COUNT)
    firsts = tl.load(turns + places * _COLUMNS_OF_TURNS + _PROGRAM, mask=places < matrices, other=programs)
    turn = turns + (tl.sum((firsts <= program).to(tl.int32), 0) - 1) * _COLUMNS_OF_TURNS
    W = tl.load(turn + _WEIGHT).to(tl.pointer_type(DTYPE))
    F, T = tl.load(turn + _F).to(tl.int32), tl.load(turn + _T).to(tl.int32)
    w_f, w_t = tl.load(turn + _ALONG_F).to(tl.int32), tl.load(turn + _ALONG_T).to(tl.int32)
    if SIXTEENTHS:  # sizes, strides and addresses are multiples, so that 16 bytes are moved at a time
        W, F, T = tl.multiple_of(W, 16), tl.multiple_of(F, 16), tl.multiple_of(T, 16)
        w_f, w_t = tl.multiple_of(w_f, 16), tl.multiple_of(w_t, 16)
    if DENSE == "t":
        w_t = 1
    elif DENSE == "f":
        w_f = 1
    across = tl.cdiv(T, T_TILE)
    here = program - tl.load(turn + _PROGRAM).to(tl.int32)
    k, t_first = here // across, here % across * T_TILE
    block = tl.load(turn + _BLOCK) + k
    limit = tl.minimum(F - k * B, B)
    row, t = tl.arange(0, F_TILE), tl.arange(0, T_TILE)
    W_k = W + (k * B).to(tl.int64) * w_f + t_first.to(tl.int64) * w_t
    E_k = E + block * (B * B)
    total = tl.full([F_TILE, T_TILE], 0.0, tl.float32)
    e_row_k, w_t_k, inside_t = E_k + row[:, None] * e_row, W_k + t[None, :] * w_t, (t_first + t < T)[None, :]
    inside_row = (row < limit)[:, None]
    if PARTS == 1:
        for start in range(0, B, STEP):
            j = start + tl.arange(0, STEP)
            total = add_turn(total, e_row_k, w_t_k, j, inside_row, inside_t, limit, e_column, w_f, OPERAND)
    else:  # one loop, as several of them would take registers of their own each
        length: tl.constexpr = (B + STEP - 1) // STEP
        for number in range(0, PARTS * length):
            j = number % length * STEP + tl.arange(0, STEP)  # pyright: ignore[reportOperatorIssue]
            e_part = e_row_k + number // length * tl.cast(parts, tl.int64)  # pyright: ignore[reportOperatorIssue]
            total = add_turn(total, e_part, w_t_k, j, inside_row, inside_t, limit, e_column, w_f, OPERAND)
    inside = (row < limit)[:, None] & (t_first + t < T)[None, :]
    target = W_k + row[:, None] * w_f + t[None, :] * w_t
    wide = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.debug_barrier()  # nothing is written before everything has been read
    scale = tl.load(tl.load(turn + _SCALE).to(tl.pointer_type(tl.float64))).to(tl.float32)
    by = tl.where(tl.load(touched + block) != 0, scale, 1.0)
    moved = (wide + factor * total) * by
    tl.store(squares + program, tl.sum(tl.sum(wide * wide, 1), 0))
    tl.store(squares + programs + program, tl.sum(tl.sum(moved * moved, 1), 0))
    noise = moved
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        noise = noise_tile(tl.load(turn + _SEED), k * B + row, t_first // 8, T, F_TILE, T_TILE)
    tl.store(target, rounded(moved, noise, DTYPE), mask=inside)


@triton.jit(do_not_specialize=["programs"])
def norm_kernel(
    turns,
    squares,
    touched,
    exact,
    programs,
    growth,
    growth_rest,
    B: tl.constexpr,
    SAME: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Twin of :func:`poetx.ops.single_step_update.norm_and_scale`, a matrix to a program."""
    turn = turns + tl.program_id(0) * _COLUMNS_OF_TURNS
    first, count = tl.load(turn + _PROGRAM), tl.load(turn + _PROGRAMS)
    found, left = tl.full([SIZE], 0.0, tl.float64), tl.full([SIZE], 0.0, tl.float64)
    moved = tl.full([SIZE], 0, tl.int32)
    i = tl.arange(0, SIZE)
    while tl.min(i, 0) < count:
        found += tl.load(squares + first + i, mask=i < count, other=0.0).to(tl.float64)
        left += tl.load(squares + programs + first + i, mask=i < count, other=0.0).to(tl.float64)
        i += SIZE
    blocks = tl.cdiv(tl.load(turn + _F), B)
    first_block = tl.load(turn + _BLOCK)
    i = tl.arange(0, SIZE)
    while tl.min(i, 0) < blocks:
        moved += tl.load(touched + first_block + i, mask=i < blocks, other=0).to(tl.int32)
        i += SIZE
    rate = tl.cast(growth, tl.float64) + tl.cast(growth_rest, tl.float64)  # an argument is float32
    before = 1 + rate * tl.load(turn + _STEPS)
    norm = tl.load(turn + _NORM).to(tl.pointer_type(tl.float64))
    scale = tl.load(turn + _SCALE).to(tl.pointer_type(tl.float64))
    held, factor = tl.load(norm), tl.load(scale)
    given = tl.load(exact + tl.program_id(0))
    read = tl.where(given == given, given, tl.sqrt(tl.sum(found, 0)))
    written = read / tl.sqrt(before)
    held = tl.where(tl.abs(written * factor / held - 1) < SAME, held, written)
    grown = before + rate * (tl.sum(moved, 0).to(tl.float64) / blocks)
    ratio = held * tl.sqrt(grown) / tl.sqrt(tl.sum(left, 0))
    tl.store(norm, held * tl.sqrt(grown / (before + rate)))
    tl.store(scale, tl.where((ratio > 0) & (ratio < float("inf")), ratio, 1.0))


@triton.jit
def decay_kernel(decays, factor, DTYPE: tl.constexpr, PEAK: tl.constexpr, SIZE: tl.constexpr):
    """out = factor · momenta, and after it once more what is between two places of it; peaks = 0."""
    entry = decays + tl.program_id(1) * _COLUMNS_OF_DECAYS
    N, number = tl.load(entry + _NUMBER), tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = number < N
    momenta = tl.load(entry + _FROM).to(tl.pointer_type(DTYPE))  # pyright: ignore[reportArgumentType]
    value = tl.load(momenta + number, mask=inside, other=0.0).to(tl.float32) * factor
    noise = value
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        noise = tl.randint(tl.load(entry + _NOISE), number)
    value = rounded(value, noise, DTYPE)
    out = tl.load(entry + _TO).to(tl.pointer_type(DTYPE))
    start, stop = tl.load(entry + _START), tl.load(entry + _STOP)
    tl.store(out + number, value, mask=inside)
    tl.store(out + N + number - start, value, mask=(number >= start) & (number < stop))
    peaks = tl.load(entry + _PEAKS).to(tl.pointer_type(PEAK))
    tl.store(peaks + number, tl.full([SIZE], 0.0, PEAK), mask=number < tl.load(entry + _BLOCKS))


class _Tiles(NamedTuple):
    """Of a fold: elements of a weight to a program and to a warp, of E to a turn of its loop, and features to a turn.

    A program holds all rows of a block, so ``largest`` is the largest block that there is one for.
    """

    program: int
    warp: int
    turn: int
    step: int
    largest: int


#: The fastest of those that spill no registers on any generation, for blocks of 256 of an 8B model's matrices on an
#: H200; 128 columns take an eighth less time there and spill.
_TILES = {torch.bfloat16: _Tiles(8192, 2048, 16384, 64, 1024), torch.float32: _Tiles(4096, 512, 4096, 32, 256)}


def can_fold(dtype: torch.dtype, block_size: int) -> bool:
    """Whether :class:`Turns` takes weights of this dtype and blocks of this size."""
    return dtype in _TILES and block_size <= _TILES[dtype].largest


class Turns:
    """Matrices of one dtype that one launch folds, and another holds the norms of.

    Args:
        turns: of :class:`Turn`. block_size: of all of them.
    """

    def __init__(self, turns: Sequence[Turn], block_size: int) -> None:
        self.turns = turns  # the table has no more than addresses
        weights = [turn.weight for turn in turns]
        self.first, self.block_size, self.matrices = weights[0], block_size, len(turns)
        self.rows = max(16, power_of_2(block_size))
        tiles = _TILES[self.first.dtype]
        self.columns = min(64, max(16, tiles.program // self.rows))
        self.step = min(self.rows, tiles.step, max(16, tiles.turn // self.rows))
        self.warps = min(16, max(4, self.rows * self.columns // tiles.warp))
        self.blocks = [ceil_div(len(W), block_size) for W in weights]
        programs = [blocks * ceil_div(W.shape[1], self.columns) for blocks, W in zip(self.blocks, weights, strict=True)]
        self.programs = sum(programs)
        table, block, program = [], 0, 0
        for turn, blocks, count in zip(turns, self.blocks, programs, strict=True):
            W = turn.weight
            where = [address(W), *W.shape, *W.stride(), block, program, count]
            table.append([*where, turn.seed, address(turn.norm), address(turn.scale), turn.steps])
            block, program = block + blocks, program + count
        self.table = on_device(table, self.first.device)
        found = [turn.exact for turn in turns]
        if any(norm is not None for norm in found):
            unknown = torch.full((), math.nan, dtype=torch.float64, device=self.first.device)
            self.exact = torch.stack([unknown if norm is None else norm for norm in found])
        else:
            self.exact = torch.full((len(turns),), math.nan, dtype=torch.float64, device=self.first.device)
        dense_t = all(W.stride(1) == 1 for W in weights)
        self.dense = "t" if dense_t else "f" if all(W.stride(0) == 1 for W in weights) else ""
        other = {"t": 0, "f": 1}.get(self.dense, 0)  # the axis whose neighbours are apart
        sizes = [size for W in weights for size in (address(W), *W.shape, W.stride(other))]
        self.sixteenths = self.dense != "" and all(size % 16 == 0 for size in (block_size, *sizes))

    def fold_(self, E_KBB: Tensor, factor: float, side: str, touched: Tensor) -> Tensor:
        """W ← scale · (I + factor · E) · W for side "out", of Eᵀ for "in"; the touched blocks' [K] scales, bool.

        E is float32, or bfloat16 where that is what it is exactly. bfloat16 weights are multiplied by three bfloat16
        parts of float32, 24 bits together, with sums in float32. Squares, float32 [2, programs], for :meth:`hold_`.
        """
        operand = tl.float32 if interpreted(fold_kernel) else tl.bfloat16  # the interpreter multiplies bits of bfloat16
        if self.first.dtype == torch.float32:
            parts, operand = E_KBB.float()[None], tl.float32
        elif E_KBB.dtype == torch.float32:
            high = E_KBB.bfloat16()
            middle = (E_KBB - high).bfloat16()
            parts = torch.stack([(E_KBB - high).sub_(middle).bfloat16(), middle, high])
        else:
            parts = E_KBB[None]
        parts = parts.contiguous()
        B = self.block_size
        squares = torch.empty(2, self.programs, dtype=torch.float32, device=self.first.device)
        # W · (I + E) is (I + Eᵀ) · Wᵀ, transposed
        rows = (B, 1) if side == "out" else (1, B)
        settings = {"B": B, "COUNT": power_of_2(self.matrices), "PARTS": len(parts), "DENSE": self.dense}
        settings |= {"SIXTEENTHS": self.sixteenths, "F_TILE": self.rows, "T_TILE": self.columns, "OPERAND": operand}
        settings |= {"DTYPE": _DTYPES[self.first.dtype], "STEP": self.step}
        settings |= {"num_warps": self.warps, "num_stages": 2}
        counts = (self.matrices, self.programs, parts[0].numel())
        launch(
            fold_kernel,
            (self.programs,),
            self.table,
            parts,
            _bytes(touched),
            squares,
            factor,
            *counts,
            *rows,
            **settings,
        )
        return squares

    def hold_(
        self, squares: Tensor, touched: Tensor, *, growth: float, same: float, compile_only: bool = False
    ) -> None:
        """Twin of :func:`poetx.ops.single_step_update.norm_and_scale`, in place.

        Args:
            compile_only: launch nothing, so that the kernel is there when the weights have been written.
        """
        rounded_growth = struct.unpack("f", struct.pack("f", growth))[0]
        numbers = (self.programs, rounded_growth, growth - rounded_growth)
        settings = {"B": self.block_size, "SAME": same, "SIZE": _ELEMENTS}
        grid = (0 if compile_only else self.matrices,)
        launch(norm_kernel, grid, self.table, squares, _bytes(touched), self.exact, *numbers, **settings)


class Decays:
    """Momenta of one dtype that one launch decays.

    Args:
        decays: of :class:`Decay`, which are kept: the table has no more than addresses.
    """

    def __init__(self, decays: Sequence[Decay]) -> None:
        self.decays, first = decays, decays[0].momenta
        rows = [
            [
                *(address(d.momenta), address(d.out), d.momenta.numel(), d.copied.start, d.copied.stop),
                *(address(d.peaks), d.peaks.numel(), d.seed),
            ]
            for d in decays
        ]
        self.table = on_device(rows, first.device)
        size = max(max(d.momenta.numel(), d.peaks.numel()) for d in decays)
        self.grid = (ceil_div(size, _ELEMENTS), len(decays))
        self.settings = {"DTYPE": _DTYPES[first.dtype], "PEAK": _DTYPES[decays[0].peaks.dtype], "SIZE": _ELEMENTS}

    def decay_(self, factor: float, *, compile_only: bool = False) -> None:
        """Twin of :func:`poetx.ops.single_step_update.decayed`, in place; peaks become zero."""
        launch(decay_kernel, (0, 0) if compile_only else self.grid, self.table, float(factor), **self.settings)


_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _bytes(flags: Tensor) -> Tensor:
    return flags.view(torch.uint8)
