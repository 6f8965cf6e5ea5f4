"""What a directory from elsewhere may hold, and text that goes on where the prompt ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from builders import Tiny
from poetx.errors import UserError
from poetx.files import remove_at_once, sha256
from poetx.runs import evaluate, load
from poetx.runs.evaluate import evaluate_run
from poetx.runs.generate import generate_text
from poetx.runs.load import LoadedModel, load_run
from poetx.train.run import train


def always(word: str) -> LoadedModel:
    """A model that says ``word`` whatever it is asked, with a tokenizer that drops the space before a text."""
    vocab = {"</s>": 0, "<unk>": 1, "▁one": 2, "▁two": 3, "▁three": 4}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=5, n_embd=8, n_layer=1, n_head=1, n_positions=16, eos_token_id=0, bos_token_id=0)
    )
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(5, 8))
        model.lm_head.weight[vocab[word]] = 9.0
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    return LoadedModel(model.eval(), tokenizer, torch.device("cpu"), None, [])


@pytest.mark.parametrize("prompt", ["one", "two one", "three two one " * 9])
def test_the_space_after_the_prompt_is_kept(prompt: str) -> None:
    text = generate_text(always("▁two"), prompt.strip(), max_new_tokens=3, temperature=0)
    assert text == " two two two"


@pytest.mark.parametrize("temperature", [1e-300, 1e-44, 1e-40, 1e-7])
def test_a_temperature_next_to_zero_is_the_likeliest_token(temperature: float) -> None:
    loaded = always("▁three")
    assert generate_text(loaded, "one", max_new_tokens=2, temperature=temperature) == " three three"


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -0.1])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(UserError, match=r"--temperature=.*: must be a number from 0 on"):
        generate_text(always("▁one"), "one", temperature=temperature)


@pytest.mark.parametrize(("words", "wanted", "seen", "written"), [(5, 30, 5, 11), (40, 2, 14, 2), (40, 30, 12, 4)])
def test_what_does_not_fit_is_said_and_the_prompt_comes_first(
    words: int, wanted: int, seen: int, written: int, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = always("▁two")
    assert generate_text(loaded, "one", max_new_tokens=15, temperature=0) == " two" * 15
    assert not caplog.messages
    text = generate_text(loaded, ("one " * words).strip(), max_new_tokens=wanted, temperature=0)
    assert text.count("two") == written
    assert caplog.messages == [
        f"the model has 16 positions: the last {seen} of the prompt's {words} tokens are seen, and at most {written} "
        "written"
    ]


def test_a_prompt_that_is_no_unicode_is_refused() -> None:
    prompt = b"caf\xe9".decode("utf-8", "surrogateescape")  # as Python hands over such an argument
    with pytest.raises(UserError, match=r"--prompt='caf\\udce9': not valid Unicode") as caught:
        generate_text(always("▁one"), prompt)
    str(caught.value).encode()


@pytest.mark.parametrize("content", [b"null", b"[]", b"3", b"{" + b'"a": [' * 100_000, b"\xff"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_damaged_export_is_one_line(export: Path, name: str, content: bytes) -> None:
    before = (export / name).read_bytes()
    (export / name).write_bytes(content)
    try:
        with pytest.raises(UserError, match=export.name) as caught:
            load_run(str(export), device="cpu")
        assert "\n" not in str(caught.value)
    finally:
        (export / name).write_bytes(before)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"n_head": 3}, r"^\S*: (?!its tokenizer).*embed_dim"),
        ("config.json", {"activation_function": "tanhh"}, r"transformers knows no 'tanhh'"),
        (
            "generation_config.json",
            {"eos_token_id": "x"},
            r"generation_config\.json: eos_token_id='x' must be a token id",
        ),
        (
            "generation_config.json",
            {"eos_token_id": [0, "b"]},
            r"generation_config\.json: eos_token_id=\[0, 'b'\] must",
        ),
    ],
)
def test_an_odd_setting_of_an_export_is_one_line_about_itself(export: Path, name: str, change, message: str) -> None:
    before = (export / name).read_text()
    (export / name).write_text(json.dumps(json.loads(before) | change))
    try:
        with pytest.raises(UserError, match=message) as caught:
            load_run(str(export), device="cpu")
        assert "\n" not in str(caught.value)
    finally:
        (export / name).write_text(before)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded, place = always("▁one"), tmp_path_factory.mktemp("damaged")
    loaded.model.save_pretrained(place)
    loaded.tokenizer.save_pretrained(place)
    return place


def another_tokenizer(directory: Path) -> None:
    always("▁one").tokenizer.save_pretrained(directory)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda directory: (directory / "tokenizer.json").write_text("{"), r"tokenizer: its tokenizer cannot be read"),
        (shutil.rmtree, r"tokenizer: .* \(no tokenizer files there\)"),
        (another_tokenizer, r"tokenizer: not the tokenizer that the run was trained with"),
    ],
)
def test_a_run_has_its_own_tokenizer_or_is_refused_and_resuming_mends_it(
    tiny: Tiny, damage: Callable[[Path], object], message: str
) -> None:
    recipe = tiny("train.steps=1", "train.export=false")
    directory = train(recipe).run_dir / "tokenizer"
    before = load_run(str(recipe.directory)).tokenizer.get_vocab()
    damage(directory)
    with pytest.raises(UserError, match=message + r".*; poetx train .* --resume writes it again"):
        load_run(str(recipe.directory))
    train(recipe, resume=True)
    assert load_run(str(recipe.directory)).tokenizer.get_vocab() == before


def test_tokens_that_the_model_does_not_know_are_one_line(tmp_path: Path) -> None:
    loaded = always("▁one")
    loaded.tokenizer.add_tokens(["more"])
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("one more " * 9)
    with pytest.raises(UserError, match="another model's: token 5, but 5 embeddings"):
        generate_text(loaded, "one more")
    with pytest.raises(UserError, match="another model's: token 5, but 5 embeddings"):
        evaluate_run(str(tmp_path), data=str(tmp_path / "text.txt"), seq_len=4, device="cpu")


@pytest.mark.parametrize("command", ["eval", "load", "spectrum"])
def test_a_run_that_trains_on_is_read_at_its_newer_checkpoint(
    command: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = train(tiny("train.export=false")).run_dir
    older, newer = sorted((run_dir / "checkpoints").iterdir())
    newer.rename(tmp_path / "newer")
    module = load if command != "spectrum" else evaluate
    real = module.load_model

    def train_on(checkpoint: Path, model: torch.nn.Module) -> None:
        if older.exists():
            (tmp_path / "newer").rename(newer)
            shutil.rmtree(older)
        real(checkpoint, model)

    monkeypatch.setattr(module, "load_model", train_on)
    if command == "spectrum":
        assert evaluate.run_spectrum(run_dir, device="cpu").step == 12
    elif command == "eval":
        assert evaluate_run(str(run_dir), data=None, device="cpu").loss > 0
    else:
        assert load_run(str(run_dir), device="cpu").text is not None
    shutil.rmtree(newer)
    with pytest.raises(UserError, match="no checkpoints yet"):
        load_run(str(run_dir), device="cpu")


def test_a_run_that_outruns_its_readers_is_named(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = train(tiny("train.export=false")).run_dir

    def train_on(checkpoint: Path, model: torch.nn.Module) -> None:
        number = int(checkpoint.name[-8:]) + 1
        state = json.loads((checkpoint / "state.json").read_text())
        state["train"]["step"] = number
        newer = shutil.copytree(checkpoint, checkpoint.with_name(f"step-{number:08d}"))
        (newer / "state.json").write_text(json.dumps(state))
        manifest = json.loads((newer / "manifest.json").read_text())
        size, digest = (newer / "state.json").stat().st_size, sha256(newer / "state.json")
        manifest["files"]["state.json"] = {"size": size, "sha256": digest}
        (newer / "manifest.json").write_text(json.dumps(manifest))
        remove_at_once(checkpoint)
        load_file(checkpoint / "model.safetensors")

    monkeypatch.setattr(load, "load_model", train_on)
    with pytest.raises(UserError, match=r"removed each of 5 checkpoints before they were read; have it keep more"):
        load_run(str(run_dir), device="cpu")


@pytest.mark.parametrize("change", ["poet.block_size=4", "train.seed=5", "optimizer.lr=1e-3", "other text"])
def test_a_checkpoint_of_another_run_is_refused(change: str, tiny: Tiny, tmp_path: Path) -> None:
    if change == "other text":
        (tmp_path / "text.txt").write_text("alpha and the quick beta\n" * 900)
        change = f"data.train={tmp_path / 'text.txt'}"
    runs = [train(tiny("train.steps=1", "train.export=false", f"run_dir={tmp_path / name}", *more)).run_dir
            for name, more in (("a", ()), ("b", (change,)))]  # fmt: skip
    shutil.rmtree(runs[0] / "checkpoints")
    shutil.copytree(runs[1] / "checkpoints", runs[0] / "checkpoints")
    with pytest.raises(UserError, match=rf"^{runs[0]}.*: is another run's, (trained with|of other text)"):
        load_run(str(runs[0]))
    assert load_run(str(runs[1]))
