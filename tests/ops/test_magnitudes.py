"""No finite input gives a number that is not finite, from 1e-38 to 1e38, wherever the result can be written down."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poetx import PoetConfig, PoetLinear
from poetx.config import WEIGHT_FORMATS
from poetx.ops.cayley import cayley, cayley_delta, packed_size
from poetx.ops.fold import fold, largest_angle
from poetx.ops.quantize import Quantized, dequantize, quantize_
from poetx.ops.random import join_bits, split_bits, stochastic_round_
from poetx.ops.reference import EXACT
from poetx.ops.side import Side

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
#: Of the largest entry, as a power of ten.
POWERS = st.integers(-38, 38)
SHAPES = st.sampled_from(["all alike", "one alone", "spread over magnitudes"])


def values(shape, rows, columns, power, dtype):
    """Entries in (−1, 1) times 10**power, all alike, all but one zero, or down to 1e-20 of the largest."""
    unit = torch.rand(rows, columns, dtype=torch.float64) * 2 - 1
    if shape == "one alone":
        unit = torch.zeros_like(unit)
        unit[0, 0] = 0.7
    elif shape == "spread over magnitudes":
        unit *= 10 ** (-20 * torch.rand_like(unit))
    return (unit * 10.0**power).to(dtype)


def side(shape, power, dtype, *, size=10, block_size=4):
    q = values(shape, -(-size // block_size), packed_size(block_size), power, dtype)
    return Side(q, torch.arange(size).int(), size, block_size)


def finite(*tensors):
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


@SETTINGS
@given(SHAPES, POWERS, DTYPES, st.sampled_from([3, 7, EXACT]))
def test_blocks_and_their_gradient(shape, power, dtype, order):
    """The series are powers of Q up to k + 1, which float32 holds no further; the exact transform is bounded."""
    power = power if order == EXACT else min(power, 30 // (order + 2))
    torch.manual_seed(0)
    q, sizes = side(shape, power, dtype).packed.requires_grad_(), {"size": 10, "block_size": 4}
    G = cayley(q, **sizes, order=order)
    G.backward(torch.randn_like(G))
    assert finite(G, q.grad, cayley_delta(q.detach(), **sizes, order=order))


@SETTINGS
@given(SHAPES, POWERS, DTYPES, st.integers(-38, 30))
def test_folding(shape, turn, dtype, power):
    torch.manual_seed(0)
    W = values(shape, 10, 10, power, dtype)
    assert finite(fold(W, (side(shape, turn, dtype), side("all alike", turn, dtype))))


@SETTINGS
@given(SHAPES, POWERS, DTYPES)
def test_the_largest_angle_grows_with_the_rotation(shape, power, dtype):
    """Zero for no other rotation than none: squares of small ones vanish, of large ones overflow."""
    torch.manual_seed(0)
    turned = side(shape, power, dtype)
    bound = float(turned.packed.double().abs().max())
    angle = float(largest_angle(turned))
    assert 0.3 * bound < angle < 4 * bound


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
@settings(SETTINGS, max_examples=30)
@given(shape=SHAPES, power=POWERS, dtype=DTYPES, seed=st.sampled_from([None, 1]))
def test_quantized_weights(weight_format, shape, power, dtype, seed):
    torch.manual_seed(0)
    W = values(shape, 3, 20, power, dtype)
    quantized = Quantized.empty(3, 20, weight_format, 8, None)
    quantize_(quantized, W, noise=None if seed is None else torch.Generator().manual_seed(seed))
    read = dequantize(quantized)
    assert finite(read)
    top = float(W.abs().max())
    assert float((read - W).abs().max()) <= 1.4 * top + 1e-38  # no level lies further than a two-bit format's


@SETTINGS
@given(SHAPES, POWERS, DTYPES)
def test_rounding_and_extra_bits(shape, power, dtype):
    torch.manual_seed(0)
    W = values(shape, 5, 7, power, dtype).float()
    narrow = stochastic_round_(torch.empty(5, 7, dtype=torch.bfloat16), W, torch.Generator().manual_seed(0))
    assert ((narrow.float() - W).abs() <= W.abs() * 2**-7 + 1e-40).all()
    assert ((join_bits(*split_bits(W)) - W).abs() <= W.abs() * 2**-15 + 1e-40).all()


@SETTINGS
@given(SHAPES, POWERS, st.integers(-38, 30), st.sampled_from([None, "int8", "nf4", "fp8", "bipolar-int3"]), DTYPES)
def test_merging(shape, turn, power, weight_format, dtype):
    torch.manual_seed(0)
    config = PoetConfig(block_size=4, mode="mem", weight_format=weight_format, group_size=8)
    layer = PoetLinear(10, 12, bias=False, config=config, dtype=dtype)
    layer.load_dense_(values(shape, 12, 10, power, dtype))
    with torch.no_grad():
        for skew in layer.rotations:
            skew.copy_(values(shape, *skew.shape, turn, skew.dtype))
    stats = layer.merge_()
    assert finite(stats.angle, stats.norm_ratio, layer.base_norm, layer.frozen_weight.precise(), layer.dense_weight())
