"""README and pages keep their word: every snippet and every command in them runs, on a small model and small text."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

import poetx
from builders import llama
from poetx.cli import main
from poetx.recipe import load_recipe
from poetx.recipe.sections import every_key

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
TARGETS = re.findall(r"^    make (\w+)", "\n".join((README, *PAGES.values())), re.M)
NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"


def commands(text: str) -> list[str]:
    """The commands of a page that are meant to be typed as they are, but for what is the reader's own."""
    lines = re.findall(r"^(?:    )?(poetx (?:[^\n\\]|\\\n)*)", text, re.M)
    found = [line.replace("\\\n", " ").split(" #")[0].strip() for line in lines]
    return [command for command in found if not re.search(r"RECIPE|SRC|…", command)]


#: The README's in their order, then what only the pages have.
COMMANDS = commands(README)
OTHERS = {
    name: own
    for name, text in PAGES.items()
    if (own := [c for c in commands(text) if c not in COMMANDS and not c.startswith(("poetx memory", "poetx compare"))])
}
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


def test_the_page_on_training_has_every_key() -> None:
    page = PAGES["training.md"]
    missing = [f"{section}.{key}" for section, keys in every_key().items() for key in keys if not written(key, page)]
    assert missing == []


def written(key: str, page: str) -> bool:
    return bool(re.search(rf"\b{key}\b", page))


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
    chat = [{"prompt": f"What is {n}?", "completion": f"{n} is {n}, not {n + 1}."} for n in range(40)]
    (directory / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chat))
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


@pytest.mark.parametrize(
    ("name", "code"),
    [(name, code) for name, text in PAGES.items() for code in re.findall(r"```python\n(.*?)```", text, re.S)],
)
def test_a_snippet_of_a_page_runs(name: str, code: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    model, tokens = llama(vocab_size=400), torch.randint(0, 400, (2, 16))
    names = {"torch": torch, "poetx": poetx, "model": model, "batch": {"input_ids": tokens, "labels": tokens}}
    names["optimizer"] = torch.optim.AdamW(model.parameters())
    if '"cuda"' in code and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.setattr(
        "poetx.planner.largest_batch", lambda *_: SimpleNamespace(batch_size=1)
    )  # minutes; tested apart
    for large, small in {"llama-8b": "mine.yaml", "llama-1b": "mine.yaml", "seq_len=2048": "seq_len=16"}.items():
        code = code.replace(large, small)
    exec(compile(code, name, "exec"), names)


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few steps; its own assertions are about the spectrum and the saved model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    cells = [
        "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        code = cell.replace("STEPS = 150", "STEPS = 12").replace("size=64)", "size=4)")
        exec(compile(code, f"cell {number}", "exec"), names)
    assert list(names["curves"]) == ["AdamW", "POET-X", "single step"]  # type: ignore[call-overload]


@pytest.mark.parametrize("page", ["README.md", *OTHERS])
def test_the_commands_run_one_after_the_other(page, place: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(place)
    mine = COMMANDS if page == "README.md" else OTHERS[page]
    if any("=DIR" in command for command in mine):  # a pretrained model with its tokenizer
        small = (word for word in SMALL if "seq_len" not in word)
        assert main(["train", "mine.yaml", "run_dir=base", "train.steps=1", "data.seq_len=64", *small]) == 0
        shutil.move("base/export", "DIR")
    for command in mine:
        words = shlex.split(command.replace("data.train=PATH", "data.train=corpus.jsonl"))[1:]
        if any(part in command for part in ("model.offload", "-stream", "train.cuda_graphs")):  # which need a GPU
            recipe = load_recipe(words[1], words[2:])
            assert recipe.model.offload or recipe.train.cuda_graphs
            continue
        if words[0] == "train" and "--resume" not in words:
            given = ("model.", "data.vocab_size") if "model.pretrained" in command else ()
            given += ("data.vocab_size",) if "=tokens" in command else ()
            small = [word for word in SMALL if word.split("=")[0] not in command and not word.startswith(given or "-")]
            words += [*small, "train.steps=2", *(["data.seq_len=64"] if "sft" in words else [])]
        if words[0] == "compare":
            words += [*(word for word in SMALL if "eval_every" not in word), "--steps", "2"]
        if words[0] == "memory":
            words[1:2] = ["demo", *SIZES]  # a large model takes longer, and nothing else
        if words[0] == "generate":
            words += ["--max-new-tokens", "2"]
        assert main(words) == 0, f"{command}\n{capsys.readouterr()}"
    assert (place / "exported/config.json").is_file() or not any("export" in command for command in mine)


def test_what_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert TARGETS
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in TARGETS)
    for page in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / page).exists(), page


def test_every_public_name_and_every_page_is_in_the_site() -> None:
    api, site = PAGES["api.md"], (ROOT / "mkdocs.yml").read_text()
    assert {name for name in poetx.__all__ if f".{name}\n" not in api} == set()
    assert {page for page in PAGES if page not in site} == set()
