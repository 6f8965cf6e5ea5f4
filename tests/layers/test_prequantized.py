"""Layers that another library has quantized: converted, or in the report with the reason."""

import sys
import types

import pytest
import torch
from torch import nn

from helpers import relative_error
from poetx import PoetConfig, PoetLinear, UserError, convert_, poet_layers


def model_with(layer):
    return nn.Sequential(nn.Linear(16, 16).bfloat16(), layer, nn.Linear(24, 8).bfloat16())


class Linear8bitLt(nn.Linear):
    """As bitsandbytes leaves it: int8 rows, their scales on the parameter, or on ``state`` after the first forward."""

    def __init__(self, weight, *, used):
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        scales = weight.abs().amax(1)
        codes = (127 * weight / scales[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight.SCB = None if used else scales  # type: ignore[attr-defined]
        self.state = types.SimpleNamespace(SCB=scales if used else None)


Linear8bitLt.__module__ = "bitsandbytes.nn.modules"


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("weight_format", [None, "int8"])
def test_eight_bit_rows_are_converted(used, weight_format):
    weight = torch.randn(24, 16)
    model = model_with(Linear8bitLt(weight, used=used))
    report = convert_(model, PoetConfig(block_size=8, mode="mem", weight_format=weight_format))
    assert isinstance(model[1], PoetLinear)
    assert model[1].weight_dtype == torch.bfloat16
    assert relative_error(model[1].dense_weight(), weight) < 0.02
    assert "24x16  b=8  x1  (was Linear8bitLt)" in str(report)


def test_four_bits_go_through_the_library_s_own_function(monkeypatch):
    weight = torch.randn(24, 16).bfloat16()

    class Linear4bit(nn.Linear):
        pass

    Linear4bit.__module__ = "bitsandbytes.nn.modules"
    layer = Linear4bit(16, 24, bias=False)
    layer.weight = nn.Parameter(torch.zeros(192, 1, dtype=torch.uint8), requires_grad=False)
    layer.weight.quant_state = "state"
    functional = types.SimpleNamespace(dequantize_4bit=lambda data, state: weight if state == "state" else None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(functional=functional))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functional)
    model = model_with(layer)
    convert_(model, PoetConfig(block_size=8))
    assert relative_error(model[1].dense_weight(), weight) == 0

    layer.weight.quant_state = None
    model = model_with(layer)
    report = convert_(model, PoetConfig(block_size=8))
    assert model[1] is layer
    assert [name for name, _ in poet_layers(model)] == ["0", "2"]
    assert "1.weight" in {item.name: item.reason for item in report.skipped}
    assert "without its quant_state; move the model to its device first" in str(report)


def test_nothing_else_to_convert_is_an_error_with_the_reason():
    layer = Linear8bitLt(torch.randn(24, 16), used=True)
    layer.state.SCB = None
    with pytest.raises(UserError, match="no layer could be converted: 0: an 8-bit layer.*without its scales"):
        convert_(nn.Sequential(layer), PoetConfig(block_size=8))


def test_formats_that_are_not_read_are_named():
    class QuantLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(4, 8, dtype=torch.int32))

    QuantLinear.__module__ = "gptqmodel.nn_modules"
    report = convert_(nn.Sequential(nn.Linear(8, 8), QuantLinear()), PoetConfig(block_size=4))
    (item,) = report.skipped
    assert (item.name, item.shape) == ("1.qweight", (4, 8))
    assert "quantized by gptqmodel in a format that is not read" in item.reason


def test_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 32)).bfloat16()
    weights = [layer.weight.detach().clone() for layer in model]
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    report = convert_(model, PoetConfig(block_size=16, mode="mem", weight_format="int8"))
    for layer, weight in zip(model, weights, strict=True):
        assert relative_error(layer.dense_weight(), weight) < 0.02
    assert "(was Int8Tensor)" in str(report)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    source = nn.Linear(64, 128).bfloat16()
    if bits == 4:
        layer = bnb.nn.Linear4bit(64, 128, quant_type="nf4", compute_dtype=torch.bfloat16)
    else:
        layer = bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=False)
    layer.load_state_dict(source.state_dict())
    layer = layer.to("cpu")
    model = nn.Sequential(source, layer)
    convert_(model, PoetConfig(block_size=16, mode="mem", weight_format="int8"))
    assert relative_error(model[1].dense_weight(), source_weight := model[0].dense_weight()) < 0.12, source_weight
