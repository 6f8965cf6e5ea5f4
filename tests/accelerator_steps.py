"""On a device that is not the CPU: nothing is left on the host, nobody waits, and the numbers are the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import accelerator
from accelerator import crossings
from poetx import POETX, PoetConfig, convert_, merge_, merge_every, param_groups, to_dense_
from poetx.ops.single_step import add_to_
from poetx.optim import SMMF, AdamW, HFac


@pytest.fixture
def device():
    with accelerator.accelerator() as device:
        yield device


def llama(device: torch.device | str, dtype: torch.dtype = torch.float32, **sizes: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(**(small | sizes), vocab_size=96, attn_implementation="eager", use_cache=False)
    return LlamaForCausalLM(config).to(dtype).to(device)


def rotated(optimizer_class: Callable = torch.optim.AdamW, **settings) -> Callable:
    def prepare(model: nn.Module) -> torch.optim.Optimizer:
        convert_(model, PoetConfig(block_size=16, init="normalized", **settings))
        optimizer = optimizer_class(param_groups(model, lr=1e-3, poet_lr=1e-2))
        merge_every(optimizer, model, steps=2)
        return optimizer

    return prepare


def single_step_layers(**settings) -> Callable:
    def prepare(model: nn.Module) -> torch.optim.Optimizer:
        convert_(model, PoetConfig(method="single-step", block_size=16, init="normalized", **settings))
        return POETX(model, lr=1e-3)

    return prepare


def drop_in(**settings) -> Callable:
    return lambda model: POETX(model, lr=1e-3, block_size=16, **settings)


FORMS = {
    "fast": rotated(mode="fast"),
    "mem": rotated(mode="mem"),
    "mem, exact": rotated(mode="mem", neumann_order="exact"),
    "int8 weight": rotated(mode="mem", weight_format="int8", group_size=16),
    "SMMF": rotated(SMMF, mode="mem"),
    "H-Fac": rotated(HFac, mode="mem"),
    "AdamW with an 8-bit state": rotated(partial(AdamW, state_dtype="int8"), mode="mem"),
    "single-step layers": single_step_layers(),
    "single-step layers, rotations": single_step_layers(update="rotation"),
    "drop-in": drop_in(),
    "drop-in, gradients released": drop_in(release_gradients=True),
    "drop-in, rotations": drop_in(update="rotation"),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> torch.Tensor:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def losses(prepare: Callable, device: torch.device | str, steps: int = 3) -> list[float]:
    model = llama(device)
    optimizer = prepare(model)
    ids = (torch.arange(34).view(2, 17) * 7 % 96).to(device)
    return [float(step(model, optimizer, ids)) for _ in range(steps)]


@pytest.mark.parametrize("name", FORMS)
def test_the_losses_are_those_on_the_cpu_across_merges(name: str, device: torch.device) -> None:
    there = losses(FORMS[name], device)
    assert there == pytest.approx(losses(FORMS[name], "cpu"), rel=1e-5)
    assert there[-1] < there[0]


def crossings_of_a_step(prepare: Callable, device: torch.device, dtype: torch.dtype) -> list[str]:
    model = llama(device, dtype)
    optimizer = prepare(model)
    ids = torch.zeros(2, 9, dtype=torch.long, device=device)
    for _ in range(2):  # with a merge, and with whatever is made once
        step(model, optimizer, ids)
    with crossings() as seen:
        step(model, optimizer, ids)
    return seen


#: What float32 does, bfloat16 does too, and rounds: one of each kind of step is enough of float32.
IN_FLOAT32 = ("fast", "mem, exact", "single-step layers", "drop-in")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in FORMS), *((name, torch.float32) for name in IN_FLOAT32)],
)
def test_a_step_without_a_merge_waits_no_more_than_adamw_does(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    assert crossings_of_a_step(FORMS[name], device, dtype) == ["_local_scalar_dense"]


def test_what_adamw_waits_for(device: torch.device) -> None:
    """One value, the transformers library's own, about packed sequences."""
    dense = crossings_of_a_step(lambda model: torch.optim.AdamW(model.parameters()), device, torch.float32)
    assert dense == ["_local_scalar_dense"]


@pytest.mark.parametrize("name", ["fast", "mem", "int8 weight", "single-step layers"])
def test_the_dense_model_comes_back_where_it_was(name: str, device: torch.device) -> None:
    model = llama(device)
    optimizer = FORMS[name](model)
    ids = torch.zeros(2, 9, dtype=torch.long, device=device)
    for _ in range(3):
        step(model, optimizer, ids)
    if isinstance(optimizer, torch.optim.AdamW):
        merge_(model)
    before = model(input_ids=ids).logits
    to_dense_(model)
    assert {p.device for p in model.parameters()} == {device}
    torch.testing.assert_close(model(input_ids=ids).logits.cpu(), before.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_a_gradient_that_is_not_finite_adds_nothing_and_nobody_waits(packed: bool, device: torch.device) -> None:
    sink = torch.ones((2, 6) if packed else (2, 4, 4), device=device)
    M, peaks = torch.ones(2, 4, 4, device=device), torch.zeros(2, device=device)
    M[1, 0, 2] = float("nan")
    with crossings() as seen:
        add_to_(sink, peaks, M, 8)
    assert seen == []
    assert sink[1].cpu().eq(1).all()
    assert (peaks.cpu() > 0).tolist() == [not packed, False]
    add_to_(sink, peaks, torch.arange(32.0, device=device).view(2, 4, 4), 8)
    assert sink.cpu().ne(1).any()


def test_a_tensor_left_on_the_host_is_noticed(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match="on the host"):
        torch.zeros(3, device=device) + torch.zeros(3)


def test_waits_and_moves_are_noticed(device: torch.device) -> None:
    x = torch.ones(3, device=device)
    with crossings() as seen:
        x.sum().item()
        x.cpu()
        torch.ones(3).to(device)
        x.nonzero()
        x + 1
    assert seen == ["_local_scalar_dense", "_to_copy", "_to_copy", "nonzero"]
