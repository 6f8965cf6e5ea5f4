"""What a user has hung on a layer stays with it, or is named."""

import types

import pytest
import torch
from torch import nn

from builders import gpt2, mlp
from poetx import PoetConfig, convert_, to_dense_
from poetx.layers.walk import converted_layers

FORMS = {
    "poet-x": {},
    "int8": {"mode": "mem", "weight_format": "int8", "group_size": 8},
    "single-step": {"method": "single-step"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("build", "place"), [(mlp, "0"), (gpt2, "transformer.h.0.attn.c_proj")])
def test_attributes_come_along_and_back_and_what_cannot_is_named(build, place, form):
    model = build()
    plain = model.get_submodule(place)
    plain.RESIDUAL_SCALE, plain.tag, plain.weight._no_weight_decay = 0.5, ["a"], True
    plain.name, plain.neighbour = "mine", types.MethodType(lambda self: self, plain)
    tag = plain.tag
    for other, module in model.named_modules():
        if other != place:
            module.name = other  # what ours would be called anyway
    report = convert_(model, PoetConfig(block_size=4, **FORMS[form]))
    layer = model.get_submodule(place)
    assert layer.RESIDUAL_SCALE == 0.5
    assert layer.tag is tag
    assert layer.name == place
    kept = form != "int8"  # where there is no weight to hang it on
    note = next(one.note for one in report.converted if one.name == place)
    lost = "name, neighbour" if kept else "name, neighbour, weight._no_weight_decay"
    assert f"without its {lost}, which" in note
    assert f"without its {lost}" in str(report)
    assert sum("without its" in one.note for one in report.converted) == 1
    if kept:
        assert getattr(layer, layer.weight_name)._no_weight_decay
    layer.later = 7
    to_dense_(model)
    dense = model.get_submodule(place)
    assert dense.RESIDUAL_SCALE == 0.5
    assert dense.later == 7
    assert getattr(dense.weight, "_no_weight_decay", False) == kept
    assert vars(dense).keys() == vars(type(plain)(4, 4)).keys() | {"RESIDUAL_SCALE", "tag", "later"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: layer.weight.register_hook(lambda grad: grad), "it has hooks"),
        (lambda layer: layer.weight.register_post_accumulate_grad_hook(lambda p: None), "it has hooks"),
        (lambda layer: layer.register_load_state_dict_post_hook(lambda *_: None), "it has hooks"),
        (lambda layer: layer.register_state_dict_pre_hook(lambda *_: None), "it has hooks"),
        (lambda layer: layer.register_buffer("mask", torch.ones(2)), "parameters, buffers or modules beside"),
        (lambda layer: layer.register_parameter("gain", nn.Parameter(torch.ones(2))), "buffers or modules beside"),
        (lambda layer: layer.add_module("adapter", nn.LayerNorm(2)), "parameters, buffers or modules beside"),
    ],
)
def test_a_layer_with_what_conversion_would_lose_is_left_alone_with_the_reason(change, reason):
    model = mlp()
    change(model[0])
    report = convert_(model, PoetConfig(block_size=4))
    assert type(model[0]) is nn.Linear
    assert reason in next(item.reason for item in report.skipped if item.name == "0.weight")
    assert len(list(converted_layers(model))) == len(report.converted) > 0
