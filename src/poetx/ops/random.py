"""Seeded bits: streams that depend on their names alone, rounding by them, and splitting off what rounding loses.

Drawn from ``PoetConfig.seed``, the layer's name and its count: permutations and rounding of a merge
(``PoetLinear.merge_``), fresh weights (``layers.base.fresh_weight``). From an optimizer's ``seed`` and its step:
rounding of weights and state (``SlicedOptimizer``; ``Matrix`` of ``POETX``).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


def stream(seed: int, name: str, count: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on its arguments alone, so that every rank and every resumed run draws the same."""
    return torch.Generator(device).manual_seed(stream_seed(seed, name, count, purpose))


def stream_seed(seed: int, name: str, count: int, purpose: str) -> int:
    """What :func:`stream` seeds its generator with: 56 bits."""
    digest = hashlib.sha256(f"{seed}/{name}/{count}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, of the CPU and of ``device``, and put them back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Within(NamedTuple):
    """The noise of a whole for a part of it: of neighbours with ``before`` and ``after`` so many other elements.

    The part is rounded as it would be within the whole, and the generator is left as by the whole.
    """

    generator: torch.Generator
    before: int
    after: int


def stochastic_round_(target: Tensor, value: Tensor, generator: torch.Generator | Within | None = None) -> Tensor:
    """Write ``value`` (float32) into ``target``, rounding up or down at random in proportion to the distance.

    Unbiased, so that moves smaller than half a unit in the last place are not lost on the way. ``target`` of
    float32 or float64 takes the plain value; bfloat16 is rounded by its low 16 bits; float16 is not supported.
    Without a ``generator`` the noise comes from the device's global one.
    """
    if target.dtype != torch.bfloat16:
        return target.copy_(value)
    value = value.float().contiguous()
    bits = value.view(torch.int32)
    before, size = 0, bits.numel()
    if isinstance(generator, Within):
        generator, before, after = generator
        size += before + after
    # Four numbers a draw. Signed ones, so the middle is added, too; they need half the memory and draws of int32.
    draws = torch.empty((size + 3) // 4, dtype=torch.int64, device=bits.device)
    draws.random_(-(1 << 63), None, generator=generator)
    noise = draws.view(torch.int16)[before : before + bits.numel()].view(bits.shape)
    # Adding to the magnitude's low half carries into the kept half with the right probability; the mask then
    # truncates. Works for either sign, because the sign bit stands apart from the magnitude, and keeps infinities.
    rounded = bits.add(noise).add_(1 << 15).bitwise_and_(-(1 << 16)).view(torch.float32)
    return target.copy_(torch.where(value == value, rounded, value))  # a NaN could carry into its sign


def split_bits(value: Tensor) -> tuple[Tensor, Tensor]:
    """float32 → (bfloat16 rounded to nearest, int8 residual): the upper 24 bits in 3 bytes.

    The residual counts steps of 2⁻⁸ of a bfloat16 unit in the last place, so that :func:`join_bits` is within 2⁻¹⁶
    of the value, relative, and splitting what it returns gives the same pair again.
    """
    bits = value.float().contiguous().view(torch.int32)
    high = bits.add(1 << 15) >> 16
    low = (bits - (high << 16)) >> 8
    return (high << 16).view(torch.float32).bfloat16(), low.to(torch.int8)


def join_bits(high: Tensor, low: Tensor) -> Tensor:
    """The float32 that :func:`split_bits` took apart, up to its last byte, which becomes its middle."""
    bits = high.float().contiguous().view(torch.int32)
    return (bits + (low.to(torch.int32) << 8) + (1 << 7)).view(torch.float32)
