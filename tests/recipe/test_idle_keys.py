"""Keys that nothing reads, and sections on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from poetx.errors import UserError
from poetx.recipe import load_recipe


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("data", "tokenizer: x, vocab_size: 500", r"^data\.vocab_size=500: has no effect with the tokenizer of data"),
        ("data", "validation: x, validation_fraction: 0.2", r"^data\.validation_fraction=0\.2: has no effect with"),
        ("optimizer", "clip: null, clip_ramp_steps: 4", r"^optimizer\.clip_ramp_steps=4: has no effect without poet.m"),
        ("optimizer", "dense_optimizer: sgd, eps: 1.0e-4", r"^optimizer\.eps=0\.0001: has no effect with optimizer\.d"),
        (
            "optimizer",
            "clip_ramp_steps: 0, clip_ramp_start: 0.3",
            r"^optimizer\.clip_ramp_start=0\.3: has no effect with",
        ),
        (
            "poet",
            "residual_modules: [out]",
            r"^poet\.residual_modules=\['out'\]: has no effect without poet\.residual_s",
        ),
        ("train", "spectrum_every: 5", r"^train\.spectrum_every=5: has no effect where no layer"),
    ],
)
def test_a_key_without_effect_in_a_file_is_refused_and_kept_in_what_was_written_out(
    section: str, key: str, message: str, tmp_path: Path
) -> None:
    values = {"model": {"shape": "llama-60m"}, "data": {"train": "builtin"}}
    values.setdefault(section, {}).update(yaml.safe_load(f"{{{key}}}"))
    if section == "train":
        values["poet"] = None
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_recipe(str(path))
    values = load_recipe("demo").to_dict()
    values[section].update(yaml.safe_load(f"{{{key}}}"))
    if section == "train":
        values = load_recipe("demo", ["poet=null"]).to_dict() | {"train": values["train"]}
    for place in (path, tmp_path / "recipe.yaml"):
        place.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert load_recipe(str(path)).to_dict()[section] == load_recipe(str(tmp_path)).to_dict()[section]


@pytest.mark.parametrize(
    ("override", "section", "changed"),
    [
        ("train={seed: 2, steps: 9}", "train", {"seed": 2, "steps": 9}),
        ("data={seq_len: 64}", "data", {"seq_len": 64}),
        ("optimizer={lr: 0.5}", "optimizer", {"lr": 0.5}),
        ("poet={mode: mem}", "poet", {"mode": "mem"}),
        ("poet={}", "poet", {}),
        ("model={num_layers: 2}", "model", {"num_layers": 2}),
    ],
)
def test_a_section_given_on_the_command_line_changes_its_keys_only(override: str, section: str, changed: dict) -> None:
    before = load_recipe("demo").to_dict()[section] | changed
    if section == "train":
        assert load_recipe("demo", [override]).poet.config.seed == 2  # type: ignore[union-attr]
    assert load_recipe("demo", [override]).to_dict()[section] == before
