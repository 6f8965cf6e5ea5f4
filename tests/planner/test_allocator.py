"""The caching allocator's rules, worked out by hand, and the estimate that replays a step by them."""

import math

import pytest
from transformers import LlamaConfig

from poetx.errors import UserError
from poetx.planner import TrainingSetup, estimate_memory
from poetx.planner.allocator import CachingAllocator, OutOfMemory

MIB = 1 << 20


def test_segments_by_size():
    allocator = CachingAllocator()
    held = []
    for size, segment in ((1, 2), (MIB, 0), (MIB + 1, 20), (9 * MIB, 0), (11 * MIB, 12), (12 * MIB + 1, 14)):
        before = allocator.reserved
        held.append(allocator.allocate(size))
        assert allocator.reserved - before == segment * MIB, size
    assert held[0].size == 512
    assert held[1].size == MIB
    # 12 MiB for 11: the rest of 1 MiB is no block of its own
    assert held[4].size == 12 * MIB


def test_neighbours_merge_and_the_best_fit_is_taken():
    allocator = CachingAllocator()
    a, b, c = (allocator.allocate(size * MIB) for size in (4, 6, 8))  # 20 MiB, 2 of them free
    other = allocator.allocate(12 * MIB)
    allocator.release(other)
    allocator.release(a)
    assert allocator.allocate(4 * MIB) is a  # 4 MiB fits better than 12
    allocator.release(a)
    allocator.release(c)
    allocator.release(b)
    assert allocator.reserved == 32 * MIB
    assert allocator.allocate(20 * MIB).size == 20 * MIB  # all three and the rest are one again
    assert allocator.reserved == 32 * MIB


def test_a_full_card_takes_back_what_is_whole():
    allocator = CachingAllocator(card=40 * MIB)
    small, large = allocator.allocate(2 * MIB), allocator.allocate(20 * MIB)
    allocator.release(large)
    allocator.allocate(19 * MIB)  # out of large's segment, which stays
    assert allocator.reserved == 40 * MIB
    with pytest.raises(OutOfMemory):
        allocator.allocate(30 * MIB)
    allocator.release(small)
    allocator.allocate(16 * MIB)  # of small's segment of 20 MiB
    assert allocator.reserved == allocator.peak == 40 * MIB
    fresh = CachingAllocator(card=40 * MIB)
    fresh.release(fresh.allocate(30 * MIB))
    fresh.allocate(36 * MIB)
    assert fresh.reserved == 36 * MIB


def test_what_is_held_is_more_than_what_is_used_and_ends_at_the_card():
    config = LlamaConfig(
        vocab_size=3000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8
    )
    setup = TrainingSetup(method="adamw", seq_len=256)
    estimate = estimate_memory(config, setup, card_gib=math.inf)
    assert not estimate.extrapolated
    assert estimate.reserved is not None
    assert estimate.peak < estimate.reserved < 2 * estimate.peak
    tight = estimate_memory(config, setup, card_gib=0.99 * estimate.reserved / 2**30)
    assert tight.reserved is None or tight.reserved < estimate.reserved
    assert estimate_memory(config, setup, card_gib=0.99 * estimate.gib).reserved is None
    assert estimate_memory(config, setup).reserved is None
    with pytest.raises(UserError, match="card_gib"):
        estimate_memory(config, setup, card_gib=24, device="cpu")
