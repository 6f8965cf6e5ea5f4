"""Packed q → G and ∂L/∂G → ∂L/∂q on the GPU.

With S = Q² the identity is kept out of every product, so that it costs no precision:

    order 3:  G = I + P + S + PS, P = S + 2Q              launches: Q; S and P; G
    order 7:  G = (I + E)(I + F), I + E as above, F = S²  launches: Q; S and P; E and F; G
    backward of order 3, from Γ = ∂L/∂G:                  launches: Q; S and P; dB and D; dq
        dB = Γ + SΓ,  D = dB + Γ + ΓPᵀ,  T = D + Dᵀ
        dq = strict upper triangle of 2(dB − dBᵀ) − (QT + TQ)
    backward of order 7:                                  launches: Q; S and P; E and F; dX and dF; dB and D; dq
        dX = Γ + ΓF in the place of Γ above,  dF = Γ + EᵀΓ,  D has (dF + dFᵀ)S more

Q is unpacked once: read out of its packed triangle for every tile of every product, 4 bytes at a time and at any
alignment, these loads took several times as long as everything else. Q = −Qᵀ and S = Sᵀ, so the right factor of most
products is read along its rows, too, transposed, which tensor cores want of float32 factors: all loads are of 16 bytes.
Polynomials in Q commute, so one product with P stands for two.

One sum is taken at a time, so that no register spills.

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
def matrix_tile(M, i, j, B: tl.constexpr, EVEN: tl.constexpr):
    """M[i, j] for vectors of indices i and j; EVEN: tiles divide B, so that none is beyond it."""
    place = M + i[:, None] * B + j[None, :]
    if EVEN:
        return tl.load(place).to(tl.float32)
    return tl.load(place, mask=(i < B)[:, None] & (j < B)[None, :], other=0.0).to(tl.float32)


@triton.jit
def add_product(total, X, Y, i, j, B: tl.constexpr, EVEN: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr):
    """total + (XYᵀ)[i, j]: both are read along their rows."""
    for start in range(0, B, STEP):
        m = start + tl.arange(0, STEP)
        left, right = matrix_tile(X, i, m, B, EVEN), matrix_tile(Y, j, m, B, EVEN)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    return total


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
def unpack_kernel(q0, q1, Q, count0, size0, size1, B: tl.constexpr, TILE: tl.constexpr):
    """Q [K, B, B]: tiles on and above the diagonal, written on both sides of it; zero beyond a ragged end."""
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
    upper = upper_tile(q, i[:, None], j[None, :], limit, B)
    lower = -tl.trans(upper)
    Q_k = Q + k * (B * B)
    if row < column:
        store_tile(Q_k, upper, i, j, B)
        store_tile(Q_k, lower, j, i, B)
    else:
        store_tile(Q_k, upper + lower, i, j, B)


@triton.jit
def square_kernel(
    Q, S, P, B: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr
):
    """S [K, B, B] = Q² = −QQᵀ and P = S + 2Q: tiles on and above the diagonal, written on both sides of it."""
    k = tl.program_id(1)
    column = tile_column(tl.program_id(0))
    row = tl.program_id(0) - column * (column + 1) // 2
    i, j = row * TILE + tl.arange(0, TILE), column * TILE + tl.arange(0, TILE)
    Q_k, S_k, P_k = Q + k * (B * B), S + k * (B * B), P + k * (B * B)
    total = -add_product(tl.full([TILE, TILE], 0.0, tl.float32), Q_k, Q_k, i, j, B, EVEN, STEP, PRECISION)
    twice = 2 * matrix_tile(Q_k, i, j, B, EVEN)
    store_tile(S_k, total, i, j, B)
    store_tile(P_k, total + twice, i, j, B)
    if row < column:  # on the diagonal the two would race
        store_tile(S_k, tl.trans(total), j, i, B)
        store_tile(P_k, tl.trans(total - twice), j, i, B)


@triton.jit
def series_kernel(
    P,
    S,
    G0,
    G1,
    F,
    count0,
    B: tl.constexpr,
    FACTORS: tl.constexpr,
    EVEN: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """G = I + P + S + PS; with FACTORS instead E = G − I and F = S², for order 7."""
    k = tl.program_id(1)
    G = G0 + k * (B * B) if k < count0 else G1 + (k - count0) * (B * B)
    P_k, S_k = P + k * (B * B), S + k * (B * B)
    tiles: tl.constexpr = (B + TILE - 1) // TILE
    i = tl.program_id(0) // tiles * TILE + tl.arange(0, TILE)
    j = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    if FACTORS:
        total = add_product(tl.full([TILE, TILE], 0.0, tl.float32), S_k, S_k, i, j, B, EVEN, STEP, PRECISION)
        store_tile(F + k * (B * B), total, i, j, B)
    total = add_product(tl.full([TILE, TILE], 0.0, tl.float32), P_k, S_k, i, j, B, EVEN, STEP, PRECISION)
    total += matrix_tile(P_k, i, j, B, EVEN) + matrix_tile(S_k, i, j, B, EVEN)
    if not FACTORS:
        total += (i[:, None] == j[None, :]).to(tl.float32)
    store_tile(G, total, i, j, B)


@triton.jit
def extend_kernel(
    E,
    F,
    G0,
    G1,
    count0,
    B: tl.constexpr,
    EVEN: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """G = (I + E)(I + F) = I + E + F + EF."""
    k = tl.program_id(1)
    G = G0 + k * (B * B) if k < count0 else G1 + (k - count0) * (B * B)
    tiles: tl.constexpr = (B + TILE - 1) // TILE
    i = tl.program_id(0) // tiles * TILE + tl.arange(0, TILE)
    j = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    E_k, F_k = E + k * (B * B), F + k * (B * B)
    total = matrix_tile(E_k, i, j, B, EVEN) + matrix_tile(F_k, i, j, B, EVEN)
    total = add_product(total, E_k, F_k, i, j, B, EVEN, STEP, PRECISION)  # F = Fᵀ
    store_tile(G, total + (i[:, None] == j[None, :]).to(tl.float32), i, j, B)


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
    EVEN: tl.constexpr,
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
    own = matrix_tile(Gamma, i, j, B, EVEN)
    total = add_product(own, Gamma, F_k, i, j, B, EVEN, STEP, PRECISION)  # F = Fᵀ
    store_tile(dX + k * (B * B), total, i, j, B)
    total = own
    for start in range(0, B, STEP):
        m = start + tl.arange(0, STEP)
        left, right = matrix_tile(E_k, m, i, B, EVEN), matrix_tile(Gamma, m, j, B, EVEN)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    store_tile(dF + k * (B * B), total, i, j, B)


@triton.jit
def factor_gradient_kernel(
    Gamma0,
    Gamma1,
    P,
    S,
    dF,
    dB,
    D,
    Dt,
    count0,
    B: tl.constexpr,
    FACTORS: tl.constexpr,
    EVEN: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dB = Γ + SΓ and D = dB + Γ + ΓPᵀ: the gradients of the factor I + P, and of both together; Dt = Dᵀ.

    With FACTORS D has (dF + dFᵀ)S more, by way of F = S².
    """
    k = tl.program_id(1)
    Gamma = Gamma0 + k * (B * B) if k < count0 else Gamma1 + (k - count0) * (B * B)
    P_k, S_k, dF_k = P + k * (B * B), S + k * (B * B), dF + k * (B * B)
    tiles: tl.constexpr = (B + TILE - 1) // TILE
    i = tl.program_id(0) // tiles * TILE + tl.arange(0, TILE)
    j = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    total = add_product(tl.full([TILE, TILE], 0.0, tl.float32), Gamma, P_k, i, j, B, EVEN, STEP, PRECISION)
    if FACTORS:
        total = add_product(total, dF_k, S_k, i, j, B, EVEN, STEP, PRECISION)
        for start in range(0, B, STEP):
            m = start + tl.arange(0, STEP)
            left, right = matrix_tile(dF_k, m, i, B, EVEN), matrix_tile(S_k, j, m, B, EVEN)
            total = tl.dot(tl.trans(left), tl.trans(right), total, input_precision=PRECISION)
    by_square = tl.full([TILE, TILE], 0.0, tl.float32)
    # −ΓᵀS: of SΓ the right factor would be read along its columns, as here the left one is; but that one can be turned
    # in registers, for which it is not copied to shared memory four bytes at a time.
    for start in tl.range(0, B, STEP, num_stages=1):
        m = start + tl.arange(0, STEP)
        left, right = matrix_tile(Gamma, m, j, B, EVEN), matrix_tile(S_k, i, m, B, EVEN)
        by_square = tl.dot(tl.trans(-left), tl.trans(right), by_square, input_precision=PRECISION)
    own = matrix_tile(Gamma, i, j, B, EVEN)
    total += own
    by_square = own - tl.trans(by_square)
    store_tile(dB + k * (B * B), by_square, i, j, B)
    total += by_square
    store_tile(D + k * (B * B), total, i, j, B)
    store_tile(Dt + k * (B * B), tl.trans(total), j, i, B)


@triton.jit
def pack_gradient_kernel(
    dB,
    D,
    Dt,
    Q,
    dq0,
    dq1,
    count0,
    size0,
    size1,
    B: tl.constexpr,
    EVEN: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq = strict upper triangle of 2(dB − dBᵀ) − (QT + TQ), T = D + Dᵀ; zero beyond the end of a ragged block."""
    k = tl.program_id(1)
    P: tl.constexpr = B * (B - 1) // 2
    if k < count0:
        dq = dq0 + k * P
        limit = tl.minimum(size0 - k * B, B)
    else:
        dq = dq1 + (k - count0) * P
        limit = tl.minimum(size1 - (k - count0) * B, B)
    dB_k, D_k, Dt_k, Q_k = dB + k * (B * B), D + k * (B * B), Dt + k * (B * B), Q + k * (B * B)
    column = tile_column(tl.program_id(0))
    row = tl.program_id(0) - column * (column + 1) // 2
    i, j = row * TILE + tl.arange(0, TILE), column * TILE + tl.arange(0, TILE)
    total = add_product(tl.full([TILE, TILE], 0.0, tl.float32), Q_k, Dt_k, i, j, B, EVEN, STEP, PRECISION)
    total = -add_product(total, Q_k, D_k, i, j, B, EVEN, STEP, PRECISION)  # −QT
    total = add_product(total, D_k, Q_k, i, j, B, EVEN, STEP, PRECISION)
    total = add_product(total, Dt_k, Q_k, i, j, B, EVEN, STEP, PRECISION)  # −TQ
    own = matrix_tile(dB_k, i, j, B, EVEN) - tl.trans(matrix_tile(dB_k, j, i, B, EVEN))
    gradient = 2 * own + total
    i, j = i[:, None], j[None, :]
    gradient = tl.where(j < limit, gradient, 0.0)
    offset = i * (2 * B - i - 1) // 2 + j - i - 1
    tl.store(dq + offset, gradient.to(dq.dtype.element_ty), mask=(i < j) & (j < B))


class _Tile(NamedTuple):
    size: int
    warps: int


#: Both sum over the same index in the same order, by the same instructions: the choice does not change a bit. With the
#: larger tile the gradient's kernels do not fit a GPU's shared memory.
_TILES = (_Tile(64, 4), _Tile(128, 8))
_GRADIENT_TILES = (_Tile(64, 4),)
#: Features that one turn of a product's loop takes; three TF32 products for one need twice the registers.
_STEPS = {"tf32": 32, "tf32x3": 16}


def _settings(block_size: int, tile: _Tile, narrow: bool) -> dict[str, Any]:
    size = tile_size(block_size, tile.size)
    precision = float32_precision(narrow)
    settings = {"B": block_size, "EVEN": block_size % size == 0, "TILE": size, "STEP": min(size, _STEPS[precision])}
    return settings | {"PRECISION": precision, "num_warps": tile.warps, "num_stages": 3}


def _two(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return tensors[0], tensors[-1]


def _halves(M_KBB: Tensor, count0: int) -> tuple[Tensor, Tensor]:
    """Where the blocks of the first and of the second packed tensor begin (the whole twice if there is one)."""
    return M_KBB, M_KBB[count0:] if len(M_KBB) > count0 else M_KBB


def _unpack(qs: Sequence[Tensor], sizes: Sequence[int], block_size: int) -> Tensor:
    """Q [ΣK, B, B], float32."""
    count, tile = sum(map(len, qs)), tile_size(block_size, _TILES[0].size)
    Q = torch.empty(count, block_size, block_size, dtype=torch.float32, device=qs[0].device)
    tiles = ceil_div(block_size, tile)
    sides = (len(qs[0]), sizes[0], sizes[-1])
    launch(unpack_kernel, (tiles * (tiles + 1) // 2, count), *_two(qs), Q, *sides, B=block_size, TILE=tile)
    return Q


def cayley(
    qs: Sequence[Tensor],
    sizes: Sequence[int],
    block_size: int,
    order: int,
    dtype: torch.dtype,
    squares: list[Tensor] | None = None,
) -> list[Tensor]:
    """Blocks G [K_s, B, B] in ``dtype`` for each of one or two packed tensors q_s [K_s, P] of one block size.

    Twin of :func:`poetx.ops.cayley.cayley_forward`. Three launches for order 3, four for order 7; scratch of three
    float32 [ΣK, B, B] (five for order 7), which are put into ``squares`` if they are wanted: Q, S and P.
    """
    assert order in (3, 7)
    assert len(qs) in (1, 2)
    qs = [q.contiguous() for q in qs]
    narrow = dtype == torch.bfloat16
    one = block_size <= _TILES[0].size or float32_precision(narrow) != "tf32"  # the larger tile would spill registers
    tiles = _TILES[:1] if one else _TILES
    Q = _unpack(qs, sizes, block_size)
    S, P = torch.empty_like(Q), torch.empty_like(Q)
    plans = [partial(_cayley, qs, order, dtype, Q, S, P, _settings(block_size, tile, narrow)) for tile in tiles]
    key = ("cayley", len(S), block_size, order, dtype, qs[0].dtype, qs[0].device)
    if squares is not None:
        squares += [Q, S, P]
    return fastest(key, qs[0].device, plans)


def _cayley(qs, order, dtype, Q, S, P, settings) -> list[Tensor]:
    count0, count = len(qs[0]), len(Q)
    B, tiles = settings["B"], ceil_div(settings["B"], settings["TILE"])
    launch(square_kernel, (tiles * (tiles + 1) // 2, count), Q, S, P, **settings)
    blocks = [torch.empty(len(q), B, B, dtype=dtype, device=q.device) for q in qs]
    G0, G1 = _two(blocks)
    if order == 3:
        launch(series_kernel, (tiles * tiles, count), P, S, G0, G1, S, count0, FACTORS=False, **settings)
        return blocks
    E, F = torch.empty_like(S), torch.empty_like(S)
    launch(series_kernel, (tiles * tiles, count), P, S, *_halves(E, count0), F, count0, FACTORS=True, **settings)
    launch(extend_kernel, (tiles * tiles, count), E, F, G0, G1, count0, **settings)
    return blocks


def cayley_backward(
    grads: Sequence[Tensor],
    qs: Sequence[Tensor],
    sizes: Sequence[int],
    block_size: int,
    order: int,
    narrow: bool,
    squares: Sequence[Tensor] = (),
) -> list[Tensor]:
    """∂L/∂q_s [K_s, P] in q_s's dtype from Γ_s [K_s, B, B].

    Twin of :func:`poetx.ops.cayley.cayley_backward`. Four launches for order 3, six for order 7, two less with Q, S
    and P; scratch of six (ten) float32 [ΣK, B, B].

    Args:
        narrow: the activations behind Γ are bfloat16, so that TF32 products lose nothing.
        squares: what :func:`cayley` of these tensors has kept.
    """
    assert order in (3, 7)
    assert len(qs) in (1, 2)
    grads = [grad.contiguous() for grad in grads]
    Q = squares[0] if squares else _unpack([q.contiguous() for q in qs], sizes, block_size)
    S, P = squares[1:] if squares else (None, None)
    tiles = [_settings(block_size, tile, narrow) for tile in _GRADIENT_TILES]
    plans = [partial(_cayley_backward, grads, qs, sizes, order, Q, S, P, settings) for settings in tiles]
    key = ("cayley_backward", sum(map(len, qs)), block_size, order, narrow, grads[0].dtype, qs[0].dtype, qs[0].device)
    return fastest(key, qs[0].device, plans)


def _cayley_backward(grads, qs, sizes, order, Q, S, P, settings) -> list[Tensor]:
    count0, count = len(qs[0]), len(Q)
    tiles = ceil_div(settings["B"], settings["TILE"])
    upper, whole = (tiles * (tiles + 1) // 2, count), (tiles * tiles, count)
    if S is None:
        S, P = torch.empty_like(Q), torch.empty_like(Q)
        launch(square_kernel, upper, Q, S, P, **settings)
    dF = S
    if order == 7:
        E, F, dX, dF = (torch.empty_like(S) for _ in range(4))
        launch(series_kernel, whole, P, S, *_halves(E, count0), F, count0, FACTORS=True, **settings)
        launch(extend_gradient_kernel, whole, *_two(grads), E, F, dX, dF, count0, **settings)
        grads = _halves(dX, count0)
    dB, D, Dt = (torch.empty_like(Q) for _ in range(3))
    launch(factor_gradient_kernel, whole, *_two(grads), P, S, dF, dB, D, Dt, count0, FACTORS=order == 7, **settings)
    dqs = [torch.empty_like(q, memory_format=torch.contiguous_format) for q in qs]
    launch(pack_gradient_kernel, upper, dB, D, Dt, Q, *_two(dqs), count0, sizes[0], sizes[-1], **settings)
    return dqs
