"""Gradients released during backward change memory, not numbers; what they cannot do they refuse."""

from pathlib import Path

import pytest
import torch
from torch import nn

import poetx
from builders import llama
from poetx import UserError
from poetx.optim import SMMF, AdamW, release_gradients
from ranks import run_on_two_ranks

IDS = torch.arange(34).view(2, 17) % 97
OPTIMIZERS = [
    lambda groups: torch.optim.AdamW(groups),
    lambda groups: torch.optim.AdamW(groups, foreach=True),
    lambda groups: torch.optim.Adafactor(groups),
    lambda groups: AdamW(groups, state_dtype="int8"),
    lambda groups: SMMF(groups),
]


def start(tie=False):
    torch.manual_seed(0)
    return llama(tie_word_embeddings=tie).train()


def ends(model):
    return [model.get_input_embeddings().weight, model.lm_head.weight]


def train(model, make, *, release, steps=5):
    poetx.convert_(model, poetx.PoetConfig(block_size=16))
    optimizer = make(poetx.param_groups(model, lr=1e-2, poet_lr=1e-2))
    handle = poetx.merge_every(optimizer, model, steps=2)
    dense = ends(model)
    if release:
        release_gradients(optimizer, dense)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all((p.grad is None) == release for p in dense)
        optimizer.step()
        optimizer.zero_grad()
    assert handle.merges == steps // 2
    return model.state_dict()


@pytest.mark.parametrize("make", OPTIMIZERS, ids=["adamw", "foreach", "adafactor", "int8", "smmf"])
@pytest.mark.parametrize("tie", [False, True])
def test_released_gradients_give_the_same_weights(make, tie):
    plain, released = (train(start(tie), make, release=release) for release in (False, True))
    for name, value in plain.items():
        assert torch.equal(value, released[name]), name


def released(**settings):
    model = start()
    optimizer = torch.optim.AdamW(model.parameters())
    return model, optimizer, release_gradients(optimizer, ends(model), **settings)


def test_accumulation_is_refused_when_it_happens():
    model, optimizer, _ = released()
    model(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(UserError, match="a second backward came before .* by accumulation_steps=2"):
        model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("number", [0, -1, 1.5, True])
def test_passes_are_a_whole_number(number):
    with pytest.raises(UserError, match="accumulation_steps=.*: must be a whole number of at least 1"):
        released(accumulation_steps=number)


def test_gradients_of_several_passes_are_used_in_the_last_one():
    model, optimizer, _ = released(accumulation_steps=2)
    start = model.lm_head.weight.detach().clone()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.lm_head.weight.grad is not None
    assert torch.equal(model.lm_head.weight, start)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.lm_head.weight.grad is None
    assert not torch.equal(model.lm_head.weight, start)
    with pytest.raises(UserError, match="backward 3 came before"):
        model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


def test_what_some_passes_did_not_reach_is_used_at_the_step():
    used, seldom = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([used, seldom], lr=1.0)
    release_gradients(optimizer, [used, seldom], accumulation_steps=2, max_norm=1.0)
    (used + seldom).sum().backward()
    used.sum().backward()
    assert used.grad is None
    assert seldom.grad is not None
    assert torch.equal(seldom.detach(), torch.ones(3))
    optimizer.step()
    assert seldom.grad is None
    for parameter in (used, seldom):
        assert torch.allclose(parameter.detach(), torch.full((3,), 1 - 3**-0.5))  # clipped by its own norm


def test_a_released_gradient_can_be_clipped_by_its_own_norm():
    weight = nn.Parameter(torch.zeros(3))
    release_gradients(torch.optim.SGD([weight], lr=1.0), [weight], max_norm=0.5)
    (weight * torch.tensor([3.0, 0, 4])).sum().backward()
    assert torch.allclose(weight.detach(), torch.tensor([-0.3, 0, -0.4]), atol=1e-5)


def test_one_at_a_time_releases_a_gradient_and_removing_goes_back_to_ordinary_steps():
    model, optimizer, handle = released()
    for another in (optimizer, torch.optim.SGD(model.parameters())):
        with pytest.raises(UserError, match=r"released to another optimizer already.*remove\(\)"):
            release_gradients(another, ends(model))
    handle.remove()
    model(input_ids=IDS, labels=IDS).loss.backward()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_released_gradient_that_is_not_finite_counts_as_none_and_a_skipped_step_can_be_told():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    handle = release_gradients(optimizer, [parameter])
    (parameter * torch.tensor([1.0, float("inf"), 1.0])).sum().backward()
    assert torch.equal(parameter.detach(), torch.ones(3))
    with pytest.raises(UserError, match="a second backward"):
        parameter.sum().backward()
    handle.reset()
    optimizer.zero_grad()
    parameter.sum().backward()
    assert torch.equal(parameter.detach(), torch.zeros(3))


def skip_differently(rank, directory, order):
    """Both ranks use the first expert, and then each another one, or one of them none."""
    experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.1)
    release_gradients(optimizer, [expert.weight for expert in experts])
    for used in ([0, 1], [0, *order[rank]]):
        try:
            sum(experts[index](torch.ones(2, 3)).sum() for index in used).backward()
            optimizer.step()
            words = ""
        except UserError as error:
            words = str(error)
        optimizer.zero_grad()
    (Path(directory) / f"{rank}.txt").write_text(words)


@pytest.mark.parametrize("order", [([1], [2]), ([1, 2], [1]), ([2], [2])])
def test_ranks_that_use_other_parameters_are_refused_on_both(order, tmp_path):
    run_on_two_ranks(skip_differently, str(tmp_path), order)
    words = "gradients of other parameters in this step" if order[0] != order[1] else ""
    for rank in range(2):
        assert words in (text := (tmp_path / f"{rank}.txt").read_text())
        assert bool(text) == bool(words)


@pytest.mark.parametrize("all_of_them", [True, False])
def test_a_gradient_scaler_is_refused_while_gradients_are_released(all_of_them):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = release_gradients(optimizer, [p for p in model.parameters() if all_of_them or p.ndim == 2])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(3, 4)).sum()).backward()
    with pytest.raises(UserError, match="a gradient scaler is in use, and the released gradients were used with its"):
        scaler.step(optimizer)
    handle.remove()
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu")
    before = model[1].bias.detach().clone()
    scaler.scale(model(torch.ones(3, 4)).sum()).backward()
    del optimizer.grad_scale, optimizer.found_inf  # torch does it where the step comes to its end
    scaler.step(optimizer)
    assert torch.allclose(model[1].bias, before - 0.1 * 3)
