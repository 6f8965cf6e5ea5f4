"""Copies of weights ahead of their use: never a stale one, whatever order, whatever delay."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from benchmarks.stream_stress import FORMS, in_host_memory, layers, stress
from torch import nn

from poetx import PoetConfig, UserError, convert_
from poetx.layers.walk import poet_layers
from poetx.ops import host
from poetx.ops.host import HostQueue
from poetx.planner.estimate import estimate_memory
from poetx.recipe import load_recipe
from poetx.savings import offload_frozen_


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that counts as one on a disk, wherever the machine has its temporary files."""
    monkeypatch.setattr(host, "_kind_of_disk", lambda directory: "ext4")
    return tmp_path


@pytest.mark.parametrize(
    ("form", "in_files"), [*((form, False) for form in FORMS), ("bfloat16 with extra bits", True), ("int8", True)]
)
def test_any_order_with_any_delay_and_any_interruption_gives_the_same_numbers(
    form: str, in_files: bool, disk: Path
) -> None:
    prefetch, keep = {"dense": (2, 3), "int8": (0, 0)}.get(form, (1, 0))
    found = stress(form, 25, prefetch=prefetch, keep=keep, directory=disk if in_files else None)
    assert found["stopped"]
    assert bool(found["writes"]) == bool(found["interrupted_steps"]) == form.startswith("single-step")


def test_a_repeating_order_is_learnt_and_nothing_is_fetched_for_the_next_pass() -> None:
    model, queue = layers(5), HostQueue(2)
    in_host_memory(model, queue)
    x = torch.ones(1, 8)

    def once() -> tuple[int, int]:
        before = queue.loads, queue.missed
        y = x
        for layer in model:
            y = layer(y)
        y.sum().backward()
        return queue.loads - before[0], queue.missed - before[1]

    assert once() == (10, 10)
    once()
    for _ in range(40):  # long enough for the memory of the order to be cut
        assert once() == (10, 1)
    assert queue._ahead == []


@pytest.mark.parametrize("settings", [{}, {"weight_format": "nf4", "group_size": 8}], ids=["dense", "nf4"])
def test_a_rotation_of_the_input_alone_takes_its_weight_from_there_too(settings: dict) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    convert_(model, PoetConfig(method="oft", block_size=4, target_modules=("0", "1"), **settings))
    moved = copy.deepcopy(model)
    in_host_memory(moved, queue := HostQueue(1))
    for each in (model, moved):
        each(torch.ones(2, 8)).square().sum().backward()
    assert queue.loads == 4
    for ours, theirs in zip(moved.parameters(), model.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


def test_what_a_layer_was_recomputed_with_serves_its_backward() -> None:
    model, queue = layers(6), HostQueue(1, keep=2)
    in_host_memory(model, queue)
    x = torch.ones(1, 8)

    def pair(first: int, y: torch.Tensor) -> torch.Tensor:
        return model[first + 1](model[first](y))

    for _ in range(3):
        before = queue.loads
        y = x
        for first in (0, 2, 4):
            y = torch.utils.checkpoint.checkpoint(pair, first, y, use_reentrant=False)
        y.sum().backward()
    assert queue.loads - before == 2 * 6 - 2  # the last two are kept from forward


def test_a_weight_written_by_data_between_two_passes_is_the_one_that_is_used() -> None:
    model, queue = layers(2), HostQueue(1)
    in_host_memory(model, queue)
    x = torch.ones(1, 8)
    for _ in range(4):
        with torch.no_grad():
            model[1](model[0](x))
    dict(poet_layers(model))["0"].base_weight.data.zero_()
    with torch.no_grad():
        assert not model[1](model[0](x)).any()


def test_a_weight_whose_dtype_would_change_is_refused_and_stays() -> None:
    model = layers(1)
    in_host_memory(model, HostQueue())
    with pytest.raises(UserError, match="in host memory; change dtypes before"):
        model.double()
    assert model[0](torch.ones(1, 8)).dtype == torch.float32


def test_weights_in_files_are_nowhere_else_and_their_files_have_no_name(disk: Path) -> None:
    model = layers(2, "bfloat16 with extra bits")
    plain = [layer.plain_weight() for layer in model]
    in_host_memory(model, HostQueue(directory=disk))
    there = [tensor.data_ptr() for layer in model for tensor in layer.host_tensors()]
    assert len(there) == 4
    assert all(f"{disk}/" in _mapping(address) for address in there)
    assert list(disk.iterdir()) == []
    moved = [layer.plain_weight() for layer in model]
    assert all(f"{disk}/" in _mapping(weight.data_ptr()) for weight in moved)
    assert all(map(torch.equal, moved, plain))
    copied = copy.deepcopy(model)
    del model, moved
    assert str(disk) not in MAPS.read_text()
    assert all(map(torch.equal, (layer.plain_weight() for layer in copied), plain))


MAPS = Path("/proc/self/maps")


def _mapping(address: int) -> str:
    """The line of the memory that an address is in."""
    for line in MAPS.read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= address < last:
            return line
    return ""


def test_a_full_disk_is_said_before_a_byte_is_written(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"a weight of 256 bytes cannot be written there \(No space left on device\)"):
        in_host_memory(layers(1), HostQueue(directory=disk))


def test_weights_in_files_need_a_disk() -> None:
    for place, message in {
        Path("/no/disk"): "No such file or directory",
        Path("/dev/shm"): "is in memory itself",
    }.items():
        if place.exists() or place.name == "disk":
            with pytest.raises(UserError, match=message):
                in_host_memory(layers(1), HostQueue(directory=place))


def test_single_step_weights_do_not_go_to_a_disk_that_every_step_would_write() -> None:
    with pytest.raises(UserError, match="would write all of it at every step"):
        offload_frozen_(layers(1, "single-step, free"), "cuda", directory=".")
    for place in (7, b"here", ""):
        with pytest.raises(UserError, match="must be the path of a directory"):
            offload_frozen_(layers(1), "cuda", directory=place)
    with pytest.raises(UserError, match="every step of method=single-step would write all"):
        load_recipe("llama-1b", ["method=single-step", "model.offload=frozen", "model.offload_dir=."], text=False)
    with pytest.raises(UserError, match="model.offload_dir: is for model.offload=frozen or both"):
        load_recipe("llama-1b", ["method=mem", "model.offload_dir=."], text=False)


def test_the_planner_counts_host_memory_and_traffic() -> None:
    keys = [
        *("method=mem", "model.gradient_checkpointing=true", "model.num_layers=2", "data.vocab_size=512"),
        *("model.hidden_size=256", "model.intermediate_size=512", "model.num_heads=4", "poet.block_size=64"),
    ]
    here = estimate_memory("llama-1b", keys)
    there = estimate_memory("llama-1b", [*keys, "model.offload=frozen", "model.offload_dir=."])
    single = estimate_memory("llama-1b", ["method=single-step", *keys[1:], "model.offload=frozen"])
    weights = 2 * 2 * (4 * 256 * 256 + 3 * 256 * 512)
    assert (single.host, single.moved, single.stepped) == (weights, 1.5 * weights, 2 * weights)
    assert there.stepped == 0
    assert there.file == weights
    assert there.host == 2 * 2 * (256 * 256 + 256 * 512)  # two locked pieces of each size
    assert there.moved == 1.5 * weights  # the second layer's are still there when it is computed again
    assert here.host == here.file == here.moved == 0
    saved = here.phases["step"].total - there.phases["step"].total
    assert weights / 2 - 256 * 512 * 2 <= saved <= weights  # but for a layer's that are kept, and the one ahead


@pytest.mark.parametrize("method", ["adamw", "lora"])
def test_a_recipe_without_rotated_layers_keeps_its_weights_on_the_device(method: str) -> None:
    with pytest.raises(UserError, match="model.offload=frozen: is for rotated layers"):
        load_recipe("llama-1b", [f"method={method}", "model.offload=frozen"], text=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
def test_a_device_that_is_not_there_is_one_line_and_the_model_stays() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    convert_(model, PoetConfig(block_size=4))
    before = model(torch.ones(2, 8))
    with pytest.raises(UserError, match=r"^offload_frozen_: device=cuda: .*CUDA"):
        offload_frozen_(model, "cuda")
    assert torch.equal(model(torch.ones(2, 8)), before)
