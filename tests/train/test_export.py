"""The tokenizer that a run saves, and what comes back from a run or an exported directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from safetensors import SafetensorError

import builders
from builders import Tiny
from poetx.data.tokenizer import END_OF_TEXT, fast_tokenizer, train_tokenizer
from poetx.errors import UserError
from poetx.runs.evaluate import evaluate_run
from poetx.runs.generate import generate_text
from poetx.runs.load import load_run
from poetx.train.export import export_model
from poetx.train.run import train

CONFIGS = {
    "none": None,
    "no class": {"tokenizer_class": "PreTrainedTokenizerFast"},
    "another end": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<|im_end|>"},
    "a beginning": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": END_OF_TEXT, "bos_token": "<|im_end|>"},
}


def tokenizer_directory(directory: Path, config: dict[str, str] | None) -> Path:
    directory.mkdir()
    tokenizer = train_tokenizer(["alpha beta gamma"], vocab_size=300)
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("name", CONFIGS)
def test_the_end_of_text_of_training_is_used_ever_after(tiny: Tiny, tmp_path: Path, name: str) -> None:
    own = tokenizer_directory(tmp_path / "own", CONFIGS[name])
    result = train(tiny(f"data.tokenizer={own}", f"data.end_of_text={END_OF_TEXT}", "train.steps=1"))
    export_model(load_run(str(result.run_dir)).model, result.run_dir / "tokenizer", tmp_path / "again")
    data = tmp_path / "two.jsonl"
    data.write_text('{"text": "alpha"}\n{"text": "beta"}\n')
    for place in (result.run_dir, result.export_dir, tmp_path / "again"):
        loaded = load_run(str(place), device="cpu")
        assert loaded.tokenizer.eos_token == END_OF_TEXT
        assert loaded.tokenizer.bos_token == ("<|im_end|>" if name == "a beginning" else END_OF_TEXT)
        assert loaded.model.config.eos_token_id == loaded.end_of_text_id == 0
        assert evaluate_run(str(place), data=str(data), seq_len=2).tokens > 0
        assert isinstance(generate_text(loaded, "", max_new_tokens=3), str)


@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_run_whose_ids_have_gaps_is_evaluated_and_exported(tiny: Tiny, tmp_path: Path, tied: str) -> None:
    content = json.loads(train_tokenizer(["alpha beta gamma"], vocab_size=300).to_str())
    content["model"]["vocab"]["a"] = 500
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    own = f"data.tokenizer={tmp_path / 'tokenizer.json'}"
    result = train(tiny(own, f"model.tie_embeddings={tied}", "train.steps=1"))
    assert load_run(str(result.run_dir)).model.config.vocab_size == 501
    assert evaluate_run(str(result.run_dir), data=None).perplexity == pytest.approx(result.last_perplexity, rel=0.1)


def test_a_run_does_not_depend_on_tokens_that_transformers_adds(tiny: Tiny) -> None:
    result = train(tiny("train.steps=1"))
    tokenizer = load_run(str(result.run_dir)).tokenizer
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(result.run_dir / "tokenizer")
    (result.run_dir / "environment.json").unlink()  # as if transformers had added them when the run was written
    assert load_run(str(result.run_dir)).model.config.vocab_size == result.model.config.vocab_size


def test_a_checkpoint_without_the_embedding_is_one_line(tiny: Tiny) -> None:
    path = train(tiny("train.steps=1", "train.export=false")).checkpoint
    assert path is not None
    builders.edit_tensors(path, "model.safetensors", {"model.embed_tokens.weight": None})
    with pytest.raises(UserError, match=r"step-00000001: does not fit .*: no model\.embed_tokens\.weight with rows"):
        load_run(str(path.parents[1]))


@pytest.mark.parametrize("error", [SafetensorError("I/O error: No space left on device"), OSError(28, "No space left")])
def test_a_full_disk_during_the_export_is_one_line_and_leaves_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(model: object, directory: Path) -> None:
        (directory / "model.safetensors").write_text("half")
        raise error

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    recipe = tiny("train.steps=1")
    with pytest.raises(UserError, match=r"run/export: could not be written .*No space left") as caught:
        train(recipe)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"out: could not be written .*poetx export RUN DIR"):
        export_model(load_run(str(recipe.directory)).model, recipe.directory / "tokenizer", tmp_path / "out")
    assert not [path for path in tmp_path.rglob("*") if "out" in path.name or "export" in path.name]
    monkeypatch.undo()
    export_model(load_run(str(recipe.directory)).model, recipe.directory / "tokenizer", tmp_path / "out")
    assert load_run(str(tmp_path / "out")).recipe is None


def test_generating_with_a_single_position(tiny: Tiny) -> None:
    loaded = load_run(str(train(tiny("data.seq_len=1", "train.steps=1")).run_dir))
    assert loaded.model.config.max_position_embeddings == 1
    assert len(loaded.tokenizer(generate_text(loaded, "alpha beta", temperature=0.0)).input_ids) <= 4


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_diverged_model_generates_nothing(tiny: Tiny, temperature: float) -> None:
    loaded = load_run(str(train(tiny("train.steps=1")).run_dir))
    assert isinstance(generate_text(loaded, "alpha", max_new_tokens=2, temperature=temperature), str)
    for value in ("nan", "inf"):
        loaded.model.lm_head.weight.data.fill_(float(value))
        with pytest.raises(UserError, match="output is not finite"):
            generate_text(loaded, "alpha", max_new_tokens=2, temperature=temperature)


def test_a_model_from_elsewhere_without_an_end_of_text_is_one_line(tiny: Tiny, tmp_path: Path, corpus: Path) -> None:
    export = train(tiny("train.steps=1")).export_dir
    assert export is not None
    (export / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match=r"export: its tokenizer names no end-of-text token"):
        evaluate_run(str(export), data=str(corpus / "0.txt"))
    loaded = load_run(str(export))
    assert isinstance(generate_text(loaded, "alpha", max_new_tokens=3), str)
    with pytest.raises(UserError, match="names no end-of-text token"):
        generate_text(loaded, "", max_new_tokens=3)


@pytest.mark.parametrize(("known", "expected"), [(5, 0), ([5, 7], 0), (None, 0), (0, 0), ([7, 0], [7, 0])])
def test_an_export_stops_where_documents_of_training_ended(tmp_path: Path, known: object, expected: object) -> None:
    """Whatever the checkpoint that training began with had stopped at."""
    model = builders.llama()
    model.config.eos_token_id = model.generation_config.eos_token_id = known
    model.generation_config.temperature, model.generation_config.top_k = 0.6, 20  # idle, as nothing is sampled
    fast_tokenizer(tokenizer_directory(tmp_path / "own", None) / "tokenizer.json", END_OF_TEXT).save_pretrained(
        tmp_path / "own"
    )
    export_model(model, tmp_path / "own", tmp_path / "out")
    loaded = load_run(str(tmp_path / "out"), device="cpu").model
    assert loaded.config.eos_token_id == loaded.generation_config.eos_token_id == expected


def test_every_chat_template_is_exported_into_a_directory_that_was_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tokenizer_directory(tmp_path / "own", None)
    tokenizer = fast_tokenizer(own / "tokenizer.json", END_OF_TEXT)
    tokenizer.chat_template = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    tokenizer.save_pretrained(own)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_model(builders.llama(), own, Path())
    assert Path("config.json").is_file()
    templates = load_run(".", device="cpu").tokenizer.chat_template
    assert sorted(templates) == ["default", "rag"]


def test_a_full_disk_while_the_tokenizer_is_written_is_one_line(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, directory: Path, **options: object) -> None:
        raise Exception("No space left on device (os error 28)")  # what the tokenizers library raises

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)
    recipe = tiny("train.steps=1")
    with pytest.raises(UserError, match=r"tokenizer: could not be written \(No space left .*; free some"):
        train(recipe)
    assert not [path for path in recipe.directory.iterdir() if "tokenizer" in path.name]
