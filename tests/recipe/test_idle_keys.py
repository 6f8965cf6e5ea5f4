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


def _file(tmp_path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    sizes = "model: {hidden_size: 32, intermediate_size: 64, num_layers: 1, num_heads: 2}\n"
    path.write_text(f"{sizes}data: {{train: builtin, vocab_size: 300, seq_len: 16}}\n{text}")
    return str(path)


def test_a_method_keeps_what_the_file_says_of_it(tmp_path):
    assert load_recipe(_file(tmp_path, "method: lora\nlora: {rank: 3}\n")).lora.rank == 3
    assert load_recipe(_file(tmp_path, "poet: null\nlora: {rank: 3}\n"), ["method=lora"]).lora.rank == 3


@pytest.mark.parametrize("method", ["adamw", "mem", "single-step"])
def test_a_method_given_beside_the_files_takes_its_place_whole(method, tmp_path):
    train = load_recipe(_file(tmp_path, "method: adamw-mixed\n"), [f"method={method}"]).train
    assert (train.autocast, train.dtype) == (False, "auto")
    assert load_recipe(_file(tmp_path, "method: adamw-mixed\n")).train.autocast is True
    with pytest.raises(UserError, match="method=meem: no such method"):
        load_recipe(_file(tmp_path, "method: meem\n"), [f"method={method}"])


def test_a_file_with_every_section_is_still_one_that_somebody_wrote(tmp_path):
    text = "run_dir: runs/x\npoet: null\noptimizer: {lr: 1.0e-3}\ntrain: {steps: 3, spectrum_every: 2}\n"
    with pytest.raises(UserError, match="spectrum_every"):
        load_recipe(_file(tmp_path, text))
