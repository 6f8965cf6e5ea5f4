"""Packed q → G and ∂L/∂G → ∂L/∂q on the GPU, without ever writing an unpacked Q to memory.

With S = Q² the identity is kept out of every product, so that it costs no precision:

    order 3:  G = I + 2Q + 2S + S(2Q + S)                 launches: S; G
    order 7:  G = (I + E)(I + F), I + E as above, F = S²  launches: S; E and F; G
    backward of order 3, from Γ = ∂L/∂G:                  launches: S; dB and D; dq
        dB = Γ + SΓ,  D = dB + Γ + Γ(S − 2Q),  T = D + Dᵀ
        dq = strict upper triangle of 2(dB − dBᵀ) − (QT + TQ)
    backward of order 7:                                  launches: S; E and F; dX and dF; dB and D; dq
        dX = Γ + ΓF in the place of Γ above,  dF = Γ + EᵀΓ,  D has (dF + dFᵀ)S more

Products are of float32 and accumulate in float32; :func:`poetx.ops.triton.tuning.float32_precision` says how they are
multiplied. The blocks of two packed tensors of one block size, a layer's two sides, share every launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx.ops.triton.tuning import ceil_div, fastest, float32_precision, launch, tile_size


@triton.jit
def upper_tile(q, i, j, limit, B: tl.constexpr):
    """Q[i, j] where i < j < limit, else 0; i and j are index tiles that broadcast."""
    offset = i * (2 * B - i - 1) // 2 + j - i - 1
    return tl.load(q + offset, mask=(i < j) & (j < limit), other=0.0).to(tl.float32)


@triton.jit
def skew_tile(q, i, j, limit, B: tl.constexpr):
    """Q[i, j] for vectors of indices i and j. Both halves are read along rows of the packed triangle: coalesced."""
    upper = upper_tile(q, i[:, None], j[None, :], limit, B)
    return upper - tl.trans(upper_tile(q, j[:, None], i[None, :], limit, B))


@triton.jit
def matrix_tile(M, i, j, B: tl.constexpr):
    mask = (i < B)[:, None] & (j < B)[None, :]
    return tl.load(M + i[:, None] * B + j[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(M, value, i, j, B: tl.constexpr):
    mask = (i < B)[:, None] & (j < B)[None, :]
    tl.store(M + i[:, None] * B + j[None, :], value.to(M.dtype.element_ty), mask=mask)


@triton.jit
def tile_column(pair):
    """Column of tile number ``pair`` on and above the diagonal, counted column by column."""
    # Exact: pair is at most 2080 for blocks of 1024 in tiles of 16.
    return ((tl.sqrt((8 * pair + 1).to(tl.float32)) - 1) / 2).to(tl.int32)


@triton.jit
def square_kernel(
    q0, q1, S, count0, size0, size1, B: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr
):
    """S [K, B, B] = Q²: tiles on and above the diagonal, written on both sides of it."""
    k = tl.program_id(1)
    if k < count0:
        q = q0 + k * (B * (B - 1) // 2)
        limit = tl.minimum(size0 - k * B, B)
    else:
        q = q1 + (k - count0) * (B * (B - 1) // 2)
        limit = tl.minimum(size1 - (k - count0) * B, B)
    column = tile_column(tl.program_id(0))
    row = tl.program_id(0) - column * (column + 1) // 2
    i, j = row * TILE + tl.arange(0, TILE), column * TILE + tl.arange(0, TILE)
    total = tl.full([TILE, TILE], 0.0, tl.float32)
    for start in range(0, B, STEP):
        m = start + tl.arange(0, STEP)
        left, right = skew_tile(q, i, m, limit, B), skew_tile(q, m, j, limit, B)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    S_k = S + k * (B * B)
    store_tile(S_k, total, i, j, B)
    if row < column:  # on the diagonal the two would race
        store_tile(S_k, tl.trans(total), j, i, B)


@triton.jit
def series_kernel(
    q0,
    q1,
    S,
    G0,
    G1,
    F,
    count0,
    size0,
    size1,
    B: tl.constexpr,
    FACTORS: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """G = I + 2Q + 2S + S(2Q + S); with FACTORS instead E = G − I and F = S², for order 7."""
    k = tl.program_id(1)
    if k < count0:
        q = q0 + k * (B * (B - 1) // 2)
        G = G0 + k * (B * B)
        limit = tl.minimum(size0 - k * B, B)
    else:
        q = q1 + (k - count0) * (B * (B - 1) // 2)
        G = G1 + (k - count0) * (B * B)
        limit = tl.minimum(size1 - (k - count0) * B, B)
    S_k = S + k * (B * B)
    tiles: tl.constexpr = (B + TILE - 1) // TILE
    i = tl.program_id(0) // tiles * TILE + tl.arange(0, TILE)
    j = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    total = tl.full([TILE, TILE], 0.0, tl.float32)
    squares = tl.full([TILE, TILE], 0.0, tl.float32)
    for start in range(0, B, STEP):
        m = start + tl.arange(0, STEP)
        left, right = matrix_tile(S_k, i, m, B), matrix_tile(S_k, m, j, B)
        total = tl.dot(left, 2 * skew_tile(q, m, j, limit, B) + right, total, input_precision=PRECISION)
        if FACTORS:
            squares = tl.dot(left, right, squares, input_precision=PRECISION)
    total += 2 * (skew_tile(q, i, j, limit, B) + matrix_tile(S_k, i, j, B))
    if FACTORS:
        store_tile(F + k * (B * B), squares, i, j, B)
    else:
        total += (i[:, None] == j[None, :]).to(tl.float32)
    store_tile(G, total, i, j, B)


@triton.jit
def extend_kernel(
    E, F, G0, G1, count0, B: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr
):
    """G = (I + E)(I + F) = I + E + F + EF."""
    k = tl.program_id(1)
    G = G0 + k * (B * B) if k < count0 else G1 + (k - count0) * (B * B)
    tiles: tl.constexpr = (B + TILE - 1) // TILE
    i = tl.program_id(0) // tiles * TILE + tl.arange(0, TILE)
    j = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    E_k, F_k = E + k * (B * B), F + k * (B * B)
    total = tl.full([TILE, TILE], 0.0, tl.float32)
    for start in range(0, B, STEP):
        m = start + tl.arange(0, STEP)
        total = tl.dot(matrix_tile(E_k, i, m, B), matrix_tile(F_k, m, j, B), total, input_precision=PRECISION)
    total += matrix_tile(E_k, i, j, B) + matrix_tile(F_k, i, j, B) + (i[:, None] == j[None, :]).to(tl.float32)
    store_tile(G, total, i, j, B)


@triton.jit
def extend_gradient_kernel(
    Gamma0,
    Gamma1,
    E,
    F,
    dX,
    dF,
    count0,
    B: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dX = Γ + ΓF and dF = Γ + EᵀΓ: the gradients of both factors of (I + E)(I + F)."""
    k = tl.program_id(1)
    Gamma = Gamma0 + k * (B * B) if k < count0 else Gamma1 + (k - count0) * (B * B)
    tiles: tl.constexpr = (B + TILE - 1) // TILE
    i = tl.program_id(0) // tiles * TILE + tl.arange(0, TILE)
    j = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    E_k, F_k = E + k * (B * B), F + k * (B * B)
    left = tl.full([TILE, TILE], 0.0, tl.float32)
    right = tl.full([TILE, TILE], 0.0, tl.float32)
    for start in range(0, B, STEP):
        m = start + tl.arange(0, STEP)
        left = tl.dot(matrix_tile(Gamma, i, m, B), matrix_tile(F_k, m, j, B), left, input_precision=PRECISION)
        Et = tl.trans(matrix_tile(E_k, m, i, B))
        right = tl.dot(Et, matrix_tile(Gamma, m, j, B), right, input_precision=PRECISION)
    own = matrix_tile(Gamma, i, j, B)
    store_tile(dX + k * (B * B), own + left, i, j, B)
    store_tile(dF + k * (B * B), own + right, i, j, B)


@triton.jit
def factor_gradient_kernel(
    Gamma0,
    Gamma1,
    q0,
    q1,
    S,
    dF,
    dB,
    D,
    count0,
    size0,
    size1,
    B: tl.constexpr,
    FACTORS: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dB = Γ + SΓ and D = dB + Γ + Γ(S − 2Q): the gradients of the factor I + 2Q + S, and of both together.

    With FACTORS D has (dF + dFᵀ)S more, by way of F = S².
    """
    k = tl.program_id(1)
    if k < count0:
        q = q0 + k * (B * (B - 1) // 2)
        Gamma = Gamma0 + k * (B * B)
        limit = tl.minimum(size0 - k * B, B)
    else:
        q = q1 + (k - count0) * (B * (B - 1) // 2)
        Gamma = Gamma1 + (k - count0) * (B * B)
        limit = tl.minimum(size1 - (k - count0) * B, B)
    S_k = S + k * (B * B)
    tiles: tl.constexpr = (B + TILE - 1) // TILE
    i = tl.program_id(0) // tiles * TILE + tl.arange(0, TILE)
    j = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    left = tl.full([TILE, TILE], 0.0, tl.float32)
    right = tl.full([TILE, TILE], 0.0, tl.float32)
    for start in range(0, B, STEP):
        m = start + tl.arange(0, STEP)
        left = tl.dot(matrix_tile(S_k, i, m, B), matrix_tile(Gamma, m, j, B), left, input_precision=PRECISION)
        Bt = matrix_tile(S_k, m, j, B) - 2 * skew_tile(q, m, j, limit, B)
        right = tl.dot(matrix_tile(Gamma, i, m, B), Bt, right, input_precision=PRECISION)
        if FACTORS:
            W = matrix_tile(dF + k * (B * B), i, m, B) + tl.trans(matrix_tile(dF + k * (B * B), m, i, B))
            right = tl.dot(W, matrix_tile(S_k, m, j, B), right, input_precision=PRECISION)
    own = matrix_tile(Gamma, i, j, B)
    store_tile(dB + k * (B * B), own + left, i, j, B)
    store_tile(D + k * (B * B), 2 * own + left + right, i, j, B)


@triton.jit
def pack_gradient_kernel(
    dB,
    D,
    q0,
    q1,
    dq0,
    dq1,
    count0,
    size0,
    size1,
    B: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq = strict upper triangle of 2(dB − dBᵀ) − (QT + TQ), T = D + Dᵀ; zero beyond the end of a ragged block."""
    k = tl.program_id(1)
    P: tl.constexpr = B * (B - 1) // 2
    if k < count0:
        q = q0 + k * P
        dq = dq0 + k * P
        limit = tl.minimum(size0 - k * B, B)
    else:
        q = q1 + (k - count0) * P
        dq = dq1 + (k - count0) * P
        limit = tl.minimum(size1 - (k - count0) * B, B)
    dB_k, D_k = dB + k * (B * B), D + k * (B * B)
    column = tile_column(tl.program_id(0))
    row = tl.program_id(0) - column * (column + 1) // 2
    i, j = row * TILE + tl.arange(0, TILE), column * TILE + tl.arange(0, TILE)
    total = tl.full([TILE, TILE], 0.0, tl.float32)
    for start in range(0, B, STEP):
        m = start + tl.arange(0, STEP)
        T = matrix_tile(D_k, m, j, B) + tl.trans(matrix_tile(D_k, j, m, B))
        total = tl.dot(skew_tile(q, i, m, limit, B), T, total, input_precision=PRECISION)
        T = matrix_tile(D_k, i, m, B) + tl.trans(matrix_tile(D_k, m, i, B))
        total = tl.dot(T, skew_tile(q, m, j, limit, B), total, input_precision=PRECISION)
    gradient = 2 * (matrix_tile(dB_k, i, j, B) - tl.trans(matrix_tile(dB_k, j, i, B))) - total
    i, j = i[:, None], j[None, :]
    gradient = tl.where(j < limit, gradient, 0.0)
    offset = i * (2 * B - i - 1) // 2 + j - i - 1
    tl.store(dq + offset, gradient.to(dq.dtype.element_ty), mask=(i < j) & (j < B))


class _Tile(NamedTuple):
    size: int
    warps: int


#: Both sum over the same index in the same order, by the same instructions: the choice does not change a bit. The
#: gradient's kernels hold two operands more, and the larger tile does not fit a GPU's shared memory there.
_TILES = (_Tile(64, 4), _Tile(128, 8))
_GRADIENT_TILES = (_Tile(64, 4),)
_STEP = 32


def _settings(block_size: int, tile: _Tile, narrow: bool) -> dict[str, Any]:
    size = tile_size(block_size, tile.size)
    precision = float32_precision(narrow)
    settings = {"B": block_size, "TILE": size, "STEP": min(size, _STEP), "PRECISION": precision}
    return settings | {"num_warps": tile.warps, "num_stages": 2}


def _two(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return tensors[0], tensors[-1]


def _halves(M_KBB: Tensor, count0: int) -> tuple[Tensor, Tensor]:
    """Where the blocks of the first and of the second packed tensor begin (the whole twice if there is one)."""
    return M_KBB, M_KBB[count0:] if len(M_KBB) > count0 else M_KBB


def cayley(
    qs: Sequence[Tensor],
    sizes: Sequence[int],
    block_size: int,
    order: int,
    dtype: torch.dtype,
    squares: list[Tensor] | None = None,
) -> list[Tensor]:
    """Blocks G [K_s, B, B] in ``dtype`` for each of one or two packed tensors q_s [K_s, P] of one block size.

    Twin of :func:`poetx.ops.cayley.cayley_forward`. Two launches for order 3, three for order 7; scratch of one
    float32 [ΣK, B, B] (three for order 7), which is put into ``squares`` if they are wanted: S.
    """
    assert order in (3, 7)
    assert len(qs) in (1, 2)
    qs = [q.contiguous() for q in qs]
    narrow = dtype == torch.bfloat16
    tiles = _TILES if block_size > _TILES[0].size else _TILES[:1]
    S = torch.empty(sum(map(len, qs)), block_size, block_size, dtype=torch.float32, device=qs[0].device)
    plans = [partial(_cayley, qs, sizes, order, dtype, S, _settings(block_size, tile, narrow)) for tile in tiles]
    key = ("cayley", len(S), block_size, order, dtype, qs[0].dtype, qs[0].device)
    if squares is not None:
        squares.append(S)
    return fastest(key, qs[0].device, plans)


def _cayley(qs, sizes, order, dtype, S, settings) -> list[Tensor]:
    (q0, q1), (count0, count) = _two(qs), (len(qs[0]), sum(map(len, qs)))
    size0, size1 = sizes[0], sizes[-1]
    B, tiles = settings["B"], ceil_div(settings["B"], settings["TILE"])
    launch(square_kernel, (tiles * (tiles + 1) // 2, count), q0, q1, S, count0, size0, size1, **settings)
    blocks = [torch.empty(len(q), B, B, dtype=dtype, device=q0.device) for q in qs]
    G0, G1 = _two(blocks)
    if order == 3:
        arguments = (q0, q1, S, G0, G1, S, count0, size0, size1)
        launch(series_kernel, (tiles * tiles, count), *arguments, FACTORS=False, **settings)
        return blocks
    E, F = torch.empty_like(S), torch.empty_like(S)
    arguments = (q0, q1, S, *_halves(E, count0), F, count0, size0, size1)
    launch(series_kernel, (tiles * tiles, count), *arguments, FACTORS=True, **settings)
    launch(extend_kernel, (tiles * tiles, count), E, F, G0, G1, count0, **settings)
    return blocks


def cayley_backward(
    grads: Sequence[Tensor],
    qs: Sequence[Tensor],
    sizes: Sequence[int],
    block_size: int,
    order: int,
    narrow: bool,
    S: Tensor | None = None,
) -> list[Tensor]:
    """∂L/∂q_s [K_s, P] in q_s's dtype from Γ_s [K_s, B, B].

    Twin of :func:`poetx.ops.cayley.cayley_backward`. Three launches for order 3, five for order 7, one less with S;
    scratch of three (seven) float32 [ΣK, B, B].

    Args:
        narrow: the activations behind Γ are bfloat16, so that TF32 products lose nothing.
        S: what :func:`cayley` of these tensors has kept.
    """
    assert order in (3, 7)
    assert len(qs) in (1, 2)
    qs, grads = [q.contiguous() for q in qs], [grad.contiguous() for grad in grads]
    tiles = [_settings(block_size, tile, narrow) for tile in _GRADIENT_TILES]
    plans = [partial(_cayley_backward, grads, qs, sizes, order, S, settings) for settings in tiles]
    key = ("cayley_backward", sum(map(len, qs)), block_size, order, narrow, grads[0].dtype, qs[0].dtype, qs[0].device)
    return fastest(key, qs[0].device, plans)


def _cayley_backward(grads, qs, sizes, order, S, settings) -> list[Tensor]:
    (q0, q1), (count0, count) = _two(qs), (len(qs[0]), sum(map(len, qs)))
    B, tiles = settings["B"], ceil_div(settings["B"], settings["TILE"])
    upper, whole = (tiles * (tiles + 1) // 2, count), (tiles * tiles, count)
    sides = (count0, sizes[0], sizes[-1])
    dB, D = (torch.empty(count, B, B, dtype=torch.float32, device=q0.device) for _ in range(2))
    if S is None:
        S = torch.empty_like(dB)
        launch(square_kernel, upper, q0, q1, S, *sides, **settings)
    dF = S
    if order == 7:
        E, F, dX, dF = (torch.empty_like(S) for _ in range(4))
        launch(series_kernel, whole, q0, q1, S, *_halves(E, count0), F, *sides, FACTORS=True, **settings)
        launch(extend_gradient_kernel, whole, *_two(grads), E, F, dX, dF, count0, **settings)
        grads = _halves(dX, count0)
    launch(factor_gradient_kernel, whole, *_two(grads), q0, q1, S, dF, dB, D, *sides, FACTORS=order == 7, **settings)
    dqs = [torch.empty_like(q) for q in qs]
    launch(pack_gradient_kernel, upper, dB, D, q0, q1, *_two(dqs), *sides, **settings)
    return dqs
