"""One recipe by several methods: a setting is taken where one of them reads it, said for the others."""

from __future__ import annotations

from typing import Any

import pytest

from poetx.errors import UserError
from poetx.recipe import load_recipe, with_method
from poetx.recipe.several import load_methods


def test_every_word_of_a_comparison_is_known_and_other_words_mean_the_same(caplog: Any) -> None:
    names = ["adamw", "muon", "scale", "apollo-mini", "galore", "lora", "oft", "poet-x", "single-step"]
    names += ["poet", "lomo", "poet-x-mem", "adamw8bit"]
    recipes = load_methods("demo", [], names)
    assert list(recipes) == names
    twins = load_methods("demo", [], ["fast", "mem", "adamw-8bit"])
    assert [recipes[name] for name in ("poet-x", "poet-x-mem", "adamw8bit")] == list(twins.values())
    own = {"*mlp*": {"update": "free", "block_size": 16}}
    mixed = load_recipe("demo-single-step", [f"poet.overrides={own}"])
    assert with_method(mixed, "fast").poet.overrides == {"*mlp*": {"block_size": 16}}
    assert with_method(mixed, "single-step").poet.overrides == own
    assert with_method(mixed, "single-step-free").poet.overrides is None
    assert not caplog.text


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
