"""Two optimizers behind one: the same numbers as two, one state, one door."""

import copy

import pytest
import torch
from torch import nn

import poetx
from poetx import UserError
from poetx.optim import AdamW, CombinedOptimizer, build_optimizer, release_gradients

BASES = ["adafactor", "smmf", "hfac"]


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Embedding(30, 16), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.LayerNorm(16)]
    model = nn.Sequential(*layers).to(dtype)
    poetx.convert_(model, poetx.PoetConfig(block_size=8, exclude_modules=()))
    return model


def groups_of(model):
    return poetx.param_groups(model, lr=1e-2, poet_lr=1e-2)


def momentum(kinds):
    return {"momentum": 0.9} if "sgd" in kinds else {}


def backward(model, step):
    ids = torch.randint(0, 30, (4, 6), generator=torch.Generator().manual_seed(step))
    model(ids).float().square().mean().backward()


def train(model, optimizers, steps, first=0):
    for step in range(first, first + steps):
        backward(model, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("base", BASES)
def test_one_door_gives_the_numbers_of_two_optimizers(base):
    one, two = model_of(), model_of()
    combined = build_optimizer(groups_of(one), dense_optimizer=base)
    assert isinstance(combined, CombinedOptimizer)
    rotations, *rest = groups_of(two)
    separate = [torch.optim.AdamW([rotations]), type(combined.optimizers[1])(rest)]
    poetx.merge_every(combined, one, steps=2)
    poetx.merge_every(separate[0], two, steps=2)
    train(one, [combined], 5)
    train(two, separate, 5)
    assert equal(weights(one), weights(two))


@pytest.mark.parametrize("state_dtype", ["auto", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [None, *BASES])
def test_saved_and_loaded_it_goes_on_bitwise(base, dtype, state_dtype):
    def start():
        model = model_of(dtype)
        optimizer = build_optimizer(groups_of(model), dense_optimizer=base, state_dtype=state_dtype)
        poetx.merge_every(optimizer, model, steps=3)
        return model, optimizer

    whole, optimizer = start()
    train(whole, [optimizer], 5)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    train(whole, [optimizer], 4, first=5)
    other, fresh = start()
    other.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    train(other, [fresh], 4, first=5)
    assert equal(weights(whole), weights(other))


def test_released_gradients_and_copies():
    plain, released = model_of(), model_of()
    a, b = (build_optimizer(groups_of(m), dense_optimizer="smmf") for m in (plain, released))
    release_gradients(b, [released[0].weight])
    train(plain, [a], 3)
    train(released, [b], 3)
    assert equal(weights(plain), weights(released))
    twin, c = copy.deepcopy((plain, a))
    train(plain, [a], 1, first=3)
    train(twin, [c], 1, first=3)
    assert equal(weights(plain), weights(twin))


def test_small_steps_move_bfloat16_parameters_unless_torchs_own_optimizer_is_asked_for():
    moved = {}
    for state_dtype in ("auto", "float32", "same"):
        parameter = nn.Parameter(torch.ones(8192, dtype=torch.bfloat16))
        optimizer = build_optimizer([{"params": [parameter]}], lr=1e-3, state_dtype=state_dtype)
        for _ in range(50):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        moved[state_dtype] = 1 - float(parameter.detach().float().mean())
    assert moved["same"] == 0
    for state_dtype in ("auto", "float32"):
        assert moved[state_dtype] == pytest.approx(0.05 + 50e-5, rel=0.05), state_dtype  # weight decay as torch has it


def test_wide_parameters_keep_torchs_own_optimizer():
    assert type(build_optimizer(groups_of(model_of()))) is torch.optim.AdamW
    mixed = build_optimizer(groups_of(model_of(torch.bfloat16)))
    assert [type(optimizer) for optimizer in mixed.optimizers] == [torch.optim.AdamW, AdamW]
    assert type(build_optimizer(groups_of(model_of(torch.bfloat16)), state_dtype="same")) is torch.optim.AdamW


def test_a_groups_own_state_dtype_counts():
    groups = poetx.param_groups(model_of(), lr=1e-2, poet_lr=1e-2, state_dtype="float32")
    combined = build_optimizer(groups, dense_optimizer="smmf")
    assert type(combined.optimizers[0]) is AdamW
    assert combined.param_groups[0]["state_dtype"] == "float32"


STATES = [("adamw", None), ("sgd", None), ("adafactor", None), ("adamw", "smmf"), ("adamw", "sgd"), ("hfac", "adamw")]


@pytest.mark.parametrize("there", STATES, ids=str)
@pytest.mark.parametrize("here", STATES, ids=str)
@pytest.mark.parametrize("stepped", [False, True])
def test_the_state_of_other_optimizers_is_refused_when_it_is_loaded(here, there, stepped):
    model = model_of()
    one, other = (build_optimizer(groups_of(model), name, dense_optimizer=dense) for name, dense in (there, here))
    train(model, [one] * stepped, 1)
    if here == there:
        other.load_state_dict(one.state_dict())
        train(model, [other], 1)
        return
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(UserError, match="this state was (not )?saved by .*start") as error:
        other.load_state_dict(one.state_dict())
    assert "\n" not in str(error.value)
    assert str(other.state_dict()) == str(before)
    train(model, [other], 1)


@pytest.mark.parametrize("kinds", [*STATES, ("smmf", "adafactor")], ids=str)
def test_a_state_of_other_shapes_is_refused_with_the_parameter(kinds):
    model = model_of()
    one, other = (
        build_optimizer(groups_of(model), kinds[0], dense_optimizer=kinds[1], **momentum(kinds)) for _ in "ab"
    )
    train(model, [one], 1)
    for number in range(len(list(model.parameters()))):
        saved = copy.deepcopy(one.state_dict())
        for name, value in saved["state"].get(number, {}).items():
            if isinstance(value, torch.Tensor) and value.ndim:
                state = {**saved["state"], number: saved["state"][number] | {name: torch.cat([value, value])}}
                with pytest.raises(UserError, match=rf"the {name} of parameter \d+ of '\w+', which is .* was saved as"):
                    other.load_state_dict(saved | {"state": state})
    other.load_state_dict(one.state_dict())


def test_mistakes_are_named():
    model = nn.Linear(4, 4)
    with pytest.raises(UserError, match="did you mean 'adamw'"):
        build_optimizer([{"params": model.parameters()}], "adam")
    with pytest.raises(UserError, match="the model has no rotations"):
        build_optimizer([{"params": model.parameters()}], dense_optimizer="smmf")
    optimizer = build_optimizer(groups_of(model_of()), dense_optimizer="smmf")
    for idle in ({"state_dtype": "int8"}, {"betas": (0.5, 0.9)}, {"eps_mode": "uncorrected"}):
        with pytest.raises(UserError, match=f"{next(iter(idle))}=.* is adamw's, and would have no effect"):
            build_optimizer(groups_of(model_of()), "sgd", dense_optimizer="hfac", **idle)
    with pytest.raises(UserError, match=r"momentum=0\.5 is sgd's"):
        build_optimizer(groups_of(model_of()), dense_optimizer="hfac", momentum=0.5)
    groups = poetx.param_groups(model_of(), lr=1e-2, poet_lr=1e-2, betas=(0.5, 0.9))
    with pytest.raises(UserError, match="betas=.* in the group 'rotations' is no setting of sgd"):
        build_optimizer(groups, "sgd", dense_optimizer="adamw")
    with pytest.raises(UserError, match="before they are combined"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_the_former_name_still_works_and_says_so():
    with pytest.warns(DeprecationWarning, match="dense_optimizer="):
        optimizer = build_optimizer(groups_of(model_of()), base="smmf")
    assert [type(each).__name__ for each in optimizer.optimizers] == ["AdamW", "SMMF"]


@pytest.mark.parametrize("kinds", [("adamw", "adamw"), ("adamw", "smmf"), ("adamw", "hfac"), ("sgd", "adafactor")])
@pytest.mark.parametrize("scheduler", ["OneCycleLR", "CyclicLR"])
def test_schedulers_that_cycle_momentum_reach_every_group(kinds, scheduler):
    model = model_of(torch.bfloat16)
    optimizer = build_optimizer(groups_of(model), kinds[0], dense_optimizer=kinds[1], **momentum(kinds))
    optimizer.load_state_dict(optimizer.state_dict())
    rates = [group["lr"] for group in optimizer.param_groups]
    if scheduler == "OneCycleLR":
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=10)
    else:
        cycle = torch.optim.lr_scheduler.CyclicLR(
            optimizer, base_lr=[r / 10 for r in rates], max_lr=rates, step_size_up=4
        )
    seen = set()
    for step in range(4):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        cycle.step()
        used = optimizer.optimizers[0].param_groups[0]
        seen.add((used["lr"], used["betas"][0] if "betas" in used else used["momentum"]))
    assert len(seen) == 4
    assert all(weight.isfinite().all() for weight in weights(model))


def test_a_closure_is_called_once_and_before_anything_moves():
    model = model_of()
    twin = copy.deepcopy(model)
    a, b = (build_optimizer(groups_of(m), dense_optimizer="hfac") for m in (model, twin))
    calls = []

    def closure():
        calls.append([p.detach().clone() for p in model.parameters()])
        backward(model, 0)
        return 3.0

    assert a.step(closure) == 3.0
    assert len(calls) == 1
    assert equal(calls[0], weights(twin))
    train(twin, [b], 1)
    assert equal(weights(model), weights(twin))
