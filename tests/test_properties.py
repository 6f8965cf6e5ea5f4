"""Properties over random shapes, block sizes, dtypes, biases, merge times and seeds."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from builders import descend
from helpers import TOLERANCE, relative_error
from poetx import PoetConfig, convert_, merge_, merge_every, param_groups, poet_layers, to_dense_

#: Derandomized: CI must not fail on a case that nobody can replay.
SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)

#: At least 2: a layer of one element stays dense.
SIZES = st.integers(2, 33)


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    config = PoetConfig(
        block_size=draw(st.integers(2, 20)),
        mode=draw(st.sampled_from(["fast", "mem"])),
        neumann_order=draw(st.sampled_from([3, 7, "exact"])),
        weight_extra_bits=draw(st.booleans()),
        seed=draw(st.integers(0, 5)),
    )
    sizes = [draw(SIZES) for _ in range(3)]
    bias = draw(st.booleans())
    return dtype, config, sizes, bias


def build(dtype, config, sizes, bias, *, angle=0.2):
    torch.manual_seed(1)
    first, hidden, last = sizes
    model = nn.Sequential(nn.Linear(first, hidden, bias), nn.Tanh(), nn.Linear(hidden, last, bias)).to(dtype)
    convert_(model, config)
    turn(model, angle)
    return model, torch.randn(4, first).to(dtype)


def turn(model, angle):
    with torch.no_grad():
        for _, layer in poet_layers(model):
            for skew, block in zip(layer.rotations, (layer.block_size_in, layer.block_size_out), strict=True):
                skew.normal_(std=angle / (2 * block**0.5))


def limit(dtype):
    return 4 * TOLERANCE[dtype]


@SETTINGS
@given(cases())
def test_forward_equals_the_dense_weights_forward(case):
    dtype = case[0]
    model, x = build(*case)
    for _, layer in poet_layers(model):
        y = torch.randn(3, layer.in_features).to(dtype)
        bias = None if layer.bias is None else layer.bias.double()
        want = nn.functional.linear(y.double(), layer.dense_weight().double(), bias)
        assert relative_error(layer(y), want) < limit(dtype)
    want = model(x)
    assert relative_error(to_dense_(model)(x), want) < limit(dtype)


@SETTINGS
@given(cases())
def test_merging_keeps_the_function_and_the_singular_values(case):
    dtype, config, *_ = case
    model, x = build(*case)
    before = model(x)
    spectra = [torch.linalg.svdvals(layer.frozen_weight.precise().detach().double()) for _, layer in poet_layers(model)]
    merge_(model)
    # Order 3 trains with factors that are θ⁴ = 0.2⁴ off; merging is exact.
    slack = {3: 0.2**4 * 4, 7: 0.2**8 * 4, "exact": 0.0}[config.neumann_order]
    assert relative_error(model(x), before) < limit(dtype) + slack
    for (_, layer), values in zip(poet_layers(model), spectra, strict=True):
        now = torch.linalg.svdvals(layer.frozen_weight.precise().detach().double())
        assert (now - values).norm() / values.norm() < limit(dtype)


@settings(SETTINGS, max_examples=25)
@given(cases(), st.integers(1, 4), st.integers(0, 5))
def test_save_load_continue_equals_continue(case, every, stop):
    def start():
        model, x = build(*case)
        optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, poet_lr=1e-2))
        merge_every(optimizer, model, steps=every)
        return model, x, optimizer

    def steps(model, x, optimizer, count):
        losses = []
        for _ in range(count):
            loss = model(x).float().square().mean()
            descend(loss, optimizer)
            losses.append(loss.item())
        return losses

    model, x, optimizer = start()
    want = steps(model, x, optimizer, 6)
    model, x, optimizer = start()
    got = steps(model, x, optimizer, stop)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model, x, optimizer = start()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert got + steps(model, x, optimizer, 6 - stop) == want
