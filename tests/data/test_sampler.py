"""The order of the windows: a bijection, fresh every epoch, a pure function of the step."""

from __future__ import annotations

import itertools

import pytest

from poetx.data.sampler import batch_windows, evenly_spread, permute, window_at


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 100, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(index, size, key=key) for index in range(size)) == list(range(size))


def test_permute_handles_sizes_no_list_could() -> None:
    size = 10**13 + 7
    seen = {permute(index, size, key=3) for index in range(1000)}
    assert len(seen) == 1000
    assert max(seen) < size
    assert max(seen) > size * 0.9  # spread over the whole range, not huddled at its start
    with pytest.raises(ValueError, match="outside"):
        permute(size, size, key=3)


def test_the_order_looks_random() -> None:
    """No fixed points to speak of, and neighbours do not stay neighbours."""
    order = [permute(index, 4096, key=9) for index in range(4096)]
    assert sum(index == value for index, value in enumerate(order)) < 10
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(order)) < 20


def test_every_window_is_seen_once_an_epoch_also_when_batches_straddle_epochs() -> None:
    windows, batch_size = 10, 4
    stream = [w for step in range(5) for w in batch_windows(step, batch_size=batch_size, windows=windows, seed=1)]
    assert len(stream) == 20
    assert sorted(stream[:10]) == list(range(10))
    assert sorted(stream[10:]) == list(range(10))


def test_epochs_and_seeds_differ() -> None:
    orders = [tuple(window_at(e * 50 + i, 50, seed=s) for i in range(50)) for s in (0, 1) for e in range(3)]
    assert len(set(orders)) == len(orders)


def test_evenly_spread() -> None:
    assert evenly_spread(4, 100) == [0, 25, 50, 75]
    assert evenly_spread(9, 3) == [0, 1, 2]
