"""SCALE's rule for embedding and head beside single steps: the formula, states, releases."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from poetx import POETX, PoetConfig, UserError, convert_
from poetx.optim.baselines.ends import ScaledEnds
from poetx.optim.baselines.rules import OF_ENDS, ends_of
from poetx.optim.gradient_release import release_gradients

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(3))
REST = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8}


def model_of(*, tied: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=tied, **SIZES)).to(dtype)


def ends(model: Any, groups: Any, ratio: float = 1.0) -> ScaledEnds:
    return ScaledEnds(
        groups, ends={key: OF_ENDS["scale", end] for key, end in ends_of(model).items()}, rest=REST, ratio=ratio
    )


def poetx_of(model: Any, ratio: float = 1.0) -> POETX:
    convert_(model, PoetConfig(method="single-step", block_size=8, init="normalized"))
    return POETX(model, 0.02, angle=0.01, weight_decay=0.0, dense_optimizer=lambda groups: ends(model, groups, ratio))


def descend(model: Any, optimizer: Any, steps: int = 1) -> None:
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_step_by_the_formula_and_the_rest_by_adamw(tied: bool) -> None:
    model = model_of(tied=tied)
    optimizer = poetx_of(model, ratio=0.5)
    norm, embedding, head = model.model.norm.weight, model.get_input_embeddings().weight, model.lm_head.weight
    twin = nn.Parameter(norm.detach().clone())
    adamw = torch.optim.AdamW([twin], weight_decay=0.0, **REST)
    momentum = torch.zeros_like(head)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        before = embedding.detach().clone(), head.detach().clone()
        momentum = 0.9 * momentum + 0.1 * head.grad
        columns = embedding.grad / embedding.grad.square().mean(0, keepdim=True).sqrt().clamp_min(1e-8)
        rows = momentum / momentum.square().mean(1, keepdim=True).sqrt().clamp_min(1e-8)
        twin.grad = norm.grad.clone()
        optimizer.step()
        adamw.step()
        optimizer.zero_grad()
        torch.testing.assert_close(head, before[1] - 0.01 * rows, rtol=1e-12, atol=1e-14)
        if not tied:
            torch.testing.assert_close(embedding, before[0] - 0.01 * columns, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(norm, twin, rtol=1e-12, atol=1e-14)
    assert set(optimizer.state[head]) == {"step", "momentum"}
    assert set(optimizer.state[embedding]) == ({"step", "momentum"} if tied else {"step"})


def test_saved_and_loaded_it_goes_on_to_the_bit() -> None:
    model = model_of(dtype=torch.bfloat16)
    optimizer = poetx_of(model)
    descend(model, optimizer, 3)
    other = model_of(dtype=torch.bfloat16)
    again = poetx_of(other)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (other, again)):
        descend(each, its, 3)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_states_of_adamw_and_its_own_are_told_apart() -> None:
    saved, plain = {}, model_of()
    convert_(plain, PoetConfig(method="single-step", block_size=8, init="normalized"))
    of_adamw = POETX(plain, 0.02, angle=0.01)
    model = model_of()
    own = poetx_of(model)
    for name, each, optimizer in (("adamw", plain, of_adamw), ("ends", model, own)):
        descend(each, optimizer)
        saved[name] = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UserError, match="saved by AdamW of torch .*AdamW with ends by SCALE steps"):
        own.load_state_dict(saved["adamw"])
    with pytest.raises(UserError, match="saved by AdamW with ends by SCALE"):
        of_adamw.load_state_dict(saved["ends"])


def test_released_gradients_step_alike() -> None:
    model, other = model_of(), model_of()
    optimizer, released = poetx_of(model), poetx_of(other)
    assert released.dense_optimizer is not None
    release_gradients(released.dense_optimizer, [other.get_input_embeddings().weight, other.lm_head.weight])
    descend(model, optimizer, 3)
    descend(other, released, 3)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14, msg=name)
