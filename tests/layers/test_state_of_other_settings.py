"""What a state dict says about the settings it was trained with, and states from before it did."""

import copy
import pickle

import pytest
import torch

import poetx
from poetx import PoetConfig, PoetLinear, UserError
from poetx.layers.single_step import SingleStepLinear

INT8 = {"mode": "mem", "weight_format": "int8", "group_size": 5}


def make(dtype=torch.float32, **config):
    settings = {"block_size": 4, "init": "normalized"} | config
    return PoetLinear(10, 12, config=PoetConfig(**settings), name="layer", dtype=dtype)


@pytest.mark.parametrize(
    ("there", "here", "words"),
    [
        ({"neumann_order": 7}, {}, "neumann_order=7, the layer has 3"),
        ({}, {"neumann_order": "exact"}, "neumann_order=3, the layer has 'exact'"),
        ({"seed": 4}, {"seed": 5}, "seed=4, the layer has 5"),
        ({"seed": -1, **INT8}, INT8, "seed=9223372036854775807, the layer has 0"),
    ],
)
def test_a_state_of_other_settings_is_refused(there, here, words):
    state, layer = make(**there).state_dict(), make(**here)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(UserError, match=f"^layer: the state was trained with {words}; convert"):
        layer.load_state_dict(state)
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in before.items())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.double().float()):
        assert str(twin.load_state_dict(layer.state_dict())) == "<All keys matched successfully>"


@pytest.mark.parametrize(("there", "here"), [("random", "contiguous"), ("contiguous", "random")])
def test_permuted_weights_are_not_taken_for_those_of_neighbours(there, here):
    other, layer = make(permutation=there), make(permutation=here)
    x = torch.randn(3, 10)
    with pytest.raises(UserError, match=f"^layer: the state is of permutation='{there}', the layer of '{here}'; conv"):
        layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), make(permutation=here)(x))


@pytest.mark.parametrize("beside", [False, True], ids=["own", "with the plain weight"])
@pytest.mark.parametrize(
    ("there", "here", "words"),
    [
        ({}, {"mode": "mem", "weight_format": "nf4"}, "weight_format=None, the layer of 'nf4'"),
        (INT8, {}, "weight_format='int8', the layer of None"),
        (INT8, {"mode": "mem", "weight_format": "fp8", "group_size": 5}, "weight_format='int8', the layer of 'fp8'"),
    ],
)
def test_a_state_of_another_form_of_weight_is_refused_whole(there, here, words, beside):
    other, layer = make(**there), make(**here)
    state = other.state_dict() | ({"weight": other.plain_weight()} if beside else {})
    before = layer.dense_weight()
    for strict in (True, False):
        with pytest.raises(UserError, match=f"the state is of {words}; convert"):
            layer.load_state_dict(state, strict=strict)
    assert torch.equal(layer.dense_weight(), before)


def test_rotations_are_not_loaded_into_a_single_step_layer_without_their_weight():
    other, config = make(), PoetConfig(method="single-step", block_size=4, init="normalized")
    layer = SingleStepLinear(10, 12, config=config, name="layer")
    with pytest.raises(UserError, match=r"layer: the state is of method='poet-x' and holds no plain weight"):
        layer.load_state_dict(other.state_dict(), strict=False)
    layer.load_state_dict(other.state_dict() | {"weight": other.plain_weight()}, strict=False)
    assert torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize("extra_bits", [False, True])
@pytest.mark.parametrize("weight_format", ["int4", "fp8", "bipolar-int3"])
def test_groups_of_another_size_are_refused_where_there_are_as_many(weight_format, extra_bits):
    """10 columns make two groups of 5 to 9."""
    settings = {"mode": "mem", "weight_format": weight_format, "weight_extra_bits": extra_bits}
    layer = make(**settings, group_size=8)
    want = layer.dense_weight()
    for group_size in (5, 9):
        with pytest.raises(UserError, match=f"the state is of group_size={group_size}, the layer of 8; convert"):
            layer.load_state_dict(make(**settings, group_size=group_size).state_dict())
    layer.load_state_dict(make(**settings, group_size=8, seed=0).state_dict())
    assert torch.equal(layer.dense_weight(), want)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("dtype", "settings"), [(torch.bfloat16, {}), (torch.float32, INT8)], ids=["bf16", "int8"])
def test_an_older_state_without_settings_or_extra_bits_loads_and_merges(dtype, settings, assign):
    old = make(dtype, **settings)
    newer = ("trained_with", "weight_format", "group_size")
    state = {name: value for name, value in old.state_dict().items() if not name.endswith(newer)}
    given = set(state)
    layer = make(dtype, **settings, weight_extra_bits=True)
    assert str(layer.load_state_dict(copy.deepcopy(state), assign=assign)) == "<All keys matched successfully>"
    assert set(state) == given
    x = torch.randn(3, 10).to(dtype)
    assert torch.equal(layer(x), old(x))
    precise, plain = layer.frozen_weight.precise(), old.frozen_weight.precise().float()
    assert (precise - plain).abs().max() <= 1e-4 * plain.abs().max()
    layer.merge_()
    assert (layer(x).float() - old(x).float()).norm() / old(x).float().norm() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, INT8, {"weight_extra_bits": True}], ids=str)
def test_a_matrix_of_zeros_merges_without_nan(settings, dtype):
    layer = make(dtype, **settings)
    layer.load_dense_(torch.zeros(12, 10))
    with torch.no_grad():
        layer.skew_in.fill_(0.1)
    stats = layer.merge_()
    assert float(stats.norm_ratio) == pytest.approx(1, abs=0.01)
    assert layer.dense_weight().isfinite().all()
    assert layer.dense_weight().abs().max() < 1e-6


@pytest.mark.parametrize("keep", ["parameters", "base_weight", "perm", "skew"])
@pytest.mark.parametrize("settings", [{}, {"mode": "mem", "weight_format": "int4"}])
def test_a_part_of_a_layers_state_is_refused_whatever_strict_says(keep, settings):
    """Such as the parameters alone: the permutations, which are buffers, would be those of another merge."""
    model = torch.nn.Sequential(torch.nn.Linear(10, 12), torch.nn.Linear(12, 6))
    poetx.convert_(model, PoetConfig(block_size=4, **settings))
    names = dict(model.named_parameters()) if keep == "parameters" else model.state_dict()
    part = {key: value for key, value in model.state_dict().items() if key in names}
    if keep != "parameters":
        part = {key: value for key, value in part.items() if keep in key or "codes" in key or "bias" in key}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"^0: the state has its .*, but not its .*: the tensors of a layer belong"):
        model.load_state_dict(part, strict=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.load_state_dict({"1.bias": torch.ones(6)}, strict=False)
