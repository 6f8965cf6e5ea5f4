"""What is done to a model, a group or the dense optimizer after POETX was built, or wrongly given to it."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from builders import descend, mlp
from poetx import POETX, PoetConfig, SingleStepLinear, UserError, convert_, param_groups


def converted():
    model = mlp()
    convert_(model, PoetConfig(method="single-step", block_size=4))
    return model


def loss_of(model):
    return model(torch.ones(3, 11, dtype=next(model.parameters()).dtype)).square().sum()


class Tied(nn.Module):
    """An embedding beside a layer of its shape."""

    def __init__(self):
        super().__init__()
        self.words, self.layer, self.positions = nn.Embedding(9, 6), nn.Linear(6, 9), nn.Embedding(9, 6)
        self.more = nn.Linear(9, 6)

    def forward(self, ids):
        return self.more(self.layer(self.words(ids) + self.positions(ids)))


@pytest.mark.parametrize("steps_before", [0, 100])
@pytest.mark.parametrize("other", ["words", "positions"])
def test_weights_tied_after_the_optimizer_are_found_in_its_steps(other, steps_before):
    model = Tied()
    convert_(model, PoetConfig(method="single-step", block_size=3, target_modules=["layer"]))
    optimizer = POETX(model)
    for _ in range(steps_before):
        descend(model(torch.arange(9)).square().sum(), optimizer)
    getattr(model, other).weight = model.layer.weight
    with pytest.raises(UserError, match=rf"{other}\.weight is tied to layer\.weight"):
        descend(model(torch.arange(9)).square().sum(), optimizer)


@pytest.mark.parametrize("update", ["free", "rotation"])
@pytest.mark.parametrize("angle", [-0.01, 0.5, float("nan"), torch.tensor(7.0)])
def test_an_angle_that_a_scheduler_drives_out_of_range_is_refused(angle, update):
    model = mlp()
    optimizer = POETX(model, block_size=4, update=update)
    loss_of(model).backward()
    optimizer.param_groups[0]["lr"] = angle
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UserError, match="is its angle, between 0 and 0.5"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.param_groups[0]["lr"] = 0.0  # where a warm-up begins
    optimizer.step()
    assert torch.equal(before[0], model[0].weight)


def test_layers_whose_optimizer_is_gone_say_so_and_still_evaluate():
    model = converted()
    optimizer = POETX(model)
    descend(loss_of(model), optimizer)
    del optimizer
    gc.collect()
    with pytest.raises(UserError, match=r"0: nothing would train its weight, as its POETX is gone"):
        model(torch.ones(3, 11))
    loss_of(model.eval())
    another = POETX(model)
    descend(loss_of(model.train()), another)


class Averaging(torch.optim.SGD):
    """Keeps slow weights in a state of its own, as Lookahead does."""

    def state_dict(self):
        return super().state_dict() | {"slow": 1}


class Around:
    """Only holds an optimizer."""

    def __init__(self, groups):
        self.optimizer = torch.optim.SGD(groups, lr=0.1)
        self.param_groups = self.optimizer.param_groups


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda groups: None, "is no torch.optim.Optimizer"),
        (Around, "only wraps one"),
        (lambda groups: Averaging(groups, lr=0.1), "has a state_dict of its own"),
        (lambda groups: torch.optim.LBFGS([p for g in groups for p in g["params"]]), "curvature of all parameters"),
        (lambda groups: torch.optim.SGD(groups[0]["params"][:1], lr=0.1), "leaves out parameters"),
    ],
)
@pytest.mark.parametrize("build", [converted, mlp])
def test_a_dense_optimizer_that_would_lose_something_is_refused(build, make, words):
    with pytest.raises(UserError, match=words):
        POETX(build(), dense_optimizer=make)


def momenta(optimizer):
    return [state[f"momentum_{side}"].clone() for state in states(optimizer) for side in ("in", "out")]


def states(optimizer):
    return [state for state in optimizer.state.values() if "momentum_in" in state]


@pytest.mark.parametrize(("whose", "nesterov"), [("optimizer", True), ("optimizer", False), ("model", True)])
@pytest.mark.parametrize("build", [converted, mlp], ids=["converted", "released"])
def test_zero_grad_takes_back_what_backward_added_or_says_that_it_cannot(build, whose, nesterov):
    model = build()
    optimizer = POETX(model, nesterov=nesterov, release_gradients=True, block_size=4)
    zero_grad = optimizer.zero_grad if whose == "optimizer" else model.zero_grad
    for _ in range(2):
        descend(loss_of(model), optimizer)
    before = momenta(optimizer)
    loss_of(model).backward()
    with pytest.warns(UserWarning, match=r"zero_grad\(\) before step\(\) leaves the gradient of 3 matrices, 0\.weight"):
        zero_grad()
    assert not all(map(torch.equal, before, momenta(optimizer)))
    optimizer.step()
    before = momenta(optimizer)
    optimizer.snapshot()
    loss_of(model).backward()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.zero_grad()  # of its own
    zero_grad()
    assert all(map(torch.equal, before, momenta(optimizer)))
    weight = model[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, model[0].weight)


@pytest.mark.filterwarnings("error")
def test_zero_grad_in_its_usual_places_is_quiet():
    model = converted()
    optimizer = POETX(model)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        loss_of(model).backward()
        optimizer.step()
    model[0].requires_grad_(False)
    descend(loss_of(model), optimizer)
    optimizer.zero_grad(set_to_none=False)
    model.zero_grad(set_to_none=False)
    optimizer.close()
    assert "zero_grad" not in vars(model)
    POETX(mlp(), block_size=4).zero_grad()


@pytest.mark.parametrize("how", ["assign", "parameter"])
def test_the_state_of_an_optimizer_whose_weight_was_replaced_is_refused(how: str) -> None:
    model = nn.Sequential(nn.Linear(12, 24, bias=False), nn.Tanh(), nn.Linear(24, 8, bias=False))
    convert_(model, PoetConfig(method="single-step", block_size=8))
    optimizer = POETX(model, 1e-2)
    model(torch.randn(4, 12)).square().mean().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    if how == "assign":
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    else:
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.raises(UserError, match="its weight was replaced since POETX was built"):
        optimizer.load_state_dict(state)


def test_a_rest_that_ascends_beside_matrices_that_descend_is_refused() -> None:
    model = nn.Sequential(nn.Linear(12, 8))
    convert_(model, PoetConfig(method="single-step", block_size=4))
    with pytest.raises(UserError, match="maximize=True, but matrices descend; negate the loss"):
        POETX(model, 1e-2, dense_optimizer=lambda groups: torch.optim.AdamW(groups, maximize=True))
    other = nn.Sequential(nn.Linear(12, 8))
    convert_(other, PoetConfig(block_size=4))
    with pytest.raises(UserError, match="maximize=True would be of rotations alone"):
        param_groups(other, lr=1e-3, poet_lr=1e-3, maximize=True)


def pulled(model, towards, strength=3.0):
    """The loss, and how far the weights are from where they shall stay, as EWC and L2-SP have it."""
    far = sum((p - q).square().sum() for p, q in zip(model.parameters(), towards, strict=True))
    return loss_of(model) + strength * far


@pytest.mark.parametrize("update", ["free", "rotation"])
def test_a_penalty_on_weights_trains_a_converted_layer_as_an_ordinary_one(update):
    ordinary = mlp().double()
    other = copy.deepcopy(ordinary)
    convert_(other, PoetConfig(method="single-step", block_size=4, init="keep", update=update))
    towards = [torch.randn_like(p) for p in ordinary.parameters()]
    for model in (ordinary, other):
        optimizer = POETX(model, block_size=4, update=update)
        for _ in range(3):
            for _ in range(2):  # micro-batches
                pulled(model, towards).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
    for p, q in zip(ordinary.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-9)


def test_a_penalty_leaves_frozen_layers_and_closed_optimizers_alone():
    model = converted()
    weights = [layer.weight for layer in model if isinstance(layer, SingleStepLinear)]
    towards = [torch.zeros_like(p) for p in model.parameters()]
    optimizer = POETX(model)
    model[0].requires_grad_(False)
    before = weights[0].clone()
    descend(pulled(model, towards), optimizer)
    assert torch.equal(weights[0], before)
    assert not any(p.requires_grad for p in weights)
    optimizer.close()
    model.requires_grad_(False)
    assert not sum(p.square().sum() for p in weights).requires_grad


@pytest.mark.parametrize("swaps", [False, True])
@pytest.mark.parametrize("change", ["cast", "load"])
def test_a_penalty_counts_after_a_cast_or_a_load(change, swaps):
    model = converted()
    optimizer = POETX(model)
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    try:
        model.double() if change == "cast" else model.load_state_dict(copy.deepcopy(model.state_dict()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    before = model[0].weight.detach().clone()
    descend(model[0].weight.pow(3).sum(), optimizer)
    assert not torch.equal(model[0].weight, before)
    optimizer.close()
    assert not model[0].weight.pow(3).requires_grad


def test_a_penalty_inside_a_compiled_loss_counts():
    torch._dynamo.reset()
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(11, 8))
        convert_(model, PoetConfig(method="single-step", block_size=4))
        towards = [torch.randn_like(p) for p in model.parameters()]
        loss = torch.compile(pulled, backend="aot_eager", fullgraph=True) if compiled else pulled
        optimizer = POETX(model)
        for _ in range(2):
            descend(loss(model, towards), optimizer)
        weights.append(model[0].weight.detach())
    assert torch.allclose(*weights, atol=1e-6)


@pytest.mark.parametrize("kind", ["polynomial", "cosine_with_min_lr", "cosine_warmup_with_min_lr"])
@pytest.mark.parametrize("convert", [True, False])
def test_schedules_of_transformers_that_ask_for_the_first_rate(convert, kind):
    from transformers import get_scheduler

    model = converted() if convert else mlp()
    optimizer = POETX(model, 1e-2, angle=0.02)
    more = {} if kind == "polynomial" else {"min_lr": 1e-3}
    schedule = get_scheduler(kind, optimizer, num_warmup_steps=1, num_training_steps=4, scheduler_specific_kwargs=more)
    first = [group["initial_lr"] for group in optimizer.param_groups]
    for _ in range(3):
        descend(loss_of(model), optimizer)
        schedule.step()
    ratios = [group["lr"] / initial for group, initial in zip(optimizer.param_groups, first, strict=True)]
    assert max(ratios) == pytest.approx(min(ratios))
    assert 0 < ratios[0] < 1


def test_compiled_autograd_feeds_the_same_momentum():
    models = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = converted().double()
        optimizer = POETX(model, 1e-2, angle=0.02)
        torch._dynamo.reset()
        for _ in range(2):
            loss = loss_of(model)
            if compiled:
                with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
                    loss.backward()
            else:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14, msg=name)
