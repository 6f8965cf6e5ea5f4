"""Backward of single-step layers through the interpreted Triton kernels."""

import contextlib

import pytest
import torch
from torch import nn

from helpers import relative_error
from poetx import POETX, PoetConfig, convert_
from poetx.ops.single_step import single_step_linear

pytest.importorskip("triton", reason="the kernels need triton, which exists for Linux only")
from kernel_helpers import interpreted


@pytest.mark.parametrize("bias", [True, False])
def test_the_triton_outer_product_feeds_the_same(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40, bias=bias))
    convert_(model, PoetConfig(method="single-step", block_size=16))
    layer, _ = model[0], POETX(model)
    x, g = torch.randn(33, 24), torch.randn(33, 40)
    sums = []
    for context in (contextlib.nullcontext, interpreted):
        layer.momentum.momentum_in.zero_()
        layer.momentum.momentum_out.zero_()
        with context():
            y = single_step_linear(
                x,
                layer.frozen_weight.stored,
                layer.bias,
                layer.momentum,
                block_sizes=(16, 16),
                route="tokens",
                keep_y=True,
            )
            y.backward(g)
        sums.append((layer.momentum.momentum_in.clone(), layer.momentum.momentum_out.clone()))
    for got, want in zip(sums[1], sums[0], strict=True):
        assert want.any()
        assert relative_error(got, want) < 1e-5
