"""The kernels of stored weights against their plain-torch twins: interpreted, compiled for Hopper, on a GPU."""

from __future__ import annotations

import pytest
import torch

from helpers import relative_error
from poetx import UserError
from poetx.ops.dispatch import use_kernels
from poetx.ops.quantize import Quantized, dequantize, quantize_

pytest.importorskip("triton", reason="the kernels need triton, which exists for Linux only")
from kernel_helpers import compiled_for, interpreted, nan_filled, on_each_generation
from poetx.ops.triton import quantize as kernels

FORMATS = ["int8", "int4", "nf4", "fp8", "bipolar-int2", "bipolar-int4", "bipolar-int8"]
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 8e-3}  # the interpreter truncates to bfloat16


def stored(name, rows, columns, group_size):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    quantized = Quantized.empty(rows, columns, name, group_size, None)
    quantize_(quantized, weight)
    return quantized


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(3, 64, 16), (2, 37, 8), (2, 1100, 128)])
@pytest.mark.parametrize("name", FORMATS)
def test_interpreted_equals_the_twin(name, rows, columns, group_size, dtype):
    quantized = stored(name, rows, columns, group_size)
    want = dequantize(quantized, dtype)
    with interpreted(), nan_filled():
        got = dequantize(quantized, dtype)
    assert got.dtype == dtype
    assert relative_error(got, want) < DTYPES[dtype]


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_a_layer_computes_the_same(name):
    from poetx import PoetConfig, PoetLinear

    config = PoetConfig(block_size=16, mode="mem", init="normalized", weight_format=name, group_size=16)
    layer = PoetLinear(40, 24, config=config, name="layer")
    with torch.no_grad():
        for parameter in (*layer.rotations, layer.bias):
            parameter.normal_(std=0.05)
    x = torch.randn(2, 3, 40, requires_grad=True)
    leaves = [x, *layer.rotations, layer.bias]
    results = []
    for kernels_run in (False, True):
        with interpreted() if kernels_run else use_kernels("torch"):
            y = layer(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-5


@on_each_generation
@pytest.mark.parametrize("name", ["int8", "nf4", "bipolar-int4"])
def test_it_compiles(name, capability):
    quantized, out = stored(name, 4, 64, 16), torch.empty(4, 64, dtype=torch.bfloat16)
    levels = torch.zeros(2**quantized.format.bits) if quantized.format.kind == "table" else None
    with compiled_for(capability) as compiled:
        kernels.dequantize(
            quantized.codes,
            quantized.scale,
            quantized.offset,
            levels,
            out,
            group_size=16,
            bits=quantized.format.bits,
            top=quantized.format.top,
            kind=quantized.format.kind,
        )
    (kernel,) = compiled
    assert "st.global" in kernel.asm["ptx"]


def test_what_the_kernel_does_not_take_is_said():
    quantized = stored("bipolar-int3", 4, 64, 16)
    with interpreted(), pytest.raises(UserError, match="bipolar-int3; the kernel takes codes of 2, 4 and 8 bits"):
        dequantize(quantized)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_on_a_gpu(name, dtype):
    quantized = stored(name, 64, 1100, 128)
    want = dequantize(quantized, dtype)
    on_gpu = Quantized.empty(64, 1100, name, 128, "cuda")
    for field in ("codes", "scale", "offset"):
        if getattr(quantized, field) is not None:
            getattr(on_gpu, field).copy_(getattr(quantized, field))
    with use_kernels("triton"):
        got = dequantize(on_gpu, dtype)
    assert relative_error(got.cpu(), want) < DTYPES[dtype]
