"""Rotations built once for several passes: same bits, fewer blocks built, and no stale ones."""

import copy
import pickle

import pytest
import torch
from torch import nn

import poetx
from poetx.layers import shared_blocks as reuse
from poetx.ops import linear


def model(**settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 6, bias=False))
    poetx.convert_(net, poetx.PoetConfig(block_size=8, exclude_modules=(), **settings))
    with torch.no_grad():
        for _, layer in poetx.poet_layers(net):
            for skew in layer.rotations:
                skew.normal_(std=0.1)
    return net


def accumulate(net, batches):
    for x in batches:
        net(x).square().sum().backward()
    return [p.grad for p in net.parameters() if p.requires_grad]


@pytest.mark.parametrize("order", [3, 7, "exact"])
def test_same_gradients_from_blocks_built_once(order, monkeypatch):
    net, batches = model(neumann_order=order), torch.randn(3, 5, 12)
    want = accumulate(copy.deepcopy(net), batches)
    built = []

    def count(*args):
        built.append(args)
        return build(*args)

    build = reuse.side_blocks
    for module in (reuse, linear):
        monkeypatch.setattr(module, "side_blocks", count)
    with poetx.shared_blocks(net):
        got = accumulate(net, batches)
    assert len(built) == 2  # one for each layer, not for each pass
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    net.zero_grad()
    accumulate(net, batches)
    assert len(built) == 2 + 2 * 3


def test_mem_layers_and_inputs_of_another_dtype_are_left_alone():
    net, batches = model(mode="mem"), torch.randn(2, 5, 12)
    with poetx.shared_blocks(net):
        assert all(layer.shared_blocks is None for _, layer in poetx.poet_layers(net))
        accumulate(net, batches)
    net = model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = net(batches[0])
        with poetx.shared_blocks(net):
            assert torch.equal(net(batches[0]), want)
        with poetx.shared_blocks(net, dtype=torch.bfloat16):
            assert torch.equal(net(batches[0]), want)


def test_a_step_inside_is_an_error():
    net = model()
    optimizer = torch.optim.SGD(poetx.param_groups(net, lr=0.1, poet_lr=0.1))
    accumulate(net, torch.randn(1, 5, 12))
    with pytest.raises(RuntimeError, match="changed inside shared_blocks"), poetx.shared_blocks(net):
        optimizer.step()
    assert all(layer.shared_blocks is None for _, layer in poetx.poet_layers(net))


@pytest.mark.parametrize("write", [lambda p: p.data.neg_(), lambda p: p.data[0].copy_(p.data[1]), lambda p: p.zero_()])
def test_a_write_that_counts_no_version_is_an_error_too(write):
    net = model()
    with pytest.raises(RuntimeError, match="^2: its rotations changed"), poetx.shared_blocks(net), torch.no_grad():
        write(net[2].skew_in)


def test_blocks_are_dropped_when_a_pass_fails_and_are_no_state():
    net = model()
    keys = list(net.state_dict())
    with poetx.shared_blocks(net):
        assert list(net.state_dict()) == keys
    with pytest.raises(RuntimeError, match="the last size must be 12"), poetx.shared_blocks(net):
        net(torch.randn(5, 13))
    assert all(layer.shared_blocks is None for _, layer in poetx.poet_layers(net))


def test_a_copy_made_inside_has_no_blocks():
    net, x = model(), torch.randn(5, 12)
    with poetx.shared_blocks(net):
        copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    for twin in copies:
        with torch.no_grad():
            for _, layer in poetx.poet_layers(twin):
                assert layer.shared_blocks is None
                for skew in layer.rotations:
                    skew.zero_()
            want = nn.functional.linear(x, twin[0].dense_weight(), twin[0].bias).relu() @ twin[2].dense_weight().T
            torch.testing.assert_close(twin(x), want)
