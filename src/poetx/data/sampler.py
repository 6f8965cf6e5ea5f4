"""Which window is seen at which step, as a pure function of (seed, step).

Training windows are visited in a fresh pseudo-random order every epoch. The order is a Feistel network on the
window index with cycle walking: a bijection on any range, computed for one index at a time, with no shuffled list
to hold, store or restore. A resumed run sees the same data because there is no loader state at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

_CYCLE = 10_000  # windows of a mixture in which every source has its share

_ROUNDS = 4  # Luby and Rackoff (1988): four rounds of a good round function make a strong pseudo-random permutation
_MASK_64 = (1 << 64) - 1


def permute(index: int, size: int, *, key: int) -> int:
    """Position ``index`` under a pseudo-random permutation of ``range(size)`` chosen by ``key``.

    Cycle walking: the network permutes a power of four that is at least ``size`` and less than four times it, and
    is applied again until the value falls below ``size``; four times on average at most.
    """
    if not 0 <= index < size:
        raise ValueError(f"index={index} outside range({size})")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        index = _feistel(index, half_bits, key)
        if index < size:
            return index


def window_at(position: int, windows: int, *, seed: int) -> int:
    """The window at ``position`` of the endless stream: epoch after epoch, each window once an epoch."""
    epoch, index = divmod(position, windows)
    return permute(index, windows, key=_mix(_mix(seed) + epoch))


def mixed_window_at(position: int, shares: Sequence[tuple[int, float]], *, seed: int) -> int:
    """The window at ``position`` of an endless mixture of sources, whose windows are numbered one after the other.

    Among every 10 000 windows each source has its share, in pseudo-random order; its own are visited epoch after epoch.

    Args:
        shares: windows and weight of each source.
    """
    total = sum(weight for _, weight in shares)
    slots = [max(1, round(weight / total * _CYCLE)) for _, weight in shares]
    cycle, place = divmod(position, sum(slots))
    slot = permute(place, sum(slots), key=_mix(_mix(seed) ^ _mix(cycle)))
    source = next(number for number, end in enumerate(accumulate(slots)) if slot < end)
    own = cycle * slots[source] + slot - sum(slots[:source])
    before = sum(windows for windows, _ in shares[:source])
    return before + window_at(own, shares[source][0], seed=_mix(seed + source))


def batch_windows(step: int, *, batch_size: int, windows: int | Sequence[tuple[int, float]], seed: int) -> list[int]:
    """Window indices of the batch of 0-based ``step``. A batch may straddle two epochs.

    Args:
        windows: how many there are; of a mixture those of every source with its weight.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    if isinstance(windows, int):
        return [window_at(position, windows, seed=seed) for position in positions]
    return [mixed_window_at(position, windows, seed=seed) for position in positions]


def evenly_spread(count: int, windows: int) -> list[int]:
    """``count`` window indices (all, when there are fewer) spread evenly: the fixed validation set."""
    count = min(count, windows)
    return [number * windows // count for number in range(count)]


def _feistel(value: int, half_bits: int, key: int) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (_mix(key ^ _mix((number << 56) ^ right)) & mask)
    return left << half_bits | right


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): 64 well mixed bits from any whole number."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK_64
    return value ^ value >> 31
