"""Settings of some layers: what they train, what is said of them, and patterns that mean nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from builders import function, gpt2, llama, small_config
from poetx.config import PoetConfig
from poetx.convert import convert_, to_dense_
from poetx.errors import UserError
from poetx.layers.walk import converted_layers
from poetx.merge import merge_
from poetx.optim.single_step.optimizer import POETX
from poetx.planner.estimate import _uniform
from poetx.recipe import load_recipe
from poetx.spectra import spectrum

MIXED = {"*attn*": {"update": "rotation"}, "mlp.down_proj": {"block_size": 8}}


def test_rotations_on_attention_and_free_maps_on_the_mlp() -> None:
    model = llama()
    config = PoetConfig(method="single-step", block_size=16, overrides=MIXED)
    assert PoetConfig.from_json(config.to_json()) == config
    report = convert_(model, config)
    notes = {layer.name.rpartition(".")[2]: (layer.note, layer.block_size_in) for layer in report.converted}
    assert notes["q_proj"] == ("update=rotation", 16)
    assert notes["down_proj"] == ("block_size=8", 8)
    assert notes["up_proj"] == ("", 16)
    start = spectrum(model)
    optimizer = POETX(model, 1e-3)
    ids = torch.randint(97, (2, 16))
    for _ in range(5):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, now in spectrum(model, start).items():
        assert (now.drift_max < 1e-4) == ("attn" in name), name


def test_a_format_and_a_mode_of_some_layers_keep_the_function_through_a_merge() -> None:
    model = gpt2()
    before = function(model, torch.float32)
    own = {"c_fc": {"weight_format": "int8", "mode": "mem", "group_size": 16}, "h.0.*": {"neumann_order": 7}}
    convert_(
        model, PoetConfig(block_size=16, overrides={f"transformer.{k}" if "." in k else k: v for k, v in own.items()})
    )
    layers: dict[str, Any] = dict(converted_layers(model))
    assert {n for n, layer in layers.items() if layer.packed_weight is not None} == {
        f"transformer.h.{i}.mlp.c_fc" for i in range(2)
    }
    assert {layer.order for n, layer in layers.items() if "h.0" in n} == {7}
    assert {layer.order for n, layer in layers.items() if "h.1" in n} == {3}
    assert (function(model, torch.float32) - before).norm() < 0.01 * before.norm()
    merge_(model)
    to_dense_(model)
    assert (function(model, torch.float32) - before).norm() < 0.01 * before.norm()


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        (
            "poet-x",
            {"*.mpl.*": {"block_size": 8}},
            "overrides: '*.mpl.*' matches nothing: no layer has such a name (the",
        ),
        ("poet-x", {"lm_head": {"block_size": 8}}, "overrides: 'lm_head' matches nothing: lm_head is not converted"),
        ("single-step", {"mlp": {"mode": "mem"}}, "matches nothing: model.layers.0.mlp is not converted"),
        ("oft", {"*mlp*": {"mode": "mem"}}, "overrides['*mlp*']: mode has no effect with method='oft'"),
        ("single-step", {"*mlp*": {"neumann_order": 7}}, "neumann_order has no effect with method='single-step'"),
        ("poet-x", {"*mlp*": {"group_size": 8}}, "group_size has no effect without a weight_format"),
        (
            "poet-x",
            {"*mlp*": {"block_size": 1}},
            "overrides['*mlp*']: block_size=1: must be a whole number of at least",
        ),
        ("poet-x", {"*mlp*": {"seed": 1}}, "seed: is the same for all layers"),
        ("poet-x", {"*mlp*": {}}, "must be {setting: value}"),
        ("poet-x", "mlp", "overrides='mlp': must be {pattern: {setting: value}}"),
    ],
)
def test_what_means_nothing_is_refused_in_one_line_and_changes_nothing(
    method: Any, overrides: Any, message: str
) -> None:
    model = llama()
    with pytest.raises(UserError, match=re.escape(message)) as error:
        convert_(model, PoetConfig(method=method, overrides=overrides))
    assert "\n" not in str(error.value)
    assert not list(converted_layers(model))


def test_a_plan_extrapolates_where_all_decoder_layers_are_alike_only() -> None:
    config = small_config(layers=6)

    def alike(overrides: str) -> bool:
        settings = ["train.dtype=float32", "poet.block_size=16", f"poet.overrides={overrides}"]
        return _uniform(config, load_recipe("demo", settings, text=False))

    assert alike('{"*mlp*": {block_size: 32}}')
    assert not alike('{"*.layers.5.*": {block_size: 64}}')
