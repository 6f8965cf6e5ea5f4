"""Layers that got memory without values, and states with values that no layer can have."""

import copy

import pytest
import torch
from torch import nn

from builders import llama
from poetx import POETX, PoetConfig, UserError, convert_, save_pretrained, to_dense_

FORMS = {
    "poet-x": {},
    "int8": {"mode": "mem", "weight_format": "int8", "group_size": 5},
    "single-step": {"method": "single-step"},
}


def model_of(form, device="cpu"):
    with torch.device(device):
        model = nn.Sequential(nn.Linear(11, 20), nn.Tanh(), nn.Linear(20, 13))
    convert_(model, PoetConfig(block_size=4, **FORMS[form]))
    return model.eval()


@pytest.mark.parametrize("form", FORMS)
def test_to_empty_alone_is_refused_and_every_way_to_give_values_is_taken(form):
    x, whole = torch.randn(3, 11), model_of(form)
    state = whole.state_dict()
    model = model_of(form, "meta").to_empty(device="cpu")
    for attempt in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.float64)):
        with pytest.raises(UserError, match="^0: it has memory but no values since to_empty or the meta device"):
            attempt(x.to(next(attempt.parameters()).dtype))
    with pytest.raises(UserError, match="it has memory but no values"):
        to_dense_(copy.deepcopy(model))
    if form != "single-step":
        with pytest.raises(UserError, match="it has memory but no values"):
            model[0].merge_()
    ways = {
        "load": lambda m: m.load_state_dict(state),
        "assign": lambda m: m.load_state_dict(copy.deepcopy(state), assign=True),
        "in place": lambda m: [own.data.copy_(state[key]) for key, own in m.state_dict().items()],
    }
    for fill in ways.values():
        filled = copy.deepcopy(model)
        fill(filled)
        filled = copy.deepcopy(filled).to("cpu", torch.float32)
        assert torch.equal(filled(x), whole(x))
        copy.deepcopy(filled)(x)
    compiled = torch.compile(copy.deepcopy(filled), backend="eager", fullgraph=True)
    if form == "single-step":
        assert torch.equal(compiled(x), whole(x))
    for layer in (model[0], model[2]):
        layer.reset_parameters()
        copy.deepcopy(layer)(torch.randn(2, layer.in_features))
    for emptied in (model_of(form).to_empty(device="cpu"), nn.Sequential(model_of(form)).to_empty(device="cpu")):
        with pytest.raises(UserError, match="0: it has memory but no values"):  # also of a model that had values
            emptied(x)
        emptied.load_state_dict({f"0.{key}": state[key] for key in state} if len(emptied) == 1 else state)
        assert torch.equal(emptied(x), whole(x))
    part = model_of(form, "meta").to_empty(device="cpu")
    part.load_state_dict({key: value for key, value in state.items() if key.startswith("0.")}, strict=False)
    with pytest.raises(UserError, match="^2: it has memory but no values"):
        part(x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "move",
    [lambda m: m.to("cpu"), lambda m: m.double().float(), lambda m: m.share_memory()],
    ids=["to", "cast", "share"],
)
def test_a_move_is_no_loss_of_values(form, move):
    x, model = torch.randn(3, 11), model_of(form)
    y = model(x)
    assert torch.equal(move(model)(x), y)


@pytest.mark.parametrize("side", ["perm_in", "perm_out"])
@pytest.mark.parametrize(
    "damage",
    [lambda p: p * 0, lambda p: p.clamp(max=5), lambda p: p + 1, lambda p: -p],
    ids=["zeros", "doubled", "out", "negative"],
)
def test_a_permutation_that_is_none_is_refused(damage, side):
    model = model_of("int8")
    state = model.state_dict()
    with pytest.raises(UserError, match=f"^2: {side} in the state is no permutation"):
        model.load_state_dict(state | {f"2.{side}": damage(state[f"2.{side}"])})
    model.load_state_dict(state)


@pytest.mark.parametrize(("form", "key"), [("poet-x", "base_weight"), ("poet-x", "weight"), ("single-step", "weight")])
def test_integers_are_not_read_as_a_weight(form, key):
    model = model_of(form)
    if form == "single-step":
        POETX(model)
    state = ({} if key == "weight" else model.state_dict()) | {f"0.{key}": torch.ones(20, 11, dtype=torch.int8)}
    with pytest.raises(UserError, match="^0: the weight in the state is int8: codes of a quantized weight"):
        model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_without_values_is_not_saved(form, tmp_path):
    model = llama(num_hidden_layers=1)
    convert_(model, PoetConfig(block_size=4, **FORMS[form]))
    with pytest.raises(UserError, match="it has memory but no values"):
        save_pretrained(model.to_empty(device="cpu"), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
