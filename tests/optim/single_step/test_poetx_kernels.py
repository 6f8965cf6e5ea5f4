"""The step of many matrices at once, by the kernels in Triton's interpreter, against each matrix by itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from poetx import POETX, PoetConfig, convert_
from poetx.optim.single_step.together import KernelStep
from poetx.train.step import TrainingStep

pytest.importorskip("triton", reason="the kernels need triton, which exists for Linux only")
from kernel_helpers import interpreted

FORMS = {
    "layers": {"converted": True},
    "layers, rotations, no look-ahead": {"converted": True, "update": "rotation", "nesterov": False},
    "layers, norms that grow": {"converted": True, "norm_growth": 0.05},
    "drop-in": {},
    "drop-in, bfloat16": {"dtype": torch.bfloat16, "momentum_dtype": "bfloat16"},
    "stacks": {"stacks": True},
}


def llama():
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_attention_heads=2))


def trained(kernels: bool, converted=False, stacks=False, dtype=torch.float32, **settings):
    """Weights and states after three steps, the second without a gradient of one matrix; and how many launches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 17, bias=False)).to(dtype)
    update = settings.get("update", "free")
    parameters = list(model.parameters())
    if converted:
        config = {"init": "normalized", "block_size": 16, "update": update}
        convert_(model, PoetConfig(method="single-step", exclude_modules=(), **config))
        optimizer = POETX(model, exclude_modules=(), angle=0.02, **settings)
    elif stacks:
        stack = nn.Parameter(torch.randn(3, 20, 33))
        parameters.append(stack)
        optimizer = POETX([{"params": [stack], "rotate": True}], block_size=16, angle=0.02, **settings)
    else:
        optimizer = POETX(model, exclude_modules=(), block_size=16, angle=0.02, **settings)
    for number in range(3):
        x = torch.randn(64, 24, generator=torch.Generator().manual_seed(number)).to(dtype)
        y = model[1](model[0](x)) if number == 1 else model(x)
        loss = (y.square() * torch.arange(y.shape[1])).sum()  # that of y² alone has nothing to rotate y by
        if stacks:
            loss = loss + (torch.arange(20.0) @ stack.square() @ torch.arange(33.0)).sum()
        loss.backward()
        if kernels:
            with interpreted():
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in (stack if stacks else model.parameters())], optimizer.state_dict()["state"]


@pytest.mark.parametrize("form", FORMS)
def test_a_step_by_the_kernels_is_that_of_each_matrix(form):
    weights, states = trained(True, **FORMS[form])
    wanted, others = trained(False, **FORMS[form])
    narrow = FORMS[form].get("dtype") == torch.bfloat16
    close = {"rtol": 2**-6, "atol": 2**-6} if narrow else {"rtol": 1e-4, "atol": 1e-5}
    for got, want in zip(weights, wanted, strict=True):
        torch.testing.assert_close(got, want, **close)
    for key, state in states.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                loose = {"rtol": 0.05, "atol": 0.05 * float(others[key][name].abs().max())} if narrow else close
                torch.testing.assert_close(value, others[key][name], **loose)


@pytest.mark.parametrize("form", ["layers", "drop-in"])
def test_batches_do_not_matter(form, monkeypatch):
    """Matrices together and one by one: the same bits."""
    together = trained(True, **FORMS[form])
    monkeypatch.setattr("poetx.optim.single_step.together._BATCH_ELEMENTS", {"cpu": 1})
    one_by_one = trained(True, **FORMS[form])
    torch.testing.assert_close(together[0], one_by_one[0], rtol=0, atol=0)


def test_a_graph_from_before_the_step_is_refused():
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    optimizer = POETX(model, exclude_modules=(), block_size=16)
    x = torch.randn(4, 32, requires_grad=True)
    model(x).square().sum().backward()
    kept = model(x).square().sum()
    with interpreted():
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_an_angle_in_a_tensor_is_the_angle():
    found = []
    for angle in (0.02, torch.tensor(0.02)):
        torch.manual_seed(0)
        model = nn.Linear(32, 32, bias=False)
        optimizer = POETX(model, exclude_modules=(), block_size=16, angle=angle)
        model(torch.randn(8, 32)).square().sum().backward()
        with interpreted():
            optimizer.step()
        found.append(model.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


def test_nothing_is_written_where_something_fails(monkeypatch):
    """All there is to fail, memory and compilers, has its turn before the first weight is written."""
    model = nn.Linear(32, 32, bias=False)
    optimizer = POETX(model, exclude_modules=(), block_size=16)
    model(torch.randn(8, 32)).square().sum().backward()
    before = model.weight.detach().clone(), optimizer.state[model.weight]["momentum_in"].clone()
    from poetx.ops.triton import single_step as kernels

    monkeypatch.setattr("poetx.optim.single_step.together._compiled", set())
    for kernel in ("norm_kernel", "decay_kernel"):
        with interpreted(), monkeypatch.context() as patch:
            patch.delattr(kernels, kernel)
            with pytest.raises(NameError):
                optimizer.step()
        assert torch.equal(model.weight, before[0])
        assert torch.equal(optimizer.state[model.weight]["momentum_in"], before[1])


def prepared_and_stepped(between=None, *, prepare=True, **settings):
    """Weights and state after three steps of converted layers, each prepared; before the last, ``between``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32, bias=False))
    config = PoetConfig(method="single-step", init="normalized", block_size=16, exclude_modules=(), **settings)
    convert_(model, config)
    optimizer = POETX(model, exclude_modules=(), angle=0.02)

    def backward(number):
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(number))
        (model(x).square() * torch.arange(32)).sum().backward()

    for number in range(3):
        optimizer.snapshot()
        backward(number)
        with interpreted():
            if prepare:
                optimizer.prepare()
            if between is not None and number == 2:
                between(model, optimizer, backward)
            optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()], optimizer


@pytest.mark.parametrize("settings", [{}, {"update": "rotation"}, {"rotation_dtype": "bfloat16"}])
def test_a_step_that_was_prepared_is_the_step(settings, monkeypatch):
    taken = []
    plain = KernelStep.take_
    monkeypatch.setattr(KernelStep, "take_", lambda step, *turn: (taken.append(step), plain(step, *turn)))
    made = []
    init = KernelStep.__init__
    monkeypatch.setattr(KernelStep, "__init__", lambda step, *args: (made.append(step), init(step, *args))[-1])
    weights, optimizer = prepared_and_stepped(**settings)
    assert made == taken, "computed once, and that is what was taken"
    others, other = prepared_and_stepped(prepare=False, **settings)
    torch.testing.assert_close(weights, others, rtol=0, atol=0)
    states = (o.plain_state_dict()["state"] for o in (optimizer, other))
    torch.testing.assert_close(*states, rtol=0, atol=0)


def another_gradient(model, optimizer, backward):
    backward(7)


def another_angle(model, optimizer, backward):
    optimizer.param_groups[0]["lr"] = 0.03


def another_momentum(model, optimizer, backward):
    optimizer.param_groups[0]["momentum"] = 0.5


def other_gradients(model, optimizer, backward):
    optimizer.discard()
    backward(7)


def another_state(model, optimizer, backward):
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["param_groups"][0]["rotations"].values():
        entry["momentum_in"].mul_(2)
        entry["momentum_out"].mul_(-1)
    optimizer.load_state_dict(state)
    backward(7)


def other_values(model, optimizer, backward):
    with torch.no_grad():
        for layer in model:
            optimizer.state[layer.weight]["momentum_in"].mul_(-1)
            optimizer.state[layer.weight]["momentum_out"].mul_(-2)


def another_memory(model, optimizer, backward):
    for layer in model:
        layer.weight.data = layer.weight.data.clone().mul_(1.001)


BETWEEN = [
    another_gradient,
    another_angle,
    another_momentum,
    other_gradients,
    another_state,
    another_memory,
    other_values,
]


@pytest.mark.parametrize("between", BETWEEN, ids=lambda function: function.__name__)
def test_what_comes_after_a_step_was_prepared_counts(between):
    weights, _ = prepared_and_stepped(between)
    others, _ = prepared_and_stepped(between, prepare=False)
    torch.testing.assert_close(weights, others, rtol=0, atol=0)
    untouched, _ = prepared_and_stepped()
    assert not torch.equal(weights[0], untouched[0])


@pytest.mark.parametrize("forget", ["discard", "close"])
def test_what_was_prepared_is_dropped(forget):
    def between(model, optimizer, backward):
        assert optimizer._ahead._batches
        getattr(optimizer, forget)()
        assert not optimizer._ahead._batches
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared_and_stepped(between)


def test_of_several_processes_nothing_is_prepared(monkeypatch):
    """Their gradients are averaged at the step."""

    def between(model, optimizer, backward):
        monkeypatch.setattr("poetx.optim.single_step.optimizer.rank_count", lambda: 2)
        optimizer.prepare()
        assert not optimizer._ahead._batches
        monkeypatch.undo()

    weights, _ = prepared_and_stepped(between)
    torch.testing.assert_close(weights, prepared_and_stepped(prepare=False)[0], rtol=0, atol=0)


def test_the_first_norm_is_that_of_the_weight_that_is_turned():
    found = []
    for prepare in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 48, bias=False))
        config = PoetConfig(method="single-step", init="normalized", block_size=16, exclude_modules=())
        convert_(model, config)
        optimizer = POETX(model, exclude_modules=(), angle=0.02)
        (model(torch.ones(4, 32)).square() * torch.arange(48)).sum().backward()
        with interpreted():
            if prepare:
                optimizer.prepare()
            with torch.no_grad():
                model[0].weight.mul_(2)
            optimizer.step()
        found.append(model[0].weight.detach().norm())
    assert found[0] == found[1] == pytest.approx(2 * 48**0.5, rel=1e-2)


def test_few_maps_are_computed_ahead(monkeypatch):
    """Those of large models take memory; the host's work takes none."""
    monkeypatch.setattr("poetx.optim.single_step.turn._MAPS_AHEAD", 1)
    monkeypatch.setattr("poetx.optim.single_step.together._BATCH_ELEMENTS", {"cpu": 1})
    seen = []
    weights, _ = prepared_and_stepped(
        lambda model, optimizer, backward: seen.extend(optimizer._ahead._batches.values())
    )
    assert [prepared.turn is not None for prepared in seen] == [True, False]
    monkeypatch.undo()
    torch.testing.assert_close(weights, prepared_and_stepped(prepare=False)[0], rtol=0, atol=0)


def test_the_training_step_prepares_and_skips(monkeypatch):
    """A loss that is not finite drops what was prepared, and the next step is as if it had never been."""
    found, prepared = [], []
    plain = POETX.prepare
    monkeypatch.setattr(POETX, "prepare", lambda optimizer: (prepared.append(1), plain(optimizer))[1])
    for spoiled in (True, False):
        torch.manual_seed(0)
        model = llama()
        convert_(model, PoetConfig(method="single-step", init="normalized", block_size=16))
        optimizer = POETX(model)
        step = TrainingStep(model, optimizer, model)
        ids = torch.arange(34).view(2, 17) % 97
        with interpreted():
            step([(ids, ids)], clip=1.0)
            if spoiled:
                with torch.no_grad():
                    model.lm_head.weight[0, 0] += torch.inf
                result = step([(ids, ids)], clip=1.0)
                assert result.skipped
                with torch.no_grad():
                    model.lm_head.weight[0, 0] = 0.0
            else:
                with torch.no_grad():
                    model.lm_head.weight[0, 0] = 0.0
            step([(ids, ids)], clip=1.0)
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert len(prepared) == 5
