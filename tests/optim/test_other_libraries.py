"""Optimizers of other libraries on our parameter groups, where they are installed."""

import copy

import pytest
import torch
from torch import nn

import poetx
from builders import descend


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_torchao_merges_saves_and_continues(name):
    optim = pytest.importorskip("torchao.optim")

    def build(model):
        optimizer = getattr(optim, name)(poetx.param_groups(model, lr=1e-3, poet_lr=1e-3))
        return optimizer, poetx.merge_every(optimizer, model, steps=4)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128, bias=False))
    poetx.convert_(model, poetx.PoetConfig(block_size=128))
    (rotation, _), (optimizer, handle) = model[0].rotations, build(model)
    x = torch.randn(8, 128)

    def step(model, optimizer):
        descend(model(x).square().sum(), optimizer)

    step(model, optimizer)
    step(model, optimizer)
    assert rotation.numel() >= 4096
    twin = copy.deepcopy(model)
    other, _ = build(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer)
    step(twin, other)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    step(model, optimizer)
    assert handle.merges == 1
    assert rotation not in optimizer.state


@pytest.mark.parametrize("name", ["AdaBelief", "Lion", "RAdam", "Prodigy", "ScheduleFreeAdamW"])
@pytest.mark.parametrize("direct", [False, True])
def test_pytorch_optimizer_counts_in_the_group_and_starts_anew_at_a_merge(name, direct):
    if direct and name == "Prodigy":
        pytest.skip("the step size that it finds starts anew with merge_every alone")
    optim = pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    poetx.convert_(model, poetx.PoetConfig(block_size=16))
    optimizer = getattr(optim, name)(poetx.param_groups(model, lr=1e-3, poet_lr=1e-3))
    handle = None if direct else poetx.merge_every(optimizer, model, steps=5)
    counts = {key: optimizer.param_groups[0].get(key) for key in ("step", "k", "weight_sum", "lr_max")}
    x = torch.randn(8, 16)

    def size():
        descend(model(x).square().sum(), optimizer)
        return sum(float(p.detach().norm()) for p in model[0].rotations)

    first = size()
    for _ in range(4):
        size()
    if handle is None:
        poetx.merge_(model, optimizer)
    else:
        assert handle.merges == 1
    assert {key: optimizer.param_groups[0].get(key) for key in counts} == counts
    assert size() == pytest.approx(first, rel=0.3)
