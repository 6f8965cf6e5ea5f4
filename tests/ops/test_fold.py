"""Folding: the function, the spectrum over hundreds of merges, unbiased rounding."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from helpers import TOLERANCE, random_skew, relative_error
from poetx.ops import reference
from poetx.ops.fold import fold, full_precision_products, largest_angle
from poetx.ops.random import join_bits, split_bits, stochastic_round_
from poetx.ops.reference import EXACT
from poetx.ops.side import Side


def side(q, size, block_size):
    return Side(q, torch.arange(size).int(), size, block_size)


@pytest.mark.parametrize("order", [3, 7, EXACT])
@pytest.mark.parametrize(("m", "n", "block_out", "block_in"), [(12, 8, 4, 4), (7, 13, 3, 5), (5, 1, 5, 1)])
def test_fold_is_the_product_of_the_rotations(m, n, block_out, block_in, order):
    weight = torch.randn(m, n, dtype=torch.float64)
    q_in, q_out = random_skew(n, block_in, seed=1), random_skew(m, block_out, seed=2)
    got = fold(weight, (side(q_in, n, block_in), side(q_out, m, block_out)), order=order)
    identity_in, identity_out = torch.arange(n), torch.arange(m)
    P = reference.rotation_matrix(q_in, identity_in, block_in, order)
    R = reference.rotation_matrix(q_out, identity_out, block_out, order)
    assert relative_error(got, (P @ weight.T @ R).T) < TOLERANCE[torch.float64]


def test_fold_is_float32_for_narrow_weights_and_leaves_settings_alone():
    torch.set_float32_matmul_precision("medium")
    try:
        weight = torch.randn(8, 8).bfloat16()
        q = random_skew(8, 4, dtype=torch.float32)
        assert fold(weight, (side(q, 8, 4),) * 2).dtype == torch.float32
        assert torch.get_float32_matmul_precision() == "medium"
        with full_precision_products():
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_settings_are_put_back_when_the_last_thread_leaves():
    settings = torch.backends.mkldnn.matmul
    before, first, second = settings.fp32_precision, full_precision_products(), full_precision_products()
    settings.fp32_precision = "bf16"
    try:
        first.__enter__()
        with ThreadPoolExecutor(1) as thread:
            thread.submit(second.__enter__).result()
            first.__exit__(None, None, None)
            assert settings.fp32_precision == "ieee"  # the other thread still multiplies
            thread.submit(second.__exit__, None, None, None).result()
        assert settings.fp32_precision == "bf16"
    finally:
        settings.fp32_precision = before


def test_fold_with_tf32_chosen_by_the_newer_interface():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        q = random_skew(8, 4, dtype=torch.float32)
        fold(torch.randn(8, 8), (side(q, 8, 4),) * 2)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_stochastic_rounding_is_unbiased_and_lands_on_neighbours():
    value = torch.tensor([1.001, -1.001, 3e-3, -255.3, 1e-40, 0.0])
    target = torch.empty(20000, 6, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    stochastic_round_(target, value.expand(20000, 6), generator)
    gap = value.abs().bfloat16().float() * 2**-7
    assert ((target.float() - value).abs() <= gap + 1e-37).all()
    # mean of 20000 draws: standard error gap/2/141, five of them allowed
    assert ((target.float().mean(0) - value).abs() <= 5 * gap / 2 / 141 + 1e-39).all()
    exact = torch.tensor([1.0, -0.5, 0.0]).bfloat16()
    assert torch.equal(stochastic_round_(torch.empty_like(exact), exact.float(), generator), exact)


def test_stochastic_rounding_keeps_infinities_and_nan():
    value = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])
    value[3] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # the NaN of all bits set
    got = stochastic_round_(torch.empty(4, dtype=torch.bfloat16), value, torch.Generator().manual_seed(0))
    assert got.isinf().tolist() == [True, True, False, False]
    assert got.isnan().tolist() == [False, False, True, True]


def test_neighbouring_entries_are_rounded_independently():
    """Halfway between two neighbours each goes up with probability ½: in a group of four, variance 4·¼."""
    count = 80002  # no multiple of four
    target = torch.empty(count, dtype=torch.bfloat16)
    stochastic_round_(target, torch.full((count,), 1 + 2**-8), torch.Generator().manual_seed(0))
    up = (target > 1).float()
    assert abs(up.mean() - 0.5) < 5 * 0.5 / count**0.5
    for stride in (1, 2, 4):
        groups = up[: count - count % (4 * stride)].view(-1, 4, stride).sum(1)
        assert abs(groups.var() - 1) < 0.05


def test_plain_copy_in_float32():
    value = torch.randn(5)
    assert torch.equal(stochastic_round_(torch.empty(5), value, torch.Generator()), value)


def test_split_bits_is_a_stable_three_byte_float():
    value = torch.cat([torch.randn(10000) * 10.0 ** torch.randint(-6, 6, (10000,)), torch.tensor([0.0, -0.0, 1.0])])
    high, low = split_bits(value)
    assert high.dtype == torch.bfloat16
    assert low.dtype == torch.int8
    joined = join_bits(high, low)
    assert ((joined - value).abs() <= value.abs() * 2**-16 + 1e-40).all()
    assert ((high.float() - value).abs() <= value.abs() * 2**-8).all()
    again = split_bits(joined)
    assert torch.equal(again[0], high)
    assert torch.equal(again[1], low)


@pytest.mark.parametrize("size", [2, 16, 48])
def test_largest_angle_is_the_spectral_norm(size):
    q = random_skew(3 * size, size, angle=0.3, dtype=torch.float32)
    want = torch.linalg.matrix_norm(reference.unpack_skew(q, size), ord=2).max()
    got = largest_angle(side(q, 3 * size, size))
    assert 0.95 * want < got < 1.0001 * want
    assert largest_angle(side(torch.zeros_like(q), 3 * size, size)) == 0
