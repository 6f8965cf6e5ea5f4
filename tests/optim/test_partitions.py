"""Which pairs of coordinates the writes of a step can mix, and after how many every pair has been."""

import math

import pytest
import torch
from torch import nn

from poetx import POETX
from poetx.optim.partitions import partition


def sharing(kind, index, size, block, *, name="x", draw=0):
    """[size, size], whether two coordinates share a block."""
    block = min(block, size)
    order = partition(kind, index, size, block, seed=0, name=name, draw=draw)
    assert sorted(order.tolist()) == list(range(size))
    block_of = torch.empty(size, dtype=torch.int64)
    block_of[order] = torch.arange(size) // block
    return block_of[:, None] == block_of[None]


def then(first, second):
    """Connected by a mixing of the first kind followed by one of the second."""
    return (first.double() @ second.double()) > 0


@pytest.mark.parametrize("size", [9, 12, 13, 28, 60, 64, 192, 257])
@pytest.mark.parametrize("wider", [0, 3, 100])
def test_structured_partitions_connect_every_pair_by_two_writes(size, wider):
    block = min(size - 1, math.ceil(math.sqrt(size)) + wider)  # no more blocks than their width
    contiguous, strided = (sharing("structured", index, size, block) for index in (0, 1))
    turn = then(contiguous, strided)
    assert (turn | turn.T).all()
    assert then(turn, contiguous).all()
    if block < size // 2:
        assert not (contiguous | strided).all()  # most pairs never share a block


def test_narrow_blocks_mix_everything_in_the_end():
    """With contiguous and strided blocks of b < n/b, b² coordinates would stay among themselves for ever."""
    size, block = 64, 4
    contiguous, other = (sharing("structured", index, size, block) for index in (0, 1))
    turn = reach = then(contiguous, other)
    turns = 1
    while not reach.all():
        reach, turns = then(reach, turn), turns + 1
        assert turns < 8
    assert turns > 1


def test_one_fixed_partition_never_mixes_across_its_blocks():
    alone = sharing("structured", 0, 64, 8)
    assert torch.equal(then(alone, alone), alone)


def test_resampling_mixes_every_pair_directly_in_the_stated_number_of_draws():
    size, block, chance = 96, 24, 0.01
    draws = math.ceil(math.log(size * (size - 1) / 2 / chance) / -math.log(1 - (block - 1) / (size - 1)))
    together = torch.zeros(size, size, dtype=torch.bool)
    shares = []
    for draw in range(draws):
        together |= sharing("random", 0, size, block, draw=draw)
        shares.append(together.double().mean().item())
    assert shares[0] == pytest.approx(block / size)
    assert shares[draws // 4] < 1
    assert shares[-1] == 1


@pytest.mark.parametrize("kind", ["structured", "random"])
def test_writes_mix_exactly_the_pairs_that_share_a_block(kind):
    """From W = 1, the nonzeros after every step are those that the turn's blocks allow, all of them."""
    size, block = 36, 6
    W = nn.Parameter(torch.eye(size, dtype=torch.float64))
    optimizer = POETX(
        [{"params": [W], "lr": 0.05, "rotate": True}], block_size=block, partitions=2, partition_kind=kind
    )
    allowed = torch.eye(size, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    counts = []
    for step in range(8):
        W.grad = torch.randn(size, size, dtype=torch.float64, generator=generator)
        optimizer.step()
        index, side = divmod(step % 4, 2)  # in 0, out 0, in 1, out 1
        name = "0/out" if side else "0/in"
        blocks = sharing(kind, index, size, block, name=name)
        allowed = then(blocks, allowed) if side else then(allowed, blocks)
        assert torch.equal(W.detach().abs() > 1e-12, allowed)
        counts.append(allowed.sum().item())
    assert counts[0] == size * block
    assert counts[-1] == size * size
    if kind == "structured":  # contiguous, contiguous again on the other side, strided: every pair after 3 of 4 steps
        assert counts[:3] == [size * block, size * block, size * size]
