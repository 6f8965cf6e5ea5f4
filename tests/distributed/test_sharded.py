"""Sharded parameters are refused when the optimizer is built, not at the first merge."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import poetx
from poetx import POETX, UserError
from poetx.distributed.rows import whole_on_first
from poetx.optim import SMMF, AdamW, HFac, build_optimizer
from poetx.recipe import load_recipe
from poetx.train.sharding import _UNFIT, check_shardable


@pytest.fixture
def sharded():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    poetx.convert_(model, poetx.PoetConfig(block_size=4))
    optimizer = torch.optim.AdamW(poetx.param_groups(model, lr=1e-3, poet_lr=1e-3))
    mesh = init_device_mesh("cpu", (1,))
    bias = nn.Parameter(distribute_tensor(model[1].bias.detach(), mesh, [Replicate()]))
    model[1].bias = bias
    optimizer.param_groups[-1]["params"][-1] = bias
    model[1].weight_of_another = nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh, [Replicate()]))
    yield model, optimizer
    dist.destroy_process_group()


def test_who_would_fail_later_refuses(sharded):
    model, optimizer = sharded
    for who, attempt in {
        "param_groups": lambda: poetx.param_groups(model, lr=1e-3, poet_lr=1e-3),
        "merge_every": lambda: poetx.merge_every(optimizer, model, steps=2),
        "build_optimizer": lambda: build_optimizer([{"params": [model[1].bias]}]),
        "AdamW": lambda: AdamW([model[1].bias]),
        "SMMF": lambda: SMMF([model[1].bias]),
        "HFac": lambda: HFac([model[1].bias]),
        "POETX": lambda: POETX([("weight", model[1].weight_of_another)]),
        "POETX: ": lambda: POETX([{"params": [model[1].weight_of_another], "rotate": True}]),
    }.items():
        with pytest.raises(UserError, match=rf"{who.strip(': ')}: a parameter of shape \(8, ?8?\) is a DTensor"):
            attempt()


def test_a_sharded_tensor_without_elements_is_gathered(sharded):
    mesh = init_device_mesh("cpu", (1,))
    tensors = [distribute_tensor(torch.ones(shape), mesh, [Shard(0)]) for shape in [(4, 0), (0, 3), (4, 3)]]
    assert [tuple(tensor.shape) for tensor in whole_on_first(tensors)] == [(4, 0), (0, 3), (4, 3)]


@pytest.mark.parametrize("settings", [["method=muon"], ["optimizer.name=smmf"], ["method=sinkgd"]])
def test_optimizers_that_take_no_shards_are_refused_by_the_recipe(settings):
    with pytest.raises(UserError, match=r"optimizer\.name=\w+: not with parallel=fsdp; use adamw, or parallel=ddp"):
        check_shardable(load_recipe("demo", ["parallel=fsdp", "train.sample_tokens=0", *settings]))


def test_keys_that_a_built_in_recipe_sets_are_refused_with_what_switches_them_off():
    with pytest.raises(
        UserError, match=r"train\.sample_tokens=48: not with parallel=fsdp; give train\.sample_tokens=0"
    ):
        check_shardable(load_recipe("demo", ["parallel=fsdp"]))
    off = [f"{key}={value}" for key, value in _UNFIT.items()]
    check_shardable(load_recipe("demo", ["parallel=fsdp", *off]))
