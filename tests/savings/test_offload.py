"""Copies of weights ahead of their use: never a stale one, whatever order, whatever delay."""

from __future__ import annotations

import copy
import random
import threading
import time

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from poetx import PoetConfig, PoetLinear, UserError, convert_, merge_
from poetx.layers.walk import poet_layers
from poetx.ops.host import Copy, HostQueue
from poetx.planner.estimate import estimate_memory
from poetx.recipe import load_recipe

CPU = torch.device("cpu")
STEPS = 100


class SlowCopy(Copy):
    """Arrives when it likes; until then its memory holds NaN, and again once it is dropped."""

    late = random.Random(0)

    def _fill(self) -> None:
        for made in self._copies:
            made.fill_(float("nan"))
        delay = self.late.choice((0, 0, 1e-4, 1e-3))
        fill = super()._fill

        def later() -> None:
            time.sleep(delay)
            fill()

        self._thread = threading.Thread(target=later)
        self._thread.start()

    def arrived(self) -> tuple[torch.Tensor, ...]:
        self._thread.join()
        return super().arrived()


class DroppedCopy(SlowCopy):
    """Also writes NaN over what the queue gives up."""

    def is_of(self, tensors: tuple[torch.Tensor, ...]) -> bool:
        fits = super().is_of(tensors)
        if not fits:
            self.arrived()
            for made in self._copies:
                made.fill_(float("nan"))
        return fits


class WithDelays(HostQueue):
    start_copy = DroppedCopy


def layers(count: int, **settings) -> nn.ModuleList:
    config = PoetConfig(block_size=4, mode="mem", init="normalized", **settings)
    return nn.ModuleList([PoetLinear(8, 8, config=config, name=str(number)) for number in range(count)])


def in_host_memory(model: nn.Module, queue: HostQueue) -> None:
    """On the CPU too, where :func:`poetx.savings.offload_frozen_` sees no sense in it."""
    for _, layer in poet_layers(model):
        layer.keep_in_host_memory_(queue, CPU)


@pytest.mark.parametrize(("prefetch", "keep"), [(0, 0), (1, 0), (2, 3)])
def test_any_order_with_any_delay_gives_the_same_numbers(prefetch: int, keep: int) -> None:
    plain, moved = layers(4), layers(4)
    queue = WithDelays(prefetch, keep)
    in_host_memory(moved, queue)
    choose = random.Random(prefetch)
    usual = [0, 1, 2, 3]
    for number in range(STEPS if prefetch else 20):
        order = usual if choose.random() < 0.7 else choose.choices(usual, k=choose.randint(1, 6))  # some twice
        x = torch.randn(2, 8, generator=torch.Generator().manual_seed(number))
        outcomes = []
        for model in (plain, moved):
            y = x
            for place in order:
                y = torch.tanh(model[place](y) + y)
            if (what := number % 10) not in (3, 4):  # else: stopped in the middle, or only evaluated
                y.square().mean().backward()
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.grad is not None:
                    with torch.no_grad():
                        parameter -= 0.01 * parameter.grad
                    parameter.grad = None
            if what == 7:
                merge_(model)
            if what == 9:
                with torch.no_grad():
                    dict(poet_layers(model))["1"].base_weight.mul_(
                        1.0 - 2.0**-9
                    )  # somebody writes one between two passes
            outcomes.append(y.detach())
        assert torch.equal(*outcomes), number
    for (name, ours), theirs in zip(moved.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert queue.loads >= queue.missed
    if prefetch:
        assert queue.missed < 0.6 * queue.loads  # the guesses are of use


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


def test_the_planner_counts_host_memory_and_traffic() -> None:
    keys = [
        *("method=mem", "model.gradient_checkpointing=true", "model.num_layers=2", "data.vocab_size=512"),
        *("model.hidden_size=256", "model.intermediate_size=512", "model.num_heads=4", "poet.block_size=64"),
    ]
    here = estimate_memory("llama-1b", keys)
    there = estimate_memory("llama-1b", [*keys, "model.offload=frozen"])
    weights = 2 * 2 * (4 * 256 * 256 + 3 * 256 * 512)
    assert there.host == weights
    assert there.moved == 1.5 * weights  # the second layer's are still there when it is computed again
    assert here.host == here.moved == 0
    saved = here.phases["step"].total - there.phases["step"].total
    assert weights / 2 - 256 * 512 * 2 <= saved <= weights  # but for a layer's that are kept, and the one ahead


@pytest.mark.parametrize("method", ["single-step", "adamw", "lora"])
def test_a_recipe_whose_weights_change_at_every_step_keeps_them_on_the_device(method: str) -> None:
    with pytest.raises(UserError, match="model.offload=frozen: is for weights that no step writes"):
        load_recipe("llama-1b", [f"method={method}", "model.offload=frozen"], text=False)
