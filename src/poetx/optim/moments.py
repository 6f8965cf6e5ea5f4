"""Moving averages as they are stored: as numbers of some dtype, or as codes of 8 bits with a scale for 256 of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from poetx.distributed.sharded import is_sharded
from poetx.errors import UserError, nearest
from poetx.ops.random import Within
from poetx.ops.side import block_count
from poetx.optim.sliced import compute_dtype, flat, write_

STATE_DTYPES = ("same", "float32", "bfloat16", "int8")
#: Elements that share one scale in the 8-bit state.
BLOCK = 256
#: Parameters below this size keep float32 state: there is nothing to save.
SMALL = 4096
# Code c stands for scale · (c / codes)^power: steps finer towards zero. The moments of one block spread over
# decades; what has no sign is a second moment, which is divided by: it gets the wider range and never rounds to zero.
_CODES = {torch.int8: (127, 3), torch.uint8: (255, 4)}


def check_state_dtype(value: Any) -> None:
    """Raise :class:`UserError` where ``value`` is none of :data:`STATE_DTYPES`."""
    if value not in STATE_DTYPES:
        raise UserError(
            f"state_dtype={value!r}: must be one of {', '.join(STATE_DTYPES)}{nearest(str(value), STATE_DTYPES)}"
        )


def stored_dtype(kind: str, parameter: Tensor, *, signed: bool = True) -> torch.dtype:
    """The dtype in which a moment of ``parameter`` is stored, int8 and uint8 for codes."""
    if parameter.numel() < SMALL or kind == "float32":
        return compute_dtype(parameter)
    if kind == "int8":
        return torch.int8 if signed else torch.uint8
    return torch.bfloat16 if kind == "bfloat16" else parameter.dtype


def shapes_of(name: str, size: int) -> dict[str, tuple[tuple[int, ...], ...]]:
    """What codes of ``size`` elements are saved as, for :class:`poetx.optim.saved_kinds.Kind`."""
    return {name: ((size,),), f"{name}_scale": ((block_count(size, BLOCK),),)}


def start_(state: dict[str, Any], name: str, like: Tensor, dtype: torch.dtype, *, flat: bool = False) -> None:
    """Put zeros into ``state``, of the shape of ``like`` unless ``flat`` or codes, and sharded where that is."""
    size, device = like.numel(), like.device
    if dtype in _CODES:
        state[f"{name}_scale"] = torch.zeros(block_count(size, BLOCK), device=device)
    if is_sharded(like):
        state[name] = torch.zeros_like(like, dtype=dtype)
    else:
        shape = (size,) if flat or dtype in _CODES else like.shape
        state[name] = torch.zeros(shape, dtype=dtype, device=device)


def load(state: dict[str, Any], name: str, here: slice, dtype: torch.dtype) -> Tensor:
    """A fresh tensor of the moment's values in this slice of its elements, which begins where a block does."""
    stored, scale = flat(state[name])[here], state.get(f"{name}_scale")
    if scale is None:
        return stored.to(dtype, copy=True)
    codes, power = _CODES[stored.dtype]
    ratio = stored.to(dtype).div_(codes)
    value = ratio.abs().pow_(power).mul_(ratio.sign())
    return _scaled_(value, scale[here.start // BLOCK :])


def store_(state: dict[str, Any], name: str, here: slice, value: Tensor, noise: torch.Generator | Within) -> None:
    """Write ``value`` into a slice of the stored moment, rounded stochastically where that is narrow."""
    stored = flat(state[name])[here]
    if f"{name}_scale" not in state:
        write_(stored, value, noise)
        return
    codes, power = _CODES[stored.dtype]
    scale = state[f"{name}_scale"][here.start // BLOCK : block_count(here.stop, BLOCK)]
    assert not isinstance(noise, Within)  # refused for shards
    padded = torch.nn.functional.pad(value.abs(), (0, -value.numel() % BLOCK))
    scale.copy_(padded.view(-1, BLOCK).amax(1))
    ratio = _scaled_(value.abs(), torch.where(scale > 1e-37, 1 / scale, 0.0))
    low = ratio.pow(1 / power).mul_(codes).floor_().clamp_(0, codes - 1)
    below = (low / codes).pow_(power)
    above = (low + 1).div_(codes).pow_(power)
    chance = torch.rand(low.shape, dtype=low.dtype, device=low.device, generator=noise)
    low += chance < (ratio - below) / (above - below)
    if stored.dtype == torch.uint8:
        low = torch.where(ratio > 0, low.clamp_min_(1), low)
    stored.copy_(low.mul_(value.sign()))


def _scaled_(value: Tensor, scale: Tensor) -> Tensor:
    """``value`` times its block's scale, in place; the last block may be short."""
    full = value.numel() // BLOCK
    value[: full * BLOCK].view(full, BLOCK).mul_(scale[:full, None])
    if full * BLOCK < value.numel():
        value[full * BLOCK :].mul_(scale[full])
    return value


def refuse_shards(kind: str, parameters: Sequence[Tensor]) -> None:
    """Raise :class:`UserError` where codes are asked for shards, which end among the elements that share a scale."""
    if kind == "int8" and any(map(is_sharded, parameters)):
        raise UserError(
            f"state_dtype='int8': {BLOCK} neighbours share a scale, and shards end among them; use "
            "state_dtype='bfloat16' under fully_shard"
        )
