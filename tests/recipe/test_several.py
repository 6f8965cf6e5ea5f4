"""One recipe by several methods: a setting is taken where one of them reads it, said for the others."""

from __future__ import annotations

from typing import Any

import pytest

from poetx.errors import UserError
from poetx.recipe.several import load_methods


@pytest.mark.parametrize(
    ("setting", "methods", "has"),
    [
        ("poet={block_size: 16, group_size: 32}", "adamw,nf4", {"nf4": ("poet", "group_size", 32)}),
        ("lora.rank=3", "mem,lora", {"lora": ("lora", "rank", 3)}),
        ("poet.block_size=16", "muon,fast", {"fast": ("poet", "block_size", 16)}),
        ("optimizer.name=sgd", "mem,adamw", {"mem": ("optimizer", "name", "sgd")}),
        ("train.spectrum_every=5", "adamw,mem", {"mem": ("train", "spectrum_every", 5)}),
        ("model={gradient_checkpointing: true, recompute: mem}", "adamw,mem", {"mem": ("model", "recompute", "mem")}),
    ],
)
def test_a_setting_reaches_the_methods_that_read_it(setting: str, methods: str, has: Any, caplog: Any) -> None:
    names = methods.split(",")
    recipes = load_methods("demo", [setting], names)
    for name, (section, key, value) in has.items():
        assert getattr(getattr(recipes[name], section), key) == value
    without = next(name for name in names if name not in has)
    assert f"has no effect with {without}" in caplog.text
    with pytest.raises(UserError, match=rf"has no effect with any of {without}; leave it out"):
        load_methods("demo", [setting], [without])
