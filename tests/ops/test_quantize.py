"""Low-precision storage against a float64 reference that enumerates every level of every group."""

import pytest
import torch

from poetx.config import WEIGHT_FORMATS
from poetx.ops import quantize
from poetx.ops.library import cached_tensors
from poetx.ops.quantize import Quantized, dequantize, pack, quantize_, row_bytes, unpack

#: rows, columns, group size: whole groups, a ragged last one, one group, one column, a group longer than the row
SHAPES = [(5, 64, 16), (3, 37, 8), (4, 10, 10), (7, 1, 4), (2, 9, 128)]


def stored(weight, name, group_size, noise=None):
    quantized = Quantized.empty(*weight.shape, name, group_size, weight.device)
    quantize_(quantized, weight, noise=noise)
    return quantized


def draw(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def levels(quantized):
    """[rows, columns, levels] in float64 from the definition of each format, scales read from the storage."""
    fmt = quantized.format
    column = torch.arange(quantized.columns) // quantized.group_size
    scale = quantized.scale.double()[:, column, None]
    if fmt.name == "fp8":
        unit = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        unit = unit[unit.isfinite()]
    elif fmt.name == "nf4":
        # arXiv 2305.14314, appendix E, to 4 decimals
        half = [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
        unit = torch.tensor([-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, *half]).double()
    elif fmt.kind == "bipolar":
        unit = torch.arange(-(2**fmt.bits) + 1, 2**fmt.bits, 2).double()
        assert (unit % 2 == 1).all()
    else:
        assert quantized.offset is not None
        return quantized.offset.double()[:, column, None] + scale * torch.arange(2**fmt.bits)
    return scale * unit


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_every_weight_goes_to_its_nearest_level(name, shape):
    rows, columns, group_size = shape
    weight = draw(rows, columns)
    quantized = stored(weight, name, group_size)
    got, grid = dequantize(quantized, torch.float64), levels(quantized)
    tolerance = 1e-4 if name == "nf4" else 1e-6
    assert ((got[..., None] - grid).abs().amin(2) < tolerance * weight.abs().max()).all(), "not a level"
    best = (weight.double()[..., None] - grid).abs().amin(2)
    assert ((got - weight).abs() <= best + tolerance * weight.abs().max()).all(), "not the nearest"
    assert (grid.amin(2) <= weight + 1e-6).all(), "clipped below"
    assert (grid.amax(2) >= weight - 1e-6).all(), "clipped above"


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_stochastic_rounding_is_unbiased_and_takes_a_neighbouring_level(name):
    weight = draw(4, 24)
    generator, repeats = torch.Generator().manual_seed(1), 200
    draws = torch.stack([dequantize(stored(weight, name, 8, generator)).double() for _ in range(repeats)])
    grid = levels(stored(weight, name, 8))
    gap = grid.sort(dim=2).values.diff(dim=2).amax(2)
    assert ((draws - weight).abs().amax(0) <= gap * 1.001).all()
    error = (draws.mean(0) - weight) / gap  # a draw's standard deviation is half a gap at most
    assert error.abs().max() < 5 * 0.5 / repeats**0.5
    assert error.mean().abs() < 5 * 0.5 / (repeats * weight.numel()) ** 0.5
    assert (draws.std(0) > 0).any()


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_the_noise_is_the_generator_alone(name):
    weight = draw(6, 20)
    first, second, other = (
        stored(weight, name, 8, torch.Generator().manual_seed(seed)).codes.clone() for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_zeros_constants_and_what_is_not_finite(name):
    weight = torch.zeros(4, 12)
    weight[1] = 0.7
    weight[2, 1] = float("nan")
    weight[3, 9] = float("inf")
    for noise in (None, torch.Generator().manual_seed(0)):
        got = dequantize(stored(weight, name, 4, noise))
        assert got[0].eq(0).all()
        if noise is None:
            torch.testing.assert_close(got[1], weight[1], rtol=2**-6, atol=0)
        assert got[2, :4].isnan().all()
        assert got[2, 4:].eq(0).all()
        assert not got[3, 8:].isfinite().any()


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_take_their_bits_and_come_back(bits):
    for columns in (1, 7, 8, 64, 129):
        codes = torch.randint(0, 2**bits, (3, columns), dtype=torch.uint8)
        packed = pack(codes, bits)
        assert packed.shape == (3, row_bytes(columns, bits))
        assert torch.equal(unpack(packed, columns, bits), codes)
    assert row_bytes(64, bits) == 8 * bits


def test_bits_per_weight_are_what_is_stored():
    for name in WEIGHT_FORMATS:
        quantized = stored(draw(4, 256), name, 128)
        tensors = [quantized.codes, quantized.scale, quantized.offset]
        size = sum(t.numel() * t.element_size() for t in tensors if t is not None)
        scales = 2 if quantized.format.kind == "affine" else 1
        assert 8 * size / 1024 == quantized.format.bits + 16 * scales / 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_reading_in_another_dtype_rounds_the_float32_value_once(dtype):
    quantized = stored(draw(5, 40), "int8", 16)
    assert torch.equal(dequantize(quantized, dtype), dequantize(quantized).to(dtype))


def test_many_slices_equal_one(monkeypatch):
    weight = draw(9, 40)
    whole = {name: stored(weight, name, 16) for name in ("int8", "nf4", "bipolar-int3")}
    values = {name: dequantize(quantized) for name, quantized in whole.items()}
    monkeypatch.setattr(quantize, "_SLICE", 80)
    monkeypatch.setitem(quantize._READ_SLICE, "cpu", 80)
    for name, quantized in whole.items():
        assert torch.equal(stored(weight, name, 16).codes, quantized.codes)
        assert torch.equal(dequantize(quantized), values[name])


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("int8", -1, -1 + 255 / 128),
        ("int4", -1, -1 + 15 / 8),
        ("bipolar-int4", -15 / 16, 15 / 16),
        ("nf4", -1, 1),
        ("fp8", -448 / 512, 448 / 512),
    ],
)
def test_a_tenth_of_a_step_survives_on_average_and_is_lost_to_nearest(name, low, high):
    weight = draw(64, 64).clamp(-3, 3) / 4
    weight[:, 0], weight[:, 1] = low, high  # of an exact scale: storing again finds the same grid
    quantized = stored(weight, name, 64)
    start = dequantize(quantized)
    grid = levels(quantized)
    step = (grid - start[..., None]).where(grid > start[..., None] + 1e-5, 1.0).amin(2).float()
    step[:, :2] = 0
    assert torch.equal(dequantize(stored(start + step / 10, name, 64)), start)
    moved = dequantize(stored(start + step / 10, name, 64, torch.Generator().manual_seed(7))) - start
    assert (moved.sum() / step.sum()).item() == pytest.approx(0.1, abs=0.03)


def test_levels_first_asked_for_under_a_fake_mode_are_real_afterwards():
    from torch._subclasses.fake_tensor import FakeTensorMode

    levels_of = cached_tensors(quantize._sorted_levels.__wrapped__)
    with FakeTensorMode():
        levels_of("nf4")
    levels, codes = levels_of("nf4")
    assert type(levels) is torch.Tensor
    assert levels.isfinite().all()
    assert codes.unique().numel() == codes.numel()


def test_every_code_of_fp8_reads_as_torch_casts_it():
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)  # two are NaN
    quantized = Quantized.empty(2, len(codes), "fp8", len(codes), None)
    quantized.codes.copy_(codes)
    quantized.scale.copy_(torch.tensor([[0.75], [2.0**-120]]))
    want = codes.view(torch.float8_e4m3fn).float() * quantized.scale.float()
    assert torch.equal(dequantize(quantized), want)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_groups_of_subnormal_weights_are_zeros_beside_usual_ones(name, noisy):
    weight = draw(6, 32)
    weight[1] *= 1e-42
    weight[3, :16] *= 3e-39
    weight[4, 5] = 2e-45
    noise = torch.Generator().manual_seed(0) if noisy else None
    got = dequantize(stored(weight, name, 16, noise))
    assert got.isfinite().all()
    assert got[1].abs().max() < 1e-30
    assert got[3, :16].abs().max() < 1e-30
