"""Frozen weights in host memory: the same numbers to the bit, and only these weights move, one way."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import accelerator
from accelerator import DEVICE, crossings
from accelerator_steps import llama
from poetx import POETX, PoetConfig, UserError, convert_, merge_, merge_every, param_groups, to_dense_
from poetx.layers.walk import converted_layers, poet_layers
from poetx.savings import checkpoint_layers_, offload_activations_, offload_frozen_

FORMS = {
    "fast": ({"mode": "fast"}, torch.float32),
    "mem": ({"mode": "mem"}, torch.float32),
    "mem, bfloat16": ({"mode": "mem"}, torch.bfloat16),
    "mem, bfloat16 with extra bits": ({"mode": "mem", "weight_extra_bits": True}, torch.bfloat16),
    "int8": ({"mode": "mem", "weight_format": "int8", "group_size": 16}, torch.float32),
    "nf4 with its residual": (
        {"mode": "mem", "weight_format": "nf4", "group_size": 16, "weight_extra_bits": True},
        torch.float32,
    ),
    "single-step, free": ({"method": "single-step", "update": "free"}, torch.bfloat16),
    "single-step, rotations": (
        {"method": "single-step", "update": "rotation", "rotation_dtype": "bfloat16", "mode": "mem"},
        torch.float32,
    ),
}


@pytest.fixture
def device():
    with accelerator.accelerator() as device:
        yield device


def trained(name: str, prepare: Callable[[nn.Module], object], *, checkpointed: bool = False, steps: int = 2):
    """Losses, model and optimizer after steps of two micro-batches, each with a merge or a fold."""
    settings, dtype = FORMS[name]
    built = llama("cpu", dtype)
    convert_(built, PoetConfig(block_size=16, init="keep", **settings))
    prepare(built)
    if checkpointed:
        checkpoint_layers_(built)
    if settings.get("method") == "single-step":
        optimizer = POETX(built, lr=1e-3)
    else:
        optimizer = torch.optim.AdamW(param_groups(built, lr=1e-3, poet_lr=1e-2))
        merge_every(optimizer, built, steps=1)
    losses = []
    for number in range(steps):
        for part in range(2):
            ids = ((torch.arange(34).view(2, 17) * (7 + number) + part) % 96).to(DEVICE)
            loss = built(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses, built, optimizer


def resident(model: nn.Module) -> None:
    model.to(DEVICE)


def streamed(model: nn.Module) -> None:
    offload_frozen_(model, DEVICE)


def assert_same(first: nn.Module, second: nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value.cpu(), theirs[key].cpu()), key


CHECKPOINTED = ("fast", "int8", "single-step, free", "single-step, rotations")


@pytest.mark.parametrize(
    ("name", "checkpointed"), [*((name, False) for name in FORMS), *((name, True) for name in CHECKPOINTED)]
)
def test_losses_and_merged_weights_are_those_of_a_model_on_the_device(
    name: str, checkpointed: bool, device: torch.device
) -> None:
    there, model, first = trained(name, resident, checkpointed=checkpointed)
    losses, moved, second = trained(name, streamed, checkpointed=checkpointed)
    assert losses == there
    assert_same(moved, model)
    for ours, theirs in zip(tree_leaves(second.state_dict()), tree_leaves(first.state_dict()), strict=True):
        assert torch.equal(ours.cpu(), theirs.cpu()) if isinstance(ours, torch.Tensor) else ours == theirs
    hosted = [tensor for _, layer in converted_layers(moved) for tensor in layer.host_tensors()]
    assert {tensor.device.type for tensor in hosted} == {"cpu"}
    others = {id(tensor) for tensor in hosted}
    rest = [t for t in (*moved.parameters(), *moved.buffers()) if id(t) not in others]
    assert {t.device.type for t in rest} == {accelerator.NAME}


@pytest.mark.parametrize(("checkpointed", "times"), [(False, 2), (True, 3)])
@pytest.mark.parametrize("name", ["mem", "single-step, rotations"])
def test_a_micro_batch_brings_each_weight_twice_and_takes_nothing_back(
    name: str, checkpointed: bool, times: int, device: torch.device
) -> None:
    _, model, optimizer = trained(name, streamed, checkpointed=checkpointed, steps=2)
    layers = [layer for _, layer in converted_layers(model)]
    queue = layers[0].host
    assert queue is not None
    before = queue.loads, queue.moved, queue.missed
    ids = torch.zeros(2, 9, dtype=torch.long, device=device)
    with crossings() as seen:
        model(input_ids=ids, labels=ids).loss.backward()
    assert (times - 1) * len(layers) < queue.loads - before[0] <= times * len(layers)  # one is used twice in a row
    assert queue.moved - before[1] <= times * sum(4 * layer.in_features * layer.out_features for layer in layers)
    assert queue.missed - before[2] == 1  # the first of the pass
    assert seen == ["_local_scalar_dense"]  # beside what the queue counts, which the operators do inside
    before = queue.loads, queue.writes
    with crossings() as seen:
        optimizer.step()
    stepped = len(layers) if name.startswith("single-step") else 0
    assert queue.writes - before[1] == stepped
    assert queue.returned == 3 * bool(stepped) * sum(4 * layer.in_features * layer.out_features for layer in layers)
    if stepped:
        assert queue.loads - before[0] == stepped
        assert Counter(crossing.partition(" at ")[0] for crossing in seen) == {
            "copy_": stepped,
            "_foreach_copy_": stepped,
        }


def test_inputs_of_layers_in_host_memory_too_change_no_number_and_wait_for_nothing(device: torch.device) -> None:
    def both(model: nn.Module) -> None:
        streamed(model)
        offload_activations_(model, few=1)

    there, model, _ = trained("single-step, free", streamed, checkpointed=True)
    losses, moved, _ = trained("single-step, free", both, checkpointed=True)
    assert losses == there
    assert_same(moved, model)
    ids = torch.zeros(2, 9, dtype=torch.long, device=device)
    with crossings() as seen:
        moved(input_ids=ids, labels=ids).loss.backward()
    there_and_back = Counter(crossing.partition(" at ")[0] for crossing in seen)
    assert there_and_back["_foreach_copy_"] == there_and_back["copy_"] > 0
    assert there_and_back.keys() == {"_foreach_copy_", "copy_", "_local_scalar_dense"}


def test_the_weights_stay_where_they_are_whatever_moves_the_model(device: torch.device) -> None:
    _, model, _ = trained("mem", streamed, steps=1)
    layer = next(layer for _, layer in poet_layers(model))
    address = layer.base_weight.data_ptr()
    model.to(device)
    assert layer.base_weight.data_ptr() == address
    with pytest.raises(UserError, match="in host memory; change dtypes before"):
        model.bfloat16()
    assert layer.base_weight.dtype == torch.float32
    offload_frozen_(model, device, prefetch=3)  # again: only the setting changes
    assert layer.base_weight.data_ptr() == address


def test_a_copy_has_weights_of_its_own(device: torch.device) -> None:
    _, model, _ = trained("mem", streamed, steps=1)
    layer = next(layer for _, layer in poet_layers(model))
    other = copy.deepcopy(layer)
    x = torch.ones(3, layer.in_features, device=device)
    assert torch.equal(layer(x).cpu(), other(x).cpu())
    with torch.no_grad():
        other.base_weight.mul_(2)
    assert not torch.equal(layer(x).cpu(), other(x).cpu())
    assert other.host is not layer.host


def test_states_load_and_dense_layers_come_back(device: torch.device) -> None:
    _, model, _ = trained("int8", streamed)
    _, other, _ = trained("int8", streamed, steps=1)
    other.load_state_dict({key: value.cpu() for key, value in model.state_dict().items()})
    ids = torch.zeros(2, 9, dtype=torch.long, device=device)
    expected = model(input_ids=ids).logits.cpu()
    assert torch.equal(other(input_ids=ids).logits.cpu(), expected)
    merge_(other)
    to_dense_(other)
    assert {layer.weight.device.type for layer in other.modules() if isinstance(layer, nn.Linear)} <= {"cpu", "accel"}
    other.to(device)
    torch.testing.assert_close(other(input_ids=ids).logits.cpu(), expected, rtol=0.05, atol=0.05)


def test_what_cannot_be_offloaded_is_refused(device: torch.device) -> None:
    single = llama("cpu")
    convert_(single, PoetConfig(method="single-step", block_size=16))
    optimizer = POETX(single)
    with pytest.raises(UserError, match=r"before poetx\.POETX"):
        offload_frozen_(single, device)
    optimizer.close()
    offload_frozen_(single, device)
    with pytest.raises(UserError, match="no converted layer"):
        offload_frozen_(llama("cpu"), device)
    model = llama("cpu")
    convert_(model, PoetConfig(block_size=16))
    with pytest.raises(UserError, match="device is the CPU"):
        offload_frozen_(model)
    with pytest.raises(UserError, match="prefetch=-1"):
        offload_frozen_(model, device, prefetch=-1)
