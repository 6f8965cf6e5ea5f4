"""What the single step does to a weight and its state: the fold, ‖W‖ held, the momenta decayed; nothing in place.

For many matrices each is one launch on a GPU, in place, with noise of the kernels' own:
:mod:`poetx.ops.triton.single_step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from poetx.ops.block_diagonal import left_rotate, rotate
from poetx.ops.library import device_type
from poetx.ops.random import Within, stochastic_round_
from poetx.ops.side import block_count

#: Elements of a weight that a fold holds in float32 at a time where no kernel does it in one pass.
_FOLD_ELEMENTS = {"cpu": 1 << 22}
_FOLD_ELEMENTS_ELSEWHERE = 1 << 24
#: Weights whose ‖W‖ differs by less count as those of the last fold: stochastic rounding of bfloat16 moves it by 0.8 %.
SAME_NORM = 0.01


class Shard(NamedTuple):
    """Rows of a matrix of ``rows`` rows: ``own`` is what is written, and what is read of it begins at row ``begin``."""

    rows: int
    own: slice
    begin: int


def fold_(
    W: Tensor,
    E_KBB: Tensor,
    side: str,
    out: Tensor,
    *,
    touched: Tensor,
    scale: Tensor,
    seed: int,
    shard: Shard | None = None,
) -> Tensor:
    """``scale·(I + E)·W`` (side "out") or ``scale·W·(I + E)`` ("in") of every matrix of a stack, into ``out``.

    Args:
        W, out: [e, m, n], float32, float64 or bfloat16, the last rounded stochastically. Products run in E's dtype, in
            full precision under :func:`poetx.ops.fold.full_precision_products`, which the caller enters.
        E_KBB: G − I, of each block of each matrix, zero where the block is not ``touched`` [eK], bool.
        scale: [e], float64, of the touched blocks: the others stay as they are. seed: of the rounding.
        shard: W and out are these rows of a larger matrix (e is 1), and are rounded as they would be there. For side
            "out" W has all rows of every block that the own rows are in; for "in" it has the own rows.

    Returns:
        [2, e, parts]: to be summed, ‖W‖² of the own rows as they were read, and as they were written, before rounding.
    """
    noise = torch.Generator(W.device).manual_seed(seed) if W.dtype == torch.bfloat16 else None
    scales = torch.where(touched.view(len(W), -1), scale[:, None], 1.0)
    parts = zip(W, out, E_KBB.chunk(len(W)), scales, strict=True)
    squares = [fold_side(w, E, side, to, scale=s, generator=noise, shard=shard) for w, to, E, s in parts]
    return torch.stack(squares, 1)[:, :, None]


def fold_side(
    W: Tensor,
    E_KBB: Tensor,
    side: str,
    out: Tensor,
    *,
    scale: Tensor,
    generator: torch.Generator | None = None,
    shard: Shard | None = None,
) -> Tensor:
    """:func:`fold_` of one matrix [m, n] in plain torch, with a scale [K] of each block; [2], float64: both ‖W‖²."""
    dim = 0 if side == "out" else 1
    whole = Shard(W.shape[0], slice(0, W.shape[0]), 0)
    rows, own, begin = shard or whole
    end = begin + W.shape[0]
    size, block_size = (rows, W.shape[1])[dim], E_KBB.shape[-1]
    budget = _FOLD_ELEMENTS.get(device_type(W), _FOLD_ELEMENTS_ELSEWHERE)
    step = max(1, budget // (rows * W.shape[1] // size * block_size))
    squares = []
    scale = scale.to(E_KBB.dtype)
    E_KBB = E_KBB * scale[:, None, None]
    scale = scale.repeat_interleave(block_size)[:size]
    scale = scale if dim else scale[:, None]
    for first in range(0, E_KBB.shape[0], step):
        start, stop = first * block_size, min((first + step) * block_size, size)
        if dim:
            E, top, bottom, width = E_KBB[first : first + step], 0, rows, stop - start
            wide, target = W[:, start:stop].to(E.dtype), out[:, start:stop]
            moved = rotate(wide, E).addcmul_(wide, scale[start:stop])
        else:
            top, bottom, width = start, stop, W.shape[1]
            low, high = (min(max(edge, begin), end) for edge in (start, stop))  # what is there of these rows
            E = E_KBB[low // block_size : block_count(high, block_size)]
            wide = W[low - begin : high - begin].to(E.dtype)
            moved = left_rotate(wide, E).addcmul_(wide, scale[low:high]) if low < high else wide
            kept = [min(max(edge, own.start), own.stop) for edge in (start, stop)]
            wide, moved = (t[kept[0] - low : kept[1] - low] for t in (wide, moved))
            target = out[kept[0] - own.start : kept[1] - own.start]
        # The rows' norms first: as exact as a sum in float64 and many times faster.
        squares += [torch.linalg.vector_norm(matrix, dim=1).double().square().sum() for matrix in (wide, moved)]
        noise = generator
        if shard is not None and generator is not None:
            before, after = (min(max(edge, top), bottom) for edge in (own.start, own.stop))
            noise = Within(generator, (before - top) * width, (bottom - after) * width)
        stochastic_round_(target, moved, noise)
    return torch.stack(squares).view(-1, 2).sum(0)


def norm_and_scale(
    squares: Tensor,
    touched: Tensor,
    norm: Tensor,
    scale: Tensor,
    *,
    step: int,
    growth: float,
    found: Tensor | None = None,
) -> Tensor:
    """[2, e], float64: the ‖W‖ to hold, and the factor that the next step takes its excess away by.

    If ‖W‖ was within 1 % of what the last fold left, this is the same weight; otherwise somebody wrote another one, by
    whatever way, and its norm is held. It grows to √(1 + growth · steps) times the first one, by the part of the matrix
    that is trained.

    Args:
        squares: of :func:`fold_`. touched: [eK], bool. norm, scale: [e], as they are.
        step: the one that is taken, from 1 on. found: [e], ‖W‖ before the fold where it must be exact in float64.
    """
    read, left = squares.sum(2, dtype=torch.float64).sqrt()
    before, after = 1 + growth * (step - 1), 1 + growth * step
    first: Tensor = (read if found is None else found) / before**0.5
    held = torch.where((first * scale / norm - 1).abs() < SAME_NORM, norm, first)
    if growth:
        share = touched.view(len(norm), -1).double().mean(1)
        held = held * ((1 + growth * (step - 1 + share)) / after).sqrt()
    ratios = held * after**0.5 / left
    return torch.stack([held, torch.where(ratios.isfinite() & (ratios > 0), ratios, 1.0)])  # zeros stay zeros


def decayed(momenta: Tensor, sizes: Sequence[int], upcoming: int | None, factor: float, seeds: Sequence[int]) -> Tensor:
    """``factor`` · momenta, flat, and after them once more what is the momentum number ``upcoming`` then.

    Args:
        momenta: flat, several of ``sizes`` one after the other; bfloat16 is rounded stochastically. seeds: of each.
    """
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    copied = slice(0, 0) if upcoming is None else slice(starts[upcoming], starts[upcoming] + sizes[upcoming])
    number = momenta.numel()
    out = momenta.new_empty(number + copied.stop - copied.start)
    if momenta.dtype != torch.bfloat16:
        torch.mul(momenta, factor, out=out[:number])
    else:
        pieces = zip(momenta.split(list(sizes)), out[:number].split(list(sizes)), seeds, strict=True)
        for momentum, new, seed in pieces:
            noise = torch.Generator(momenta.device).manual_seed(seed)
            stochastic_round_(new, momentum.float().mul_(factor), noise)
    out[number:] = out[copied]
    return out
