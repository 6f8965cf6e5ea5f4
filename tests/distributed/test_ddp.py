"""DistributedDataParallel sees ordinary parameters, and every rank folds alike without talking."""

import tempfile

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers import relative_error
from poetx import POETX, PoetConfig, UserError, convert_, merge_every, param_groups
from ranks import run_on_two_ranks


def build(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(11, 20), nn.GELU(), nn.Linear(20, 7))
    convert_(model, PoetConfig(method=method, block_size=4, mode="mem", init="normalized"))
    return model


def train(model, batches, method, penalty=0.0):
    target = torch.randn(20, 11, generator=torch.Generator().manual_seed(9))
    first = getattr(model, "module", model)[0]
    if method == "single-step":
        optimizer = POETX(model, angle=0.02)
    else:
        optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, poet_lr=1e-2))
        merge_every(optimizer, model, steps=2)
    for x in batches:
        loss = model(x).square().mean()
        if penalty:  # of every rank the same, so that the mean over them is, too
            loss = loss + penalty * (first.weight - target).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def batches():
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(8, 11, generator=generator) for _ in range(5)]


def rank(index, directory, method, penalty):
    with pytest.raises(UserError, match="convert it first, then wrap it"):
        convert_(DistributedDataParallel(nn.Sequential(nn.Linear(3, 4))))
    torch.manual_seed(index)  # merging must not depend on the global generator
    model = build(method)
    torch.randn(index + 1)
    train(DistributedDataParallel(model), [x[index * 4 : index * 4 + 4] for x in batches()], method, penalty)
    torch.save(model.state_dict(), f"{directory}/{index}.pt")


@pytest.mark.parametrize(("method", "penalty"), [("poet-x", 0.0), ("single-step", 0.0), ("single-step", 0.3)])
def test_two_ranks_stay_identical_and_follow_one_process(method, penalty):
    with tempfile.TemporaryDirectory() as directory:
        run_on_two_ranks(rank, directory, method, penalty)
        first, second = (torch.load(f"{directory}/{index}.pt", weights_only=True) for index in range(2))
    alone = build(method)
    start = build(method).state_dict()
    train(alone, batches(), method, penalty)
    if penalty:
        without = build(method)
        train(without, batches(), method)
        assert relative_error(without[0].weight, alone[0].weight) > 1e-2  # it counts
    if method == "poet-x":
        assert first["0.merge_count"] == 2
    else:
        assert relative_error(first["0.weight"], start["0.weight"]) > 1e-2  # it moved
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        if value.is_floating_point() and value.numel() > 1:
            assert relative_error(first[name], value) < 1e-4, name
        else:
            torch.testing.assert_close(first[name], value)
