"""The layer form of the single step: the same trajectory as the optimizer on a plain model, with nothing in between."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from builders import descend, gpt2, llama, mlp
from helpers import TOLERANCE, relative_error
from poetx import POETX, PoetConfig, SingleStepLinear, UserError, convert_, merge_every, spectrum, to_dense_
from poetx.ops.single_step import cheaper_route, map_gradient, single_step_linear, skew_gradient
from poetx.savings import checkpoint_layers_

SIZES = [(12, 8, 4), (7, 13, 5), (10, 6, 16), (9, 4, 2)]
CONFIG = PoetConfig(method="single-step", block_size=4)


def attached(m, n, b, *, bias, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, m, bias=bias, dtype=dtype))
    convert_(model, PoetConfig(method="single-step", block_size=b, **settings))
    optimizer = POETX(model)
    return model[0], optimizer


@pytest.mark.parametrize("route", ["tokens", "weight"])
@pytest.mark.parametrize("keep_y", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gradient_of", [skew_gradient, map_gradient])
@pytest.mark.parametrize(("m", "n", "b"), SIZES)
def test_backward_feeds_the_momentum_and_gives_the_plain_gradients(m, n, b, gradient_of, bias, keep_y, route):
    update = "free" if gradient_of is map_gradient else "rotation"
    layer, _ = attached(m, n, b, bias=bias, update=update)
    x = torch.randn(3, 5, n, dtype=torch.float64, requires_grad=True)
    weight = layer.weight.detach().requires_grad_()
    want = nn.functional.linear(x, weight, layer.bias)
    g = torch.randn_like(want)
    inputs = [x, weight, *([layer.bias] if bias else [])]
    expected = torch.autograd.grad(want, inputs, g)
    block_sizes = (layer.block_size_in, layer.block_size_out)
    y = single_step_linear(
        x, layer.frozen_weight.stored, layer.bias, layer.momentum, block_sizes=block_sizes, route=route, keep_y=keep_y
    )
    assert relative_error(y, want) < TOLERANCE[torch.float64]
    y.backward(g)
    assert relative_error(x.grad, expected[0]) < TOLERANCE[torch.float64]
    if bias:
        assert relative_error(layer.bias.grad, expected[2]) < TOLERANCE[torch.float64]
    assert layer.weight.grad is None
    for side, total in (("in", layer.momentum.momentum_in), ("out", layer.momentum.momentum_out)):
        gradient = gradient_of(weight.detach(), expected[1], side, block_sizes[side == "out"])
        if gradient.numel():
            assert relative_error(total, gradient) < TOLERANCE[torch.float64]


VARIANTS = [{"update": "rotation"}, {"nesterov": False}, {"norm_growth": 0.02}, {"mode": "mem"}]
LAYER_KEYS = ("update", "mode", "block_size")


def both_forms(build, settings):
    """The same float64 model twice: plain with its optimizer, and converted with its."""
    layer_settings = {"block_size": 16} | {k: v for k, v in settings.items() if k in LAYER_KEYS}
    rest = {k: v for k, v in settings.items() if k not in LAYER_KEYS}
    plain = build().double()
    converted = copy.deepcopy(plain)
    convert_(converted, PoetConfig(method="single-step", **layer_settings))
    layer_settings.pop("mode", None)
    return (plain, POETX(plain, **layer_settings, **rest)), (converted, POETX(converted, **rest))


def loss_of(model, step, part):
    generator = torch.Generator().manual_seed(17 * step + part)
    if isinstance(model, nn.Sequential):
        return model(torch.randn(6, 11, dtype=torch.float64, generator=generator)).square().mean()
    tokens = torch.randint(0, 50, (2, 8), generator=generator)
    return model(input_ids=tokens, labels=tokens).loss


@pytest.mark.parametrize(
    ("build", "settings"),
    [*((mlp, settings) for settings in VARIANTS), *((build, s) for build in (llama, gpt2) for s in VARIANTS[:2])],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_both_forms_take_the_same_path(build, settings):
    """Two micro-batches a step, biases, tied embeddings, Conv1D, odd sizes."""
    forms = both_forms(build, settings)
    losses = ([], [])
    for step in range(7):
        for (model, optimizer), seen in zip(forms, losses, strict=True):
            for part in range(2):
                loss = loss_of(model, step, part)
                loss.backward()
                seen.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    plain, converted = (model for model, _ in forms)
    to_dense_(converted)
    for (name, p), q in zip(plain.named_parameters(), converted.parameters(), strict=True):
        assert relative_error(q, p) < 1e-9, name


def test_released_gradients_of_the_plain_form_change_nothing():
    runs = []
    for release in (False, True):
        torch.manual_seed(0)
        model = mlp().double()
        optimizer = POETX(model, block_size=4, release_gradients=release)
        rotated = optimizer.param_groups[0]["params"]
        for step in range(5):
            for part in range(2):
                loss_of(model, step, part).backward()
            assert all((p.grad is None) == release for p in rotated)
            optimizer.step()
            optimizer.zero_grad()
        runs.append([p.detach().clone() for p in model.parameters()])
    for p, q in zip(*runs, strict=True):
        assert relative_error(p, q) < 1e-12


@pytest.mark.parametrize(("mode", "b", "keeps_y"), [("fast", 4, True), ("mem", 4, False), ("fast", 64, False)])
def test_what_is_saved(mode, b, keeps_y):
    layer, _ = attached(96, 80, b, bias=True, dtype=torch.float32, mode=mode)
    x = torch.randn(50, 80, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    mine = {id(p.untyped_storage()) for p in layer.parameters()}
    kept = {t.data_ptr() for t in saved if t.data_ptr() not in {p.data_ptr() for p in layer.parameters()}}
    assert len(mine) == 2
    assert kept == ({x.data_ptr(), y.data_ptr()} if keeps_y else {x.data_ptr()})


@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_output_that_is_overwritten_is_computed_again(checkpointed):
    sinks = []
    for inplace in (False, True):
        layer, _ = attached(96, 80, 4, bias=True)
        assert layer.route == "tokens"
        x = torch.randn(5, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        model = nn.Sequential(layer, nn.ReLU(inplace=inplace))
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        y.sin().sum().backward()
        sinks.append([layer.momentum.momentum_in, layer.momentum.momentum_out, x.grad])
    for got, want in zip(*sinks, strict=True):
        assert relative_error(got, want) < TOLERANCE[torch.float64]


def test_the_cheaper_route_follows_the_arithmetic():
    assert cheaper_route(4096, 4096, 256, 256) == "tokens"
    assert cheaper_route(256, 256, 64, 64) == "tokens"
    assert cheaper_route(256, 256, 128, 128) == "weight"
    assert cheaper_route(32, 4096, 32, 128) == "weight"


@pytest.mark.parametrize("recompute", ["fast", "mem", "auto"])
def test_activation_checkpointing_changes_nothing(recompute):
    runs = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = llama().double()
        convert_(model, PoetConfig(method="single-step", block_size=8))
        if checkpointed:
            checkpoint_layers_(model, recompute=recompute)
        optimizer = POETX(model.train())
        for step in range(3):
            descend(loss_of(model, step, 0), optimizer)
        runs.append(loss_of(model, 9, 0).item())
    assert runs[0] == pytest.approx(runs[1], rel=1e-12)


def test_reentrant_checkpointing_feeds_once():
    layer, _ = attached(12, 8, 4, bias=True)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    once = layer.momentum.momentum_in.clone()
    layer.momentum.momentum_in.zero_()
    checkpoint(layer, x, use_reentrant=True).square().sum().backward()
    torch.testing.assert_close(layer.momentum.momentum_in, once)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_trains_the_same_without_recompiling(backend):
    torch._dynamo.reset()
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = llama()
        convert_(model, PoetConfig(method="single-step", block_size=8))
        optimizer = POETX(model.train())
        forward = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        losses = []
        for step in range(6):
            if compiled and step == 1:
                torch._dynamo.config.error_on_recompile = True
            loss = loss_of(forward, step, 0)
            descend(loss, optimizer)
            losses.append(loss.item())
        runs.append(losses)
        torch._dynamo.config.error_on_recompile = False
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    assert runs[0][-1] != runs[0][0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_model_and_momentum(dtype):
    torch.manual_seed(0)
    model = llama().bfloat16()
    convert_(model, PoetConfig(method="single-step", block_size=8, update="rotation", rotation_dtype=dtype))
    optimizer = POETX(model.train(), angle=0.02, lr=3e-3)
    start = spectrum(model)
    tokens = torch.randint(0, 50, (4, 8))
    losses = []
    for _ in range(60):
        loss = model(input_ids=tokens, labels=tokens).loss
        descend(loss, optimizer)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert {v.dtype for state in optimizer.state.values() for k, v in state.items() if "momentum" in k} == {
        getattr(torch, dtype)
    }
    drift = spectrum(model, start)
    assert max(layer.drift_median for layer in drift.values()) < 6e-3
    assert all(layer.norm_ratio == pytest.approx(1, abs=1e-3) for layer in drift.values())


def test_autocast_runs_in_its_dtype():
    layer, _ = attached(12, 8, 4, bias=True, dtype=torch.float32)
    x = torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    low = layer.momentum.momentum_in.clone()
    layer.momentum.momentum_in.zero_()
    layer(x).square().sum().backward()
    assert relative_error(low, layer.momentum.momentum_in) < 0.05
    assert layer.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("build", [mlp, llama, gpt2])
def test_conversion_keeps_the_function_and_the_checkpoint_is_the_plain_models(build):
    model = build().double().eval()
    keys = set(model.state_dict())
    x = torch.randn(3, 11, dtype=torch.float64) if build is mlp else torch.randint(0, 50, (2, 8))
    before = model(x) if build is mlp else model(x).logits
    report = convert_(model, CONFIG)
    assert set(model.state_dict()) == keys
    assert len(report.converted) > 1
    after = model(x) if build is mlp else model(x).logits
    assert relative_error(after, before) < 1e-12
    weights = {name: m.weight.data_ptr() for name, m in model.named_modules() if isinstance(m, SingleStepLinear)}
    to_dense_(model)
    dense = model(x) if build is mlp else model(x).logits
    assert relative_error(dense, before) < 1e-12
    if build is not gpt2:  # Conv1D holds the transpose
        assert weights == {name: model.get_submodule(name).weight.data_ptr() for name in weights}
    assert all(p.requires_grad for p in model.parameters())


def test_fresh_weights_are_poet_xs():
    models = [mlp(), mlp()]
    for model, method in zip(models, ("poet-x", "single-step"), strict=True):
        convert_(model, PoetConfig(method=method, block_size=4, init="normalized", init_scale=2.0))
        to_dense_(model)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        if p.ndim == 2:
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_frozen_layer_stays(when):
    model = mlp().double()
    convert_(model, CONFIG)
    first, second, *others = (m for m in model.modules() if isinstance(m, SingleStepLinear))
    if when == "before":
        first.requires_grad_(False)
    optimizer = POETX(model)
    if when == "after":
        first.requires_grad_(False)
    start = copy.deepcopy(model.state_dict())

    def moved():
        descend(loss_of(model, 0, 0), optimizer)
        names = {id(p): name for name, p in model.named_parameters()}
        layers = [[layer.weight, layer.bias] for layer in (first, second)]
        return [[not torch.equal(p, start[names[id(p)]]) for p in layer] for layer in layers]

    assert moved() == [[False, False], [True, True]]
    if when == "after":
        first.requires_grad_(True)
        assert moved() == [[True, True], [True, True]]
        assert not first.weight.requires_grad
    else:
        for layer in (second, *others):
            layer.requires_grad_(False)
        with pytest.raises(UserError, match="nothing would be rotated"):
            POETX(model)


def test_a_copy_belongs_to_no_optimizer():
    layer, _ = attached(12, 8, 4, bias=True)
    other = copy.deepcopy(layer)
    assert other.momentum is None
    assert layer.momentum is not None
    with pytest.raises(UserError, match=r"build poetx.POETX"):
        other(torch.randn(2, 8, dtype=torch.float64))
    assert other.eval()(torch.randn(2, 8, dtype=torch.float64)).shape == (2, 12)


def test_refusals():
    _, optimizer = attached(12, 8, 4, bias=True)
    with pytest.raises(UserError, match="save its state_dict"):
        copy.deepcopy(optimizer)
    model = mlp()
    convert_(model, CONFIG)
    with pytest.raises(UserError, match="already converted"):
        convert_(model, CONFIG)
    with pytest.raises(UserError, match=r"block_size=8, but \S+ was converted with 4"):
        POETX(model, block_size=8)
    with pytest.raises(UserError, match="no PoetLinear layer"):
        merge_every(torch.optim.SGD(model.parameters(), lr=0.1), model, steps=5)
    with pytest.raises(UserError, match="method='single-step' with weight_extra_bits"):
        PoetConfig(method="single-step", weight_extra_bits=True)
    with pytest.raises(UserError, match="partitions=2: of a version before; single steps have one partition on a side"):
        PoetConfig(method="single-step", partitions=2)
    saved = POETX(model).state_dict()
    other = mlp()
    convert_(other, PoetConfig(method="single-step", block_size=8))
    optimizer = POETX(other)
    before = {id(value) for state in optimizer.state.values() for value in state.values()}
    with pytest.raises(UserError, match="saved with other blocks"):
        optimizer.load_state_dict(saved)
    assert before == {id(value) for state in optimizer.state.values() for value in state.values()}


def trained_state(**settings):
    model, x = mlp(), torch.randn(5, 11)
    optimizer = POETX(model, block_size=4, **settings)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ({}, {"momentum_dtype": "bfloat16"}, "before is float32 [80] there, bfloat16 [80] here"),
        ({"momentum_dtype": "bfloat16", "nesterov": False}, {}, "momentum_in is bfloat16 [3, 4, 4] there, float32"),
    ],
)
def test_the_state_of_other_settings_is_refused(there, here, message):
    saved = trained_state(**there)
    optimizer = POETX(mlp(), block_size=4, **here)
    before = copy.deepcopy(optimizer.plain_state_dict()["state"])
    with pytest.raises(UserError, match=re.escape(message)):
        optimizer.load_state_dict(saved)
    torch.testing.assert_close(optimizer.plain_state_dict()["state"], before, rtol=0, atol=0)


def test_a_state_without_its_step_is_refused():
    saved = trained_state()
    del saved["state"][0]["step"]
    with pytest.raises(UserError, match="step is missing there, a number here"):
        POETX(mlp(), block_size=4).load_state_dict(saved)


def test_a_gradient_scaler_is_refused():
    layer, optimizer = attached(12, 8, 4, bias=True, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(layer(torch.randn(5, 8)).sum()).backward()
    with pytest.raises(UserError, match="gradient scaler"):
        scaler.step(optimizer)


def test_second_derivatives_are_refused_before_anything_is_fed():
    model = mlp().double()
    convert_(model, CONFIG)
    optimizer = POETX(model)
    loss = loss_of(model, 0, 0)
    with pytest.raises(UserError, match=r"^a converted layer has no second derivatives.*$"):
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], create_graph=True)
    momenta = [value for state in optimizer.state.values() for key, value in state.items() if "momentum" in key]
    assert momenta
    assert not any(value.any() for value in momenta)
