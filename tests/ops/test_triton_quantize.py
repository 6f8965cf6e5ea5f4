"""The kernels of stored weights against their plain-torch twins: interpreted, compiled for Hopper, on a GPU."""

from __future__ import annotations

import pytest
import torch

from helpers import relative_error
from poetx import UserError
from poetx.ops.dispatch import use_kernels
from poetx.ops.quantize import FUSED_TOKENS, Packed, dequantize, fused, product, quantize_

pytest.importorskip("triton", reason="the kernels need triton, which exists for Linux only")
from kernel_helpers import compiled_for, interpreted, nan_filled

from poetx.ops.triton import quantize as kernels

FORMATS = ["int8", "int4", "nf4", "fp8", "bipolar-int2", "bipolar-int4", "bipolar-int8"]
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 8e-3}  # the interpreter truncates to bfloat16


def stored(name, rows, columns, group_size):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    packed = Packed.empty(rows, columns, name, group_size, None)
    quantize_(packed, weight)
    return packed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(3, 64, 16), (2, 37, 8), (2, 1100, 128)])
@pytest.mark.parametrize("name", FORMATS)
def test_interpreted_equals_the_twin(name, rows, columns, group_size, dtype):
    packed = stored(name, rows, columns, group_size)
    want = dequantize(packed, dtype)
    with interpreted(), nan_filled():
        got = dequantize(packed, dtype)
    assert got.dtype == dtype
    assert relative_error(got, want) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "group_size"), [(1, 3, 64, 16), (5, 40, 37, 8), (70, 33, 150, 64), (2, 5, 1, 128)]
)
@pytest.mark.parametrize("name", FORMATS)
def test_the_interpreted_product_equals_the_twin(name, tokens, rows, columns, group_size, dtype):
    packed = stored(name, rows, columns, group_size)
    x = torch.randn(columns, tokens, generator=torch.Generator().manual_seed(1)).to(dtype).T  # strided
    want = x.double() @ dequantize(packed, dtype).double().T
    with interpreted(), nan_filled():
        got = product(x, packed, most=tokens)  # 70: two tiles of tokens
    assert got.dtype == dtype
    assert got.shape == (tokens, rows)
    assert relative_error(got.double(), want) < 2 * DTYPES[dtype]


def test_only_few_tokens_are_fused():
    packed = stored("int4", 4, 64, 16)
    x = torch.randn(FUSED_TOKENS + 1, 64)
    assert not fused(x[:1], packed.format)  # no GPU, and nobody forced the kernel
    assert torch.equal(product(x, packed), x @ dequantize(packed).T)
    with interpreted():
        assert fused(x[1:], packed.format)
        assert not fused(x, packed.format)
        assert not fused(x[:0], packed.format)


def test_bench_ops_compares_it_where_the_kernel_runs(monkeypatch):
    from poetx.bench import ops as bench

    monkeypatch.setattr(bench, "FEW_TOKENS", (1, 40))
    sizes = {"tokens": (), "features": 32, "blocks": (), "block_sizes": ()}
    arguments = {"device": torch.device("cpu"), "dtype": torch.float32, "repeats": 1}
    with interpreted():
        rows = list(bench.bench_ops(**arguments, **sizes))
    assert [(row["weight_format"], row["tokens"]) for row in rows[:3]] == [("int8", 1), ("int8", 40), ("int4", 1)]
    assert len(rows) == 6
    assert list(bench.bench_ops(**arguments, **sizes)) == []


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_a_layer_over_few_tokens_computes_the_same(name):
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int8", "nf4", "bipolar-int4"])
def test_the_product_compiles_for_hopper(name, dtype):
    packed, x = stored(name, 40, 256, 64), torch.zeros(5, 256, dtype=dtype)
    levels = torch.zeros(2**packed.format.bits) if packed.format.kind == "table" else None
    fmt = packed.format
    settings = {"group_size": 64, "bits": fmt.bits, "top": fmt.top, "kind": fmt.kind}
    with compiled_for(90) as compiled:
        kernels.product(x, packed.codes, packed.scale, packed.offset, levels, **settings)
    (kernel,) = compiled
    assert "mma" in kernel.asm["ptx"]


@pytest.mark.parametrize("name", ["int8", "nf4", "bipolar-int4"])
def test_compiles_for_hopper(name):
    packed, out = stored(name, 4, 64, 16), torch.empty(4, 64, dtype=torch.bfloat16)
    levels = torch.zeros(2**packed.format.bits) if packed.format.kind == "table" else None
    with compiled_for(90) as compiled:
        kernels.dequantize(
            packed.codes,
            packed.scale,
            packed.offset,
            levels,
            out,
            group_size=16,
            bits=packed.format.bits,
            top=packed.format.top,
            kind=packed.format.kind,
        )
    (kernel,) = compiled
    assert "st.global" in kernel.asm["ptx"]


def test_what_the_kernel_does_not_take_is_said():
    packed = stored("bipolar-int3", 4, 64, 16)
    with interpreted(), pytest.raises(UserError, match="bipolar-int3; the kernel takes codes of 2, 4 and 8 bits"):
        dequantize(packed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_on_a_gpu(name, dtype):
    packed = stored(name, 64, 1100, 128)
    want = dequantize(packed, dtype)
    x = torch.randn(17, 1100).to(dtype)
    on_gpu = Packed.empty(64, 1100, name, 128, "cuda")
    for field in ("codes", "scale", "offset"):
        if getattr(packed, field) is not None:
            getattr(on_gpu, field).copy_(getattr(packed, field))
    with use_kernels("triton"):
        got, y = dequantize(on_gpu, dtype), product(x.cuda(), on_gpu)
    assert relative_error(got.cpu(), want) < DTYPES[dtype]
    assert relative_error(y.cpu().double(), x.double() @ want.double().T) < 2 * DTYPES[dtype]
