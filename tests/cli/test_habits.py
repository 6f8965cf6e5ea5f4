"""What people type without reading: short options, --dry-run, names of recipes and keys, a conversation."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import yaml

from poetx.cli import main
from poetx.cli.recipes import complete_recipe, complete_setting
from poetx.planner import preview
from poetx.recipe import builtin_recipes, load_recipe, with_method
from poetx.recipe.sections import every_key

RECIPE = """
name: small
model: {hidden_size: 16, intermediate_size: 24, num_layers: 2, num_heads: 2}
data: {vocab_size: 300, seq_len: 16, validation_fraction: 0.2}
poet: {block_size: 8, init: normalized, merge_every: 2}
train: {steps: 2, batch_size: 4, eval_every: 2, eval_windows: 2, device: cpu, export: false}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text("".join(f"{n} sheep jump over a fence\n" for n in range(2000)))
    chats = ({"prompt": f"count to {n}", "completion": " ".join(map(str, range(n)))} for n in range(1, 60))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return tmp_path


def out_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 0
    return capsys.readouterr().out


def test_short_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert out_of(capsys, "-V") == out_of(capsys, "--version")
    assert out_of(capsys, "memory", "-h") == out_of(capsys, "memory", "--help")


def test_help_of_train_names_every_recipe_and_key(capsys: pytest.CaptureFixture[str]) -> None:
    words = out_of(capsys, "train", "--help").replace(",", " ").split()
    assert set(builtin_recipes()) <= set(words)
    assert {key for keys in every_key().values() for key in keys} <= set(words)


@pytest.mark.parametrize("name", builtin_recipes())
def test_a_printed_recipe_is_the_recipe(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert name in out_of(capsys, "recipes")
    text = out_of(capsys, "recipes", name)
    assert "name" not in yaml.safe_load(text)  # else two copies would train in one place
    (tmp_path / f"{name}.yaml").write_text(text)
    given = ["data.train=builtin", *(["model.pretrained=x"] if name == "sft" else [])]
    assert load_recipe(str(tmp_path / f"{name}.yaml"), given) == load_recipe(name, given)


def test_a_recipe_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "lama-8b"]) == 2
    assert "did you mean 'llama-8b'?" in capsys.readouterr().err


def test_shells_complete_recipes_and_keys() -> None:
    assert complete_recipe("demo") == ["demo", "demo-single-step"]
    assert complete_setting("train.step") == ["train.steps="]
    assert "method=muon" in complete_setting("method=mu")
    environment = {"_POETX_COMPLETE": "complete_bash", "COMP_WORDS": "poetx train dem", "COMP_CWORD": "2"}
    code = "import sys; sys.argv[0] = 'poetx'; from poetx.cli import main; sys.exit(main())"
    path = {"PYTHONPATH": ":".join(sys.path)}
    told = subprocess.run([sys.executable, "-c", code], env=environment | path, capture_output=True, text=True)
    assert told.stdout.split() == ["demo", "demo-single-step"]


def test_ctrl_c_while_the_command_is_imported_is_one_word() -> None:
    code = """
import builtins, sys
real = builtins.__import__
def interrupted(name, *rest, **more):
    if name == "typer":
        raise KeyboardInterrupt
    return real(name, *rest, **more)
builtins.__import__ = interrupted
sys.argv[1:] = ["env"]
import runpy
runpy.run_module("poetx", run_name="__main__")
"""
    path = {"PYTHONPATH": ":".join(sys.path)}
    told = subprocess.run([sys.executable, "-c", code], env=os.environ | path, capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (130, "interrupted\n")


def test_a_key_without_its_section_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, meant in (("steps=3", "train.steps"), ("block_size=4", "poet.block_size"), ("shape=x", "model.shape")):
        assert main(["train", "small.yaml", "data.train=text.txt", given]) == 2
        assert f"did you mean '{meant}'?" in capsys.readouterr().err


def test_a_dry_run_tells_what_the_run_does_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(place.rglob("*"))
    arguments = ["train", "small.yaml", "data.train=text.txt", "run_dir=runs/a"]
    told = out_of(capsys, *arguments, "--dry-run")
    assert sorted(place.rglob("*")) == before
    for fact in ("not tokenized yet", "128: 2 steps of 4 x 16", "GiB planned", "model.layers.*.self_attn.q_proj"):
        assert fact in told
    run = out_of(capsys, *arguments)
    assert "14 layers converted" in run
    assert "converted 14 layers" in told
    assert told.count("parameters train") == 1
    assert out_of(capsys, *arguments, "method=adamw", "--dry-run", "--overwrite").count("parameters train") == 1
    assert told.split("of ")[1].split("M parameters train")[0] in run
    again = out_of(capsys, *arguments, "--dry-run", "--overwrite")
    assert "held out" in again
    assert "an earlier run there would be deleted" in again
    assert (place / "runs/a/checkpoints").is_dir()
    assert main([*arguments, "--dry-run"]) == 2
    assert "already has checkpoints" in capsys.readouterr().err
    assert main([*arguments, "--dry-run", "--resume"]) == 2
    assert "leave --resume out" in capsys.readouterr().err


def test_a_dry_run_says_how_long_products_take_at_least(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "measure_products", lambda device: 1e3)
    recipe = load_recipe("small.yaml", ["data.train=text.txt", "train.dtype=float32"])
    model = preview.meta_model(preview.model_config(recipe, vocab_size=300), recipe)
    weights = sum(p.numel() for name, p in model.named_parameters() if "proj" in name or "lm_head" in name)
    for asked, ranks, operations in (
        (recipe, 1, 4),
        (recipe, 2, 2),
        (with_method(recipe, "adamw"), 1, 6),
        (recipe.with_keys({"model.gradient_checkpointing": True}), 1, 6),
    ):
        told = preview._time(asked, torch.device("cpu"), ranks)
        least = timedelta(seconds=round(operations * weights * 2 * 4 * 16 / 1e3))
        assert told == f"at least {least}, by large products alone at the 1e-09 TFLOP/s measured here"


def test_a_sharded_recipe_in_one_process_says_that_nothing_is_sharded(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = out_of(capsys, "train", "small.yaml", "data.train=text.txt", "run_dir=runs/a", "parallel=fsdp")
    assert "parallel=fsdp: one process, so nothing is sharded; torchrun" in told


def test_a_dry_run_refuses_what_the_run_refuses(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, said in (
        ("data.train=nowhere.txt", "no such file"),
        ("poet.target_modules=[porj]", "porj"),
        ("method=nothing", "no such method"),
        ("train.device=cuda:77", "train.device=cuda:77"),
        ("model.offload=frozen", "model.offload=frozen: the device is the CPU; leave it out"),
    ):
        assert main(["train", "small.yaml", "data.train=text.txt", given, "--dry-run"]) == 2
        assert said in capsys.readouterr().err
    assert "nothing was written" in out_of(
        capsys, "train", "small.yaml", "data.train=text.txt", "poet=null", "--dry-run"
    )


def test_a_conversation_goes_on_and_begins_anew(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from poetx.runs import generate

    out_of(capsys, "train", "small.yaml", "data.train=chats.jsonl", "data.seq_len=64", "run_dir=runs/chat")
    prompts: list[str] = []
    real = generate.generate_text

    def spy(loaded: object, prompt: str, **options: object) -> str:
        prompts.append(prompt)
        return real(loaded, prompt, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(generate, "generate_text", spy)
    monkeypatch.setattr(sys, "stdin", io.StringIO("count to 4\n\nand on\n/new\ncount to 2"))
    told = out_of(capsys, "chat", "runs/chat", "--max-new-tokens", "3", "--system", "be brief")
    first, second, third = prompts
    assert first == "### system\nbe brief\n### user\ncount to 4\n### assistant\n"
    assert second.startswith(first)
    assert second.endswith("\n### user\nand on\n### assistant\n")
    assert third == first.replace("4", "2")
    assert told.count("\n") >= 3


def test_a_model_of_plain_text_does_not_chat(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out_of(capsys, "train", "small.yaml", "data.train=text.txt", "run_dir=runs/plain")
    assert main(["chat", "runs/plain"]) == 2
    assert "use poetx generate runs/plain" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "memory", "data x y", "bench step", "compare"])
def test_a_setting_written_as_an_option_is_told_how_to_be_written(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "--model.offload=5"]) == 2
    error = capsys.readouterr().err
    assert error == "error: --model.offload: no such option; settings of the recipe are KEY=VALUE (data.seq_len=512)\n"


def test_settings_that_one_step_does_not_read_are_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "step", "small.yaml", "--repeats", "1", "--methods", "fast", "poet.seed=1", "data.seq_len=8"]
    assert main([*words, "train.checkpoint_every=3", "data.validation_fraction=0.4"]) == 0
    assert "note: no effect on one step: train.checkpoint_every, data.validation_fraction\n" in capsys.readouterr().err
    assert main([*words, "--out", "."]) == 2
    assert capsys.readouterr().err == "error: --out=.: is a directory; name a file in it\n"


def test_a_question_that_is_no_text_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of(capsys, "train", "small.yaml", "data.train=chats.jsonl", "data.seq_len=64", "run_dir=runs/chat")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("où?".encode("latin-1")), encoding="utf-8"))
    assert main(["chat", "runs/chat"]) == 2
    assert re.fullmatch(r"error: standard input: not UTF-8 text \(.*\); convert it first\n", capsys.readouterr().err)
