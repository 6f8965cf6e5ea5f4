"""Decoder layers' inputs in host memory: the same numbers, whatever comes in between, and pages that are used again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from builders import llama
from poetx import UserError
from poetx.planner.estimate import estimate_memory
from poetx.recipe import load_recipe
from poetx.savings import checkpoint_layers_, offload_activations_


def passes(model: nn.Module, seeds: list[int]) -> list[torch.Tensor]:
    """Losses and gradients of micro-batches, the second of them interrupted in its backward and then repeated."""
    found = []
    for seed in seeds:
        ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(seed))
        loss = model(input_ids=ids, labels=ids).loss
        if seed % 2:
            loss.register_hook(lambda gradient: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loss.backward()
            loss = model(input_ids=ids, labels=ids).loss
        with torch.no_grad():
            model(input_ids=ids)  # an evaluation between forward and backward
        loss.backward()
        found.append(loss.detach())
    return [*found, *(p.grad for p in model.parameters() if p.grad is not None)]


def test_losses_and_gradients_are_the_same_and_pages_are_used_again() -> None:
    model = llama().train()
    checkpoint_layers_(model)
    moved = copy.deepcopy(model)
    kept = offload_activations_(moved, few=1)
    for got, want in zip(passes(moved, [0, 1, 2]), passes(model, [0, 1, 2]), strict=True):
        assert torch.equal(got, want)
    size, before = kept.size, kept.moved
    passes(moved, [4, 6])
    assert kept.size == size  # no new pages
    width = model.config.hidden_size
    inputs = model.config.num_hidden_layers * 2 * 16 * width * 4
    assert inputs <= (kept.moved - before) / 2 <= inputs + 4 * 2 * 16 * width * 4  # and what the last norm keeps
    again = copy.deepcopy(moved)
    assert again.base_model.host_activations is not kept
    passes(again, [0])
    assert kept.size == size


def test_what_is_small_stays_and_a_model_without_layers_is_refused() -> None:
    model = llama().train()
    checkpoint_layers_(model)
    kept = offload_activations_(model)
    passes(model, [0])
    assert kept.moved == 0
    with pytest.raises(UserError, match="no nn.ModuleList of repeated layers"):
        offload_activations_(nn.Sequential(nn.Linear(2, 2)))


def test_the_planner_counts_them_in_host_memory() -> None:
    keys = [
        *("method=mem", "model.gradient_checkpointing=true", "model.num_layers=4", "data.vocab_size=512"),
        *("model.hidden_size=256", "model.intermediate_size=512", "model.num_heads=4", "poet.block_size=64"),
        *("data.seq_len=2048", "train.batch_size=1", "train.micro_batch_size=1", "train.chunked_loss=true"),
    ]
    here = estimate_memory("llama-1b", keys)
    there = estimate_memory("llama-1b", [*keys, "model.offload=activations"])
    inputs = 4 * 2048 * 256 * 2
    assert inputs <= there.host <= 2.5 * inputs  # and what the last norm keeps
    assert there.moved == there.host
    assert here.peak - there.peak >= 0.4 * inputs  # two of them are on the device, beside the one in use


def test_recipes_say_what_it_needs() -> None:
    with pytest.raises(UserError, match=r"model\.offload=activations: .* set model\.gradient_checkpointing=true"):
        load_recipe("llama-1b", ["model.offload=activations"], text=False)
    recipe = load_recipe("llama-1b", ["model.offload=both", "model.gradient_checkpointing=true"], text=False)
    assert recipe.model.streams_weights
    assert recipe.model.offloads_activations
