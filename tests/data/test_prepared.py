"""``poetx data``: tokens in a directory of their own are those of a run on the same text."""

from __future__ import annotations

import errno
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from poetx import UserError
from poetx.cli import main
from poetx.data import writing
from poetx.data.prepare import find_data, prepare_data
from poetx.data.prepared import prepare_directory
from poetx.data.tokenizer import train_tokenizer
from poetx.data.tokens import verified_meta
from poetx.planner.estimate import vocabulary
from poetx.recipe import Recipe, load_recipe
from poetx.recipe.loading import load_data
from poetx.recipe.sections import DataRecipe

Tiny = Callable[..., Recipe]
SETTINGS = ("data.vocab_size=400", "data.seq_len=16", "data.validation_fraction=0.1")


def lines(count: int) -> list[str]:
    return [f"document {n}: " + " ".join(f"w{n * k % 31}" for k in range(n % 23 + 3)) for n in range(count)]


def texts(place: Path) -> str:
    (place / "a.txt").write_text("\n".join(lines(900)))
    return f"data.train={place / 'a.txt'}"


def chats(place: Path) -> str:
    rows = [{"prompt": line[:14], "completion": line[14:]} for line in lines(120)]
    (place / "chats.json").write_text(json.dumps(rows))
    return f"data.train={place / 'chats.json'}"


def mixture(place: Path) -> str:
    for name, count in (("a", 90), ("b", 60)):
        rows = (json.dumps({"text": line}) + "\n" for line in lines(count))
        (place / f"{name}.jsonl").write_text("".join(rows))
    return f"data.train={{{place / 'a.jsonl'}: 2, {place / 'b.jsonl'}: 1}}"


CASES: dict[str, tuple[Callable[[Path], str], list[str]]] = {
    "a file": (texts, []),
    "packed text": (texts, ["data.pack=true"]),
    "chats": (chats, ["data.seq_len=48"]),
    "chats one after the other": (chats, ["data.pack=false"]),
    "a mixture, packed": (mixture, ["data.pack=true"]),
    "validation of its own": (texts, ["data.validation=[VALIDATION/c.txt, VALIDATION/d.txt]", "data.pack=true"]),
}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("case", CASES)
def test_a_preparation_that_is_killed_goes_on_to_the_same_bytes(
    case: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, more = CASES[case]
    for name in "cd":
        (tmp_path / f"{name}.txt").write_text("\n".join(lines(90)))
    settings = [
        write(tmp_path),
        *SETTINGS[: 2 if "validation" in case else 3],
        *(text.replace("VALIDATION", str(tmp_path)) for text in more),
    ]
    data, place = load_data(settings), tmp_path / "tokens"
    once = prepare_directory(data, tmp_path / "once", lambda text: None)

    monkeypatch.setattr(writing, "TELL_EVERY", 0)
    encode, told = writing.encode, []
    for kill_after in (0, 1, 13, 40):

        def killed(*arguments: Any, after: int = kill_after, **options: Any) -> Iterator[Any]:
            yield from itertools.islice(encode(*arguments, **options), after)
            raise Killed

        monkeypatch.setattr(writing, "encode", killed)
        with pytest.raises(Killed):
            prepare_directory(data, place, told.append)
        with (place / "train.bin").open("ab") as file:
            file.write(b"\x01\x02\x03")  # written, but not recorded
    monkeypatch.setattr(writing, "encode", encode)
    assert prepare_directory(data, place, told.append) == once == verified_meta(place)
    assert "Going on where it was stopped" in told
    assert sum("Training a tokenizer" in text for text in told) <= 2  # until something was recorded
    assert not (place / writing.PROGRESS).exists()
    of_a_run = prepare_data(tiny(*settings))
    assert of_a_run.meta == once
    for part in ("train", "validation"):
        assert (place / f"{part}.bin").read_bytes() == (of_a_run.directory / f"{part}.bin").read_bytes()


def test_a_run_on_prepared_tokens_is_the_run_on_the_text(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    texts(tmp_path)
    assert main(["data", "a.txt", "tokens", "data.vocab_size=400"]) == 0
    told = capsys.readouterr().out
    assert "sample, training" in told
    assert "'document 0: w0 w0 w0" in told
    (tmp_path / "small.yaml").write_text(
        "model: {hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2}\n"
        "data: {vocab_size: 400, seq_len: 16}\npoet: {block_size: 8, init: normalized}\n"
        "train: {steps: 3, batch_size: 2, eval_every: 3, device: cpu, export: false}"
    )
    losses = []
    for source, run in (("a.txt", "a"), ("tokens", "b")):
        assert main(["train", "small.yaml", f"data.train={source}", f"run_dir=runs/{run}"]) == 0
        lines = (tmp_path / "runs" / run / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line).get("loss") for line in lines])
    assert losses[0] == losses[1]
    assert main(["eval", "runs/b"]) == 0
    caplog.clear()
    recipe = load_recipe("small.yaml", ["data.train=tokens"])
    assert vocabulary(recipe) == 400
    assert (
        "small.yaml: data.vocab_size=400 has no effect with data.train=" in caplog.text
    )  # of the file, not asked for now
    assert len(caplog.records) == 1
    caplog.clear()
    load_recipe("small.yaml", ["data.train=a.txt"])
    load_recipe("demo", ["data.train=tokens"])
    load_recipe(str(tmp_path / "runs/b"))
    assert caplog.text == ""
    assert find_data(recipe).meta == verified_meta(tmp_path / "tokens")


def test_what_does_not_fit_prepared_tokens_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    texts(tmp_path)
    packed = ["data.vocab_size=400", "data.pack=true", "data.seq_len=32"]
    assert main(["data", "a.txt", "tokens", *packed]) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    (tmp_path / "other.json").write_text((tmp_path / "tokens/tokenizer.json").read_text())
    train = ["train", "demo", "data.train=tokens"]
    for argv, said in (
        ([*train, "data.vocab_size=500"], "has no effect with data.train=.*tokens, which poetx data has prepared"),
        ([*train, "data.tokenizer=other.json"], "has no effect"),
        ([*train, "data.validation=a.txt"], "has no effect"),
        ([*train, "data.seq_len=16"], "packed into windows of 32; set it to that"),
        (["data", "a.txt", "tokens", "data.vocab_size=400"], "tokens of other text or settings"),
        (["data", "a.txt", "other"], "has notes.txt, which is no part of prepared data"),
        (["data", "a.txt", "a.txt"], "is a file"),
        (["data", "nowhere", "new"], "no such file"),
        (["data", "a.txt", "new", "train.steps=3"], "train.steps: unknown key"),
        (["data", "a.txt", "new", "vocab_size=300"], "did you mean 'data.vocab_size'"),
        (["data", ".", "new"], "lies in data.train="),
    ):
        assert main(argv) == 2, argv
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.search(said, error), error
    assert not (tmp_path / "new").exists()


def test_a_model_of_another_tokenizer_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    from builders import llama

    texts(tmp_path)
    for name, size in (("tokens", 400), ("others", 420)):
        prepare_directory(
            load_data([f"data.train={tmp_path / 'a.txt'}", f"data.vocab_size={size}"]),
            tmp_path / name,
            lambda text: None,
        )
    model = tmp_path / "model"
    llama(vocab_size=420).save_pretrained(model)
    (model / "tokenizer.json").write_text((tmp_path / "others/tokenizer.json").read_text())
    own = {"model.pretrained": str(model), "data.train": str(tmp_path / "others")}
    recipe = tiny().with_keys({"data.vocab_size": 32000})
    values = recipe.to_dict()
    values["model"] = {"pretrained": str(model)}
    values["data"] = {"train": own["data.train"], "seq_len": 16}
    values["poet"]["init"] = "keep"
    assert prepare_data(Recipe.from_dict(values)).meta.vocab_size == 420
    values["data"]["train"] = str(tmp_path / "tokens")
    with pytest.raises(UserError, match="prepared with another tokenizer than that of model.pretrained"):
        prepare_data(Recipe.from_dict(values))


def test_what_poetx_data_does_not_read_is_refused_or_said(tmp_path: Path) -> None:
    source = texts(tmp_path)
    for other in ("data.train=b.txt", "data.cache_dir=cache"):
        with pytest.raises(UserError, match=rf"^{other}: poetx data has SRC and DIR for that; leave it out$"):
            load_data([source, other])
    said: list[str] = []
    for more in ([], ["data.seq_len=16"], ["data.seq_len=16", "data.pack=true"]):
        said.append("")
        prepare_directory(load_data([source, "data.vocab_size=400", *more]), tmp_path / f"{len(said)}", said.append)
    assert [text for text in said if "data.seq_len" in text] == [
        "data.seq_len=16: has no effect on text that is not packed; poetx train cuts it into windows"
    ]


@pytest.mark.parametrize("key", ["data.train=[{}, {}.txt]", "data.validation={}"])
def test_tokens_are_no_text_beside_other_text(key: str, tiny: Recipe, tmp_path: Path) -> None:
    prepare_directory(load_data([texts(tmp_path), *SETTINGS]), tmp_path / "tokens", lambda _: None)
    (tmp_path / "tokens.txt").write_text("some words")
    place = tmp_path / "tokens"
    with pytest.raises(UserError, match=rf"{place}: tokens of poetx data, which data\.train alone reads, by itself"):
        prepare_data(tiny(key.format(place, place)))  # pyright: ignore[reportCallIssue]


def test_settings_of_a_tokenizer_that_a_kill_came_before_are_there_after_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, own = tmp_path / "a.txt", tmp_path / "tokenizer"
    text.write_text("some words in a row\n" * 900)
    own.mkdir()
    train_tokenizer([text.read_text()], vocab_size=300).save(str(own / "tokenizer.json"))
    (own / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    data = DataRecipe(train=str(text), tokenizer=str(own))

    def killed(*paths: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("poetx.data.prepared._copy_settings", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_directory(data, tmp_path / "tokens", print)
    assert not (tmp_path / "tokens/tokenizer_config.json").exists()
    prepare_directory(data, tmp_path / "tokens", print)
    copied = (tmp_path / "tokens/tokenizer_config.json").read_text()
    assert copied == (own / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("name", ["meta.json", "tokenizer.json"])
def test_a_disk_that_is_full_at_a_small_file_leaves_what_the_same_command_goes_on_from(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some words in a row\n" * 900)
    data = DataRecipe(train=str(text), vocab_size=300)
    prepare_directory(data, tmp_path / "whole", print)
    write = Path.write_text

    def full(self: Path, words: str, *args: Any, **settings: Any) -> int:
        if self.name.startswith(name):
            write(self, words[:10], *args, **settings)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, words, *args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(UserError, match="could not be written .*free some space"):
            prepare_directory(data, tmp_path / "tokens", print)
    (tmp_path / "tokens").mkdir(exist_ok=True)
    (tmp_path / "tokens" / f"{name}.tmp").write_text("{")  # as a kill leaves it
    prepare_directory(data, tmp_path / "tokens", print)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "tokens" / file.name).read_bytes() == file.read_bytes(), file.name
    assert len(list((tmp_path / "tokens").iterdir())) == len(list((tmp_path / "whole").iterdir()))


def test_a_short_text_is_prepared_and_its_windows_are_cut_by_who_trains_on_it(tiny: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(" ".join(map(str, range(300))))
    meta = prepare_directory(DataRecipe(train=str(text), vocab_size=300), tmp_path / "tokens", print)
    assert 1 < meta.validation_tokens < 256
    with pytest.raises(UserError, match=r"tokens of (training|validation) text, fewer than data\.seq_len=256"):
        prepare_data(tiny(f"data.train={tmp_path / 'tokens'}", "data.seq_len=256"))
