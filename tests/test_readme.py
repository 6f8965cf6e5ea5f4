"""The README keeps its word: every snippet and every command in it runs, on a small model and small text."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import poetx
from builders import llama
from poetx.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    poetx ")]
TARGETS = re.findall(r"^    make (\w+)", README, re.M)
#: What makes a command small; everything else in it stays as it is written.
SIZES = ("model.hidden_size=32", "model.intermediate_size=48", "model.num_layers=1", "model.num_heads=2")
SMALL = (
    *SIZES,
    *("train.batch_size=2", "train.eval_every=2", "train.eval_windows=2", "train.device=cpu"),
    *("data.train=corpus.jsonl", "data.seq_len=16", "data.vocab_size=400", "optimizer.warmup_steps=0"),
)
MINE = """
model: {hidden_size: 32, intermediate_size: 48, num_layers: 1, num_heads: 2}
data: {train: corpus.jsonl, validation_fraction: 0.25}
poet: {block_size: 16, init: normalized}
"""


def test_no_number_is_left_to_fill_in() -> None:
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    assert re.findall(r"\{\w*\}|TODO|TBD|XXX", prose) == []


@pytest.fixture
def place(tmp_path: Path, corpus: Path) -> Path:
    """A directory with what the README calls the reader's own: a model, a text and a recipe."""
    directory = tmp_path / "reader"
    directory.mkdir()
    model: LlamaForCausalLM = llama(vocab_size=400)
    model.save_pretrained(directory / "path/to/model")
    (directory / "mine.yaml").write_text(MINE, encoding="utf-8")
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())]
    (directory / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return directory


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs(number: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "Trainer" in SNIPPETS[number]:
        pytest.importorskip("accelerate")
    monkeypatch.chdir(place)
    code = SNIPPETS[number].replace("max_steps=1000", "max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True")
    tokens = torch.randint(0, 400, (4, 16), generator=torch.Generator().manual_seed(0))
    dataset = [{"input_ids": row, "labels": row} for row in tokens]
    before = llama(vocab_size=400).train()
    start = {name: value.clone() for name, value in before.state_dict().items()}
    names = {"torch": torch, "poetx": poetx, "model": before, "dataset": dataset}
    names["loader"] = [{"input_ids": tokens, "labels": tokens}] * 3
    exec(compile(code, f"README.md, snippet {number + 1}", "exec"), names)
    if "out" in code:
        exported = LlamaForCausalLM.from_pretrained(place / "out").state_dict()
        assert set(exported) == set(start)
        assert all(not torch.equal(exported[name], start[name]) for name in start if "proj" in name)


def test_the_commands_run_one_after_the_other(place: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(place)
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        if words[0] == "train" and "--resume" not in words:
            words += [*(word for word in SMALL if word.split("=")[0] not in command), "train.steps=2"]
        if words[0] == "compare":
            words += [*(word for word in SMALL if "eval_every" not in word), "--steps", "2"]
        if words[0] == "memory":
            words[1:2] = ["demo", *SIZES]  # a large model takes longer, and nothing else
        if words[0] == "generate":
            words += ["--max-new-tokens", "2"]
        assert main(words) == 0, f"{command}\n{capsys.readouterr()}"
    assert (place / "out/config.json").is_file()


def test_what_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert TARGETS
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in TARGETS)
    for page in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / page).exists(), page
