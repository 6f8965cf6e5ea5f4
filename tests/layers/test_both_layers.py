"""What the converted layers of both methods promise alike: freezing, dtypes, nested inputs, weights that are finite."""

import copy
import functools
import io
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from poetx import POETX, PoetConfig, PoetLinear, SingleStepLinear, UserError, convert_, merge_, param_groups, to_dense_

METHODS = pytest.mark.parametrize("method", ["poet-x", "single-step"])


def converted(method, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 10), nn.Linear(10, 10), nn.Linear(10, 6))
    convert_(model, PoetConfig(method=method, block_size=4, **settings))
    return model


def optimizer_of(model, method):
    if method == "single-step":
        return POETX(model)
    return torch.optim.SGD(param_groups(model, lr=0.1, poet_lr=0.1))


def moved(model, method):
    """Which of the two layers a step moves."""
    optimizer = optimizer_of(model, method)
    before = [layer.dense_weight().detach().clone() for layer in model[1:]]
    model(torch.arange(7)).square().sum().backward()
    optimizer.step()
    return [not torch.equal(layer.dense_weight(), was) for layer, was in zip(model[1:], before, strict=True)]


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assigned(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return model


def emptied(model):
    state = copy.deepcopy(model.state_dict())
    model.to_empty(device="cpu").load_state_dict(state)
    return model


def swapped(model):
    """Cast and loaded by exchanging tensors in place, as torch will do by default some day."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return emptied(model.double().float().float().to("cpu"))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


WAYS = [
    pickled,
    copy.deepcopy,
    assigned,
    emptied,
    swapped,
    lambda model: model.bfloat16().float(),
    lambda model: model.double(),
]


@METHODS
@pytest.mark.parametrize(
    "way", WAYS, ids=["pickled", "deepcopy", "assigned", "emptied", "swapped", "bfloat16", "double"]
)
def test_a_layer_is_frozen_and_trained_again_whatever_was_done_to_its_parameters(way, method):
    model = converted(method)
    model[1].requires_grad_(False)
    model = way(model)
    assert [layer.frozen for layer in model[1:]] == [True, False]
    assert moved(copy.deepcopy(model), method) == [False, True]
    model = way(model)
    model.requires_grad_(True)
    model[2].requires_grad_(False)
    assert moved(model, method) == [True, False]
    assert all(layer._parameters[layer.weight_name].grad is None for layer in model[1:])


@METHODS
def test_a_layer_that_is_frozen_is_frozen_as_a_dense_one(method):
    model = converted(method)
    model[2].requires_grad_(False)
    to_dense_(model)
    assert [layer.weight.requires_grad for layer in model[1:]] == [True, False]


def test_an_optimizer_whose_weight_was_replaced_is_not_fed_any_more():
    model = converted("single-step")
    optimizer = POETX(model)
    assigned(model)
    with pytest.raises(UserError, match=r"^1: nothing would train its weight; build poetx.POETX"):
        model(torch.arange(3))
    optimizer.close()


@METHODS
@pytest.mark.parametrize("cast", [nn.Module.half, lambda model: model.to(torch.float16)], ids=["half", "to"])
def test_float16_is_refused_before_any_module_changes(cast, method):
    model = converted(method)
    for victim in (model, copy.deepcopy(model), nn.ModuleList([model]), model[2]):
        before = {name: value.dtype for name, value in victim.state_dict().items()}
        with pytest.raises(UserError, match="float16 is not supported"):
            cast(victim)
        assert {name: value.dtype for name, value in victim.state_dict().items()} == before
    assert to_dense_(model).half()[0].weight.dtype == torch.float16


@METHODS
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_is_the_product_of_each_part(layout, method):
    layer = converted(method).eval()[2]
    parts = [torch.randn(length, 10) for length in (3, 1, 4)]
    with torch.no_grad():
        got = layer(torch.nested.nested_tensor(parts, layout=layout))
        assert got.layout == layout
        for y, x in zip(got.unbind(), parts, strict=True):
            torch.testing.assert_close(y, layer(x))


@METHODS
def test_the_padding_mask_of_a_transformer_encoder(method):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 20, batch_first=True), 2).eval()
    x, mask = torch.randn(3, 5, 12), torch.arange(5) >= torch.tensor([[5], [2], [4]])
    with torch.no_grad():
        want = encoder(x, src_key_padding_mask=mask)
        convert_(encoder, PoetConfig(method=method, block_size=4))
        got = encoder(x, src_key_padding_mask=mask)
    torch.testing.assert_close(got[~mask], want[~mask], rtol=1e-4, atol=1e-5)


@METHODS
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_weight_that_is_not_finite_is_not_converted(value, method):
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 6))
    with torch.no_grad():
        model[1].weight[5, 2] = value
    before = list(model)
    with pytest.raises(UserError, match=r"^1: inf or NaN in its weight"):
        convert_(model, PoetConfig(method=method, block_size=4))
    assert list(model) == before
    with pytest.raises(UserError, match=r"^there: inf or NaN in its weight"):
        type(converted(method)[1]).from_linear(model[1], config=PoetConfig(method=method, block_size=4), name="there")
    convert_(model, PoetConfig(method=method, block_size=4, init="normalized"))  # which draws a new one
    assert model[1].dense_weight().isfinite().all()


QUANTIZED = {"mode": "mem", "weight_format": "int8"}


@pytest.mark.parametrize("where", ["base_weight", "packed_weight.scale", "skew_in", "skew_out"])
def test_what_is_not_finite_is_not_merged(where):
    model = converted("poet-x", **(QUANTIZED if "packed" in where else {}))
    with torch.no_grad():
        model[1].skew_in.fill_(0.1)
        model[2].state_dict()[where].view(-1)[0] = math.nan
    before = copy.deepcopy(model.state_dict())
    for merge in (lambda: merge_(model), model[2].merge_):
        with pytest.raises(UserError, match=r"^2: inf or NaN in its weight or rotations"):
            merge()
        for name, value in model.state_dict().items():
            assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name
    with pytest.raises(UserError, match="inf or NaN"):
        model[1].load_dense_(torch.full((10, 10), math.inf))


@METHODS
def test_one_element_has_nothing_to_rotate(method):
    model = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 1), nn.Linear(1, 3))
    report = convert_(model, PoetConfig(method=method, block_size=4))
    assert (type(model[1]), len(report.converted)) == (nn.Linear, 2)
    assert str(report).splitlines()[1] == "  *.weight  1x1  x1: it has one element, which no rotation moves"
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(1, 1))
    rotated = POETX(plain).param_groups[0]["params"]
    assert [p.shape for p in rotated] == [(4, 4)]


WRITES = [
    nn.init.zeros_,
    nn.init.xavier_uniform_,
    lambda w: w.data.normal_(),
    lambda w: w.detach().T[1:].copy_(torch.ones(1)),
    lambda w: w.chunk(2)[0].fill_(0.0),
    lambda w: w.__setitem__(0, 1.0),
    lambda w: w.__imul__(2),
    lambda w: torch.mul(w, 2, out=w),
    lambda w: torch._foreach_zero_([w]),
    lambda w: setattr(w, "data", torch.zeros(6, 10)),
]


@pytest.mark.parametrize("write", WRITES, ids=range(len(WRITES)))
def test_a_computed_weight_is_read_only(write):
    layer = converted("poet-x")[2]
    with torch.no_grad(), pytest.raises(UserError, match=r"layer\.weight: it is computed .* layer\.load_dense_"):
        write(layer.weight)


def test_a_computed_weight_is_read_as_any_tensor():
    layer = converted("poet-x")[2]
    weight = layer.weight
    assert torch.equal(weight, layer.dense_weight())
    assert (weight.dtype, weight.shape) == (torch.float32, (6, 10))
    assert type(weight * 2) is type(weight.clone()) is type(weight.sum()) is torch.Tensor
    torch.zeros(6, 10).copy_(weight).add_(weight)
    (weight.clone().mul_(2)).square().sum().backward()
    assert layer.skew_in.grad is not None
    for value in (nn.Parameter(torch.zeros(6, 10)), torch.zeros(6, 10), None):
        with pytest.raises(UserError, match=r"^2: weight is computed; set it with layer.load_dense_\(weight\)"):
            layer.weight = value


def test_tracing():
    x = torch.arange(3)
    with pytest.raises(UserError, match="^1: torch.jit.trace sees no rotations; call poetx.to_dense_"):
        torch.jit.trace(converted("poet-x"), x)
    model = converted("single-step").eval()
    assert torch.equal(torch.jit.trace(model, x)(x + 1), model(x + 1))
    assert isinstance(converted("poet-x")[1], PoetLinear)


@METHODS
@pytest.mark.parametrize(
    "transform", [torch.func.vmap, torch.func.jacrev, lambda f: torch.func.grad(lambda x: f(x).sum())]
)
def test_transforms_of_torch_func_are_refused_in_one_line(transform, method):
    model = converted(method)
    optimizer = optimizer_of(model, method)
    with pytest.raises(UserError, match=r"torch\.func does not see through a converted layer; put x @ layer"):
        transform(model[1:])(torch.randn(3, 10))
    model[1:](torch.randn(3, 10)).sum().backward()
    optimizer.step()


@METHODS
def test_a_weight_that_wants_a_gradient_is_refused_where_it_would_get_none(method):
    model = converted(method)
    optimizer = optimizer_of(model, method)
    name = f"2.{model[2].weight_name}"
    given = {name: model.get_parameter(name).detach().clone()}
    model_of = functools.partial(torch.func.functional_call, model)
    assert model_of(given, torch.arange(3)).requires_grad
    given[name].requires_grad_()
    with pytest.raises(UserError, match=r"^2: a \w+ was put in its place that requires a gradient .*; detach\(\) it"):
        model_of(given, torch.arange(3))
    with torch.no_grad():
        assert torch.equal(model_of(given, torch.arange(3)), model(torch.arange(3)))
    assert optimizer.param_groups  # it is still there


def identity(layer, name):
    nn.utils.parametrize.register_parametrization(layer, name, nn.Identity())


NORMS = [(nn.utils, "weight_norm"), (nn.utils, "spectral_norm")]
NORMS += [(nn.utils.parametrizations, name) for name in ("weight_norm", "spectral_norm", "orthogonal")]
CHANGES = {
    "random pruning": lambda layer, name: prune.random_unstructured(layer, name, amount=0.3),
    "structured pruning": lambda layer, name: prune.ln_structured(layer, name, amount=0.3, n=2, dim=0),
    "parametrization": identity,
}


@pytest.mark.parametrize("name", ["weight", "base_weight", "skew_in", "skew_out"])
@pytest.mark.parametrize("change", CHANGES)
def test_pruning_and_parametrizations_are_refused_and_change_nothing(change, name):
    method = "single-step" if name == "weight" else "poet-x"
    model = converted(method)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=rf"^1: {name} cannot become a function of other parameters.*before poetx.conv"):
        CHANGES[change](model[1], name)
    assert model.state_dict().keys() == before.keys()
    assert moved(model, method) == [True, True]


def test_a_bias_is_pruned_as_ever():
    model = converted("single-step")
    prune.l1_unstructured(model[2], "bias", amount=2)
    assert moved(model, "single-step") == [True, True]
    assert (model[2].bias == 0).sum() == 2


@METHODS
@pytest.mark.parametrize("change", [getattr(home, name) for home, name in NORMS], ids=range(len(NORMS)))
def test_norms_are_refused_and_change_nothing(change, method):
    model = converted(method)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"weight.* cannot become a function of other parameters"):
        change(model[1])
    assert model.state_dict().keys() == before.keys()
    assert moved(model, method) == [True, True]


@METHODS
def test_scripts_and_traces_that_would_not_train_are_refused(method):
    model = converted(method)
    with pytest.raises(UserError, match=r"^1: torch.jit.script cannot read it; call poetx.to_dense_"):
        torch.jit.script(model)
    optimizer = optimizer_of(model, method)
    with pytest.raises(UserError, match=r"^1: torch.jit.trace (cannot train|sees no)"):
        torch.jit.trace(model.train(), torch.arange(3))
    with pytest.raises(UserError, match=r"^1: torch.export (cannot train|sees no)"):
        torch.export.export(model, (torch.arange(3),))
    if method == "single-step":  # an optimizer is there: it takes the way of training but for the trace
        assert torch.equal(torch.jit.trace(model.eval(), torch.arange(3))(torch.arange(3)), model(torch.arange(3)))
        exported = torch.export.export(model, (torch.arange(3),)).module()
        assert torch.equal(exported(torch.arange(3)), model(torch.arange(3)))
    assert optimizer.param_groups


def test_a_model_around_the_converted_one_is_told_that_it_may_be_cast_in_part():
    outer = nn.Sequential(nn.Linear(3, 3), converted("poet-x"))
    with pytest.raises(UserError, match=r"float16 is not supported.*A model around .* cast in part now: cast it back$"):
        outer.half()
    assert outer[0].weight.dtype == torch.float16  # torch goes from one module to the next


@pytest.mark.parametrize("kind", [PoetLinear, SingleStepLinear])
def test_layers_made_by_hand_under_one_name_are_said_to_be_the_same(kind, caplog):
    def build(*names):
        model = nn.Sequential(*(kind(8, 8, name=name) for name in names))
        POETX(model) if kind is SingleStepLinear else param_groups(model, lr=1e-3, poet_lr=1e-3)
        return model

    model = build("", "", "")
    assert torch.equal(model[0].dense_weight(), model[1].dense_weight())
    assert caplog.text.count("0 and 1 were both made as name='' with seed=0") == 1
    caplog.clear()
    model = build("a", "b")
    assert not torch.equal(model[0].dense_weight(), model[1].dense_weight())
    kept = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8)) for _ in range(2)))
    for part in kept:
        convert_(part, PoetConfig(block_size=4))
    param_groups(kept, lr=1e-3, poet_lr=1e-3)
    assert not caplog.text
