"""Text to tokens to windows: every source, every mistake, reuse of the cache."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poetx.data import prepare
from poetx.data.prepare import prepare_data
from poetx.data.sources import open_corpus
from poetx.data.split import Split, split_for
from poetx.data.tokenizer import find_end_of_text, read_tokenizer, train_tokenizer
from poetx.data.tokens import PreparedData, TokenWindows, window_count
from poetx.errors import UserError
from poetx.recipe import Recipe

Tiny = Callable[..., Recipe]


def decode(data: PreparedData, part: str) -> str:
    tokenizer = read_tokenizer(data.tokenizer_file)
    return tokenizer.decode(getattr(data, part).tokens.tolist(), skip_special_tokens=False)


def test_a_directory_is_split_by_file_and_nothing_is_lost(tiny: Tiny, corpus: Path) -> None:
    data = prepare_data(tiny())
    files = sorted(corpus.iterdir())
    texts = [file.read_text(encoding="utf-8") for file in files]
    end, held_out = "<|endoftext|>", Split(0.25).held_out
    assert decode(data, "train") == "".join(t + end for i, t in enumerate(texts) if not held_out(i))
    assert decode(data, "validation") == "".join(t + end for i, t in enumerate(texts) if held_out(i))
    assert data.meta.train_tokens == len(data.train.tokens)
    assert data.train.tokens.dtype == np.uint16


def test_a_single_file_is_held_out_in_sections(tiny: Tiny, tmp_path: Path) -> None:
    lines = [f"line {number} of one long file\n" for number in range(8000)]
    path = tmp_path / "one.txt"
    path.write_text("".join(lines), encoding="utf-8")
    data = prepare_data(tiny(f"data.train={path}", "data.validation_fraction=0.1"))
    held = decode(data, "validation").replace("<|endoftext|>", "")
    assert 0.05 < len(held) / path.stat().st_size < 0.15
    kept = decode(data, "train").replace("<|endoftext|>", "")
    assert sorted((kept + held).splitlines()) == sorted("".join(lines).splitlines())


def test_jsonl_and_a_validation_file_of_its_own(tiny: Tiny, tmp_path: Path) -> None:
    train, validation = tmp_path / "a.jsonl", tmp_path / "b.txt"
    train.write_text("\n".join(json.dumps({"text": f"document {i} " * 9}) for i in range(30)) + "\n\n")
    validation.write_text("held out text " * 30)
    data = prepare_data(tiny(f"data.train={train}", f"data.validation={validation}"))
    assert decode(data, "train").count("<|endoftext|>") == 30
    assert decode(data, "validation") == "held out text " * 30 + "<|endoftext|>"


@pytest.mark.parametrize("directory", [False, True])
def test_json_lines_under_the_name_json(tiny: Tiny, tmp_path: Path, directory: bool) -> None:
    """The naming of C4: ``c4-train.00000-of-01024.json``."""
    place = tmp_path / "c4"
    place.mkdir()
    lines = [json.dumps({"url": "x", "text": f"document {i} " * 9}) for i in range(30)]
    (place / "c4-train.00000-of-01024.json").write_text("\n" + "\n".join(lines))
    source = place if directory else next(place.iterdir())
    data = prepare_data(tiny(f"data.train={source}"))
    assert decode(data, "train").startswith("document 0 document 0")
    assert "url" not in decode(data, "train")


@pytest.mark.parametrize(
    "content", ['{"content": "a"}\n', '[{"txt": "a"}]', "[3]", '{\n  "text": "a"\n}', "[" * 20_000, "\n"]
)
def test_other_json_is_refused_by_itself_and_text_among_code(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    for source in (path, tmp_path):
        with pytest.raises(UserError, match=r'no JSON lines with a "text" field \(a\.json\).*rename it to \.txt'):
            open_corpus(str(source))
    (tmp_path / "b.py").write_text("b")
    assert open_corpus(str(tmp_path)).parts[0].kind == "directory"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "code/a.py"])
def test_a_byte_order_mark_is_no_text(tiny: Tiny, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    lines = [f"document {i} " * 9 for i in range(30)]
    text = "\n".join(json.dumps({"text": line}) if ".json" in name else line for line in lines)
    for copy in range(2):
        path.with_stem(f"{path.stem}{copy}").write_text(text, encoding="utf-8-sig")
    source = path.parent if name.startswith("code") else path.with_stem("a0")
    data = prepare_data(tiny(f"data.train={source}", "data.validation_fraction=0.5"))
    assert decode(data, "train").startswith("document 0 ")
    assert "\ufeff" not in decode(data, "train") + decode(data, "validation")


def test_a_file_of_several_names_is_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place, outside = tmp_path / "text", tmp_path / "outside.txt"
    (place / "sub").mkdir(parents=True)
    for path in (place / "sub" / "a.txt", outside):
        path.write_text("text")
    (place / "b.txt").symlink_to("sub/a.txt")
    (place / "c.txt").hardlink_to(place / "sub" / "a.txt")
    for name in ("d.txt", "e.txt"):
        (place / name).symlink_to(outside)
    (place / "gone.txt").symlink_to("nowhere")
    (place / "up").symlink_to(".")
    files = open_corpus(str(place)).files
    assert len(files) == 2
    assert outside in files
    assert caplog.messages == [
        f"{place / 'gone.txt'}: a link to what is not there, which is not read",
        f"{place / 'up'}: a link to a directory, which is not read",
    ]


def test_a_part_of_the_text_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "sub/b.txt", ".hidden/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text\n")
    scandir = os.scandir

    def denied(path: str) -> Any:  # to root nothing is
        if Path(path).name in ("sub", ".hidden"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    assert [file.name for file in open_corpus(str(tmp_path)).files] == ["a.txt", "b.txt"]
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=r"sub: cannot be listed \(Permission denied\); make it readable"):
        open_corpus(str(tmp_path))


@pytest.mark.parametrize(("key", "place"), [("run_dir", "."), ("run_dir", "runs/a"), ("data.cache_dir", "cache")])
@pytest.mark.parametrize("text", ["data.train", "data.validation"])
def test_a_run_is_not_written_into_the_directory_of_its_text(
    key: str, place: str, text: str, tiny: Tiny, corpus: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    (tmp_path / "link").symlink_to("copy")
    before = sorted(copy.rglob("*"))
    with pytest.raises(UserError, match=f"^{key}=.*: lies in {text}=.*, whose text it would become; give {key}="):
        prepare_data(tiny(f"{text}={copy}", f"{key}={tmp_path / 'link' / place}"))
    assert sorted(copy.rglob("*")) == before
    hidden = [f"run_dir={copy}/.runs/a", f"data.cache_dir={copy}/.cache"]  # which no corpus reads
    assert prepare_data(tiny(f"{text}={copy}", *hidden)).meta.train_tokens


@pytest.mark.parametrize("name", ["data.train", "data.validation"])
def test_text_that_changes_while_it_is_read_is_refused(
    name: str, tiny: Tiny, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("some other words\n" * 3000)
    recipe = tiny(f"{name}={other}", f"data.cache_dir={tmp_path / 'cache'}")
    write = prepare.write_tokens

    def grow(*args: Any, **options: Any) -> Any:
        meta = write(*args, **options)
        with other.open("a") as file:
            file.write("one more line\n")
        return meta

    monkeypatch.setattr(prepare, "write_tokens", grow)
    with pytest.raises(UserError, match=r"other\.txt: has changed while it was read"):
        prepare_data(recipe)
    assert not list(recipe.cache_dir.glob("data-*"))
    monkeypatch.undo()
    assert prepare_data(recipe).meta.train_tokens


def test_a_vocabulary_that_the_text_does_not_fill_is_said(tiny: Tiny) -> None:
    said: list[str] = []
    size = prepare_data(tiny("data.vocab_size=70000"), progress=said.append).meta.vocab_size
    assert f"The text gives a tokenizer of {size} tokens, fewer than data.vocab_size=70000" in said
    assert size < 70000


@pytest.mark.parametrize("made", [os.symlink, os.link, shutil.copy])
def test_validation_text_that_is_trained_on_is_said(made: Any, tiny: Tiny, corpus: Path, tmp_path: Path) -> None:
    said: list[str] = []
    made(corpus / "3.txt", tmp_path / "held.txt")
    prepare_data(tiny(f"data.validation={tmp_path / 'held.txt'}"), progress=said.append)
    name = "3.txt" if made is os.symlink else "held.txt"
    assert f"data.validation has 1 files of data.train ({name})" in said[0]


def test_characters_that_the_tokenizer_leaves_out_are_said(tiny: Tiny, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(["some words"], trainers.BpeTrainer(special_tokens=["<|endoftext|>"]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("some wörds \N{GRINNING FACE} some words ö\n\n" * 400)
    said: list[str] = []
    prepare_data(tiny(f"data.train={tmp_path / 'a.txt'}", f"data.tokenizer={tmp_path}"), progress=said.append)
    lost = [text for text in said if "leaves them out" in text]
    assert len(lost) == 1
    assert "its tokenizer has no token for 'ö', '\N{GRINNING FACE}' and leaves them out; use one with byte" in lost[0]


def test_the_cache_is_reused_until_a_source_changes(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("some words to begin with\n" * 4000)
    recipe = tiny(f"data.train={path}", f"data.cache_dir={tmp_path / 'cache'}", "data.validation_fraction=0.5")
    messages: list[str] = []
    first = prepare_data(recipe, progress=messages.append)
    assert messages
    messages.clear()
    assert prepare_data(recipe, progress=messages.append).directory == first.directory
    assert messages == []
    path.write_text("other words to end with\n" * 4001)
    assert prepare_data(recipe, progress=messages.append).directory != first.directory
    assert messages


def replace(old: str, new: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(path.read_text().replace(old, new))


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def low_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [
    ("train.bin", lambda path: path.write_bytes(path.read_bytes()[:-2])),
    ("train.bin", zeros),
    ("train.bin", low_bit),
    ("validation.bin", low_bit),
    ("validation.bin", Path.unlink),
    ("tokenizer.json", low_bit),
    ("meta.json", replace('"uint16"', '"object"')),
    ("meta.json", replace('"uint16"', "[3]")),
    ("meta.json", replace('"vocab_size": 3', '"vocab_size": 4000000000003')),
    ("meta.json", replace('"end_of_text_id": ', '"end_of_text_id": 1')),
    ("meta.json", replace('"format": 2', '"format": 2.5')),
    ("meta.json", replace("{", '{"more": 1,')),
    ("meta.json", lambda path: path.write_text("null")),
    ("meta.json", lambda path: path.write_text("[" * 100_000)),
    ("meta.json", lambda path: path.write_bytes(b"\xff")),
]


def test_damaged_tokens_are_said_and_made_again(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny(f"data.cache_dir={tmp_path / 'cache'}")
    directory = prepare_data(recipe).directory
    whole = {path.name: path.read_bytes() for path in directory.iterdir()}
    for name, damage in DAMAGES:
        damage(directory / name)
        said: list[str] = []
        prepare_data(recipe, progress=said.append)
        assert "making it again" in said[0]
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == whole
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_what_killed_processes_left_is_removed_and_hinders_nobody(tiny: Tiny, tmp_path: Path) -> None:
    """In a container every process has the same number."""
    recipe = tiny(f"data.cache_dir={tmp_path / 'cache'}")
    name = prepare_data(recipe).directory.name
    shutil.rmtree(tmp_path / "cache" / name)
    for leftover in (f".{name}.tmp-{os.getpid()}", ".data-0123.tmp-1"):
        (tmp_path / "cache" / leftover).mkdir()
    prepare_data(recipe)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [name]


@pytest.mark.parametrize("lockless", [False, True])
def test_runs_that_start_together_share_the_tokens(
    tiny: Tiny, tmp_path: Path, lockless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lockless:  # as on Windows, or a file system without locks
        monkeypatch.setitem(sys.modules, "fcntl", None)
    recipe = tiny(f"data.cache_dir={tmp_path / 'cache'}")
    barrier, said = threading.Barrier(5), []

    def start(_: int) -> PreparedData:
        barrier.wait()
        return prepare_data(recipe, progress=said.append)

    with ThreadPoolExecutor(5) as pool:
        directories = {data.directory for data in pool.map(start, range(5))}
    assert len(directories) == 1
    if not lockless:
        assert said.count("Tokenizing the text") == 1
        assert list((tmp_path / "cache").iterdir()) == list(directories)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, full = Path.write_text, set()

    def limited(path: Path, *args: object, **options: object) -> int:
        if path.name.removesuffix(".tmp") in full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", limited)
    recipe = tiny(f"data.cache_dir={tmp_path / 'new' / 'cache'}")
    for name in ("tokenizer.json", "meta.json"):
        full.clear()
        full.add(name)
        with pytest.raises(UserError, match=r"could not be written \(No space left on device\); free some space"):
            prepare_data(recipe)
        assert not (tmp_path / "new").exists()


def test_tokens_that_are_whole_are_read_where_nothing_can_be_written(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny()
    made = prepare_data(recipe)

    def read_only(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if set(mode) & set("wax+"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opened(path, mode, *args, **options)

    opened = Path.open
    monkeypatch.setattr(Path, "open", read_only)
    assert prepare_data(recipe).meta == made.meta


def test_windows_cover_every_label_once() -> None:
    tokens = np.arange(23, dtype=np.uint16)
    windows = TokenWindows(tokens, seq_len=5)
    assert len(windows) == window_count(23, 5) == 4
    inputs, labels, _ = windows.batch([0, 1, 2, 3])
    assert inputs.flatten().tolist() == list(range(20))
    assert labels.flatten().tolist() == list(range(1, 21))
    assert window_count(5, 5) == 0
    assert window_count(6, 5) == 1


def test_tokenizer_training_is_deterministic_and_lossless() -> None:
    texts = ["def f(x):\n\treturn 'é' + x  # 日本\n", "class A:\n    pass\n"] * 20
    first = train_tokenizer(texts, vocab_size=350)
    assert first.to_str() == train_tokenizer(texts, vocab_size=350).to_str()
    for text in (*texts[:2], "unseen ☃ text\r\n"):
        assert first.decode(first.encode(text).ids) == text


def test_an_existing_tokenizer_is_used(tiny: Tiny, tmp_path: Path) -> None:
    own = train_tokenizer(["alpha beta gamma"], vocab_size=300, end_of_text="</s>")
    path = tmp_path / "tok" / "tokenizer.json"
    path.parent.mkdir()
    own.save(str(path))
    for source in (path, path.parent):
        data = prepare_data(tiny(f"data.tokenizer={source}"))
        assert data.meta.end_of_text == "</s>"
        assert data.meta.vocab_size == own.get_vocab_size()
    with pytest.raises(UserError, match=r"data\.end_of_text=<s>: not a token"):
        find_end_of_text(own, "<s>", file=path)
    with pytest.raises(UserError, match=r"data\.tokenizer=.*nowhere: no such file or directory"):
        prepare_data(tiny(f"data.tokenizer={tmp_path / 'nowhere'}"))
    path.write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        prepare_data(tiny(f"data.tokenizer={path}"))


def test_an_end_of_text_that_is_declared_anew_is_taken(tiny: Tiny, tmp_path: Path) -> None:
    own = train_tokenizer(["alpha beta gamma"], vocab_size=300, end_of_text="</s>")
    own.add_special_tokens(["<stop>"])
    own.save(str(tmp_path / "tokenizer.json"))
    for end in ("</s>", "<stop>"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        assert prepare_data(tiny(f"data.tokenizer={tmp_path}")).meta.end_of_text == end


def test_truncation_and_padding_of_a_tokenizer_file_are_left_aside(tiny: Tiny, corpus: Path, tmp_path: Path) -> None:
    own = train_tokenizer(["alpha beta gamma"], vocab_size=300)
    counts = set()
    for name in ("plain", "truncated", "padded"):
        if name != "plain":
            own.enable_truncation(8)
        if name == "padded":
            own.enable_padding(length=50_000)
        path = tmp_path / f"{name}.json"
        own.save(str(path))
        meta = prepare_data(tiny(f"data.tokenizer={path}")).meta
        counts.add((meta.train_tokens, meta.validation_tokens, meta.fingerprint))
    assert len(counts) == 1


@pytest.mark.parametrize(("largest", "dtype"), [(500, np.uint16), (70_000, np.uint32)])
def test_ids_with_gaps_count_up_to_the_largest(tiny: Tiny, tmp_path: Path, largest: int, dtype: type) -> None:
    content = json.loads(train_tokenizer(["alpha beta gamma"], vocab_size=300).to_str())
    content["model"]["vocab"]["a"] = largest
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    data = prepare_data(tiny(f"data.tokenizer={path}"))
    assert data.meta.vocab_size == largest + 1
    assert data.train.tokens.dtype == dtype
    assert data.train.tokens.max() == largest


def test_builtin_is_the_standard_library_without_its_tests() -> None:
    files = open_corpus("builtin").files
    assert len(files) > 300
    assert list(files) == sorted(files)
    assert not any({"test", "site-packages", "idlelib", "lib2to3"} & set(file.parts) for file in files)
    assert any(file.name == "argparse.py" for file in files)


MISTAKES = {
    "missing": (None, r"no such file or directory"),
    "empty.txt": (b"", r"empty"),
    "blank.jsonl": (b"\n\n", r"no text to train on"),
    "latin.txt": (b"caf\xe9 " * 3000, r"latin\.txt: not UTF-8"),
    "late.jsonl": (b'{"text": "a"}\n{"txt": "b"}\n', r'late\.jsonl, line 2: no "text" field'),
    "number.jsonl": (b'{"text": 3}\n', r'number\.jsonl, line 1: "text" is int'),
    "broken.jsonl": (b'{"text": "a"}\n{"text"\n', r"broken\.jsonl, line 2: not JSON"),
    "deep.jsonl": (
        b'{"text": "a"}\n{"text": "b", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        r"deep\.jsonl, line 2: brackets nested too deeply",
    ),
    "list.jsonl": (b"[1]\n", r"list\.jsonl, line 1: list, not a record"),
    "gaps.jsonl": (b'{"text": "a"}\n{"text": "a"}\n{"text": "a"}\n{"text": ""}\n', r"the documents that .* are empty"),
    "short.jsonl": (b'{"text": "a"}\n{"text": "b"}\n', r"training text has \d+ tokens, fewer than one window"),
    "single.jsonl": (b'{"text": "' + b"word " * 500 + b'"}\n', r"nothing: .* is one document; give the text file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_text_is_one_line_and_leaves_nothing(tiny: Tiny, tmp_path: Path, name: str) -> None:
    content, message = MISTAKES[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    overrides = [f"data.train={path}", f"data.cache_dir={tmp_path / 'runs'}", "data.validation_fraction=0.5"]
    if name == "gaps.jsonl":
        overrides[-1] = "data.validation_fraction=0.3"
    with pytest.raises(UserError, match=message) as caught:
        prepare_data(tiny(*overrides))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "text", "held"),
    [
        ("lines.txt", "".join(f"some words, {number}\n" for number in range(3000)), 0.1),
        ("one-line.txt", "word " * 7000, 0.1),
        ("half.txt", "some words\n" * 900, 0.5),
        ("seven.jsonl", '{"text": "some words, said again and again"}\n' * 7, 1 / 7),
        ("forty.jsonl", '{"text": "some words, said again and again"}\n' * 40, 0.1),
    ],
)
def test_of_little_text_a_tenth_is_held_out_and_said(
    tiny: Tiny, tmp_path: Path, name: str, text: str, held: float
) -> None:
    path = tmp_path / name
    path.write_text(text)
    fraction = 0.5 if name == "half.txt" else 0.01
    overrides = [f"data.train={path}", f"data.cache_dir={tmp_path / 'cache'}", "data.seq_len=3"]
    said: list[str] = []
    data = prepare_data(tiny(*overrides, f"data.validation_fraction={fraction}"), progress=said.append)
    assert f"data.validation_fraction={fraction} is nothing of so little text: holding out" in said[0]
    both = data.meta.train_tokens + data.meta.validation_tokens
    assert data.meta.validation_tokens / both == pytest.approx(held, rel=0.2)
    whole = decode(data, "train") + decode(data, "validation")
    if name.endswith(".txt"):
        assert sorted(whole.replace("<|endoftext|>", "").split()) == sorted(text.split())


@pytest.mark.parametrize("count", [100, 101, 250])
def test_the_split_of_enough_text_is_the_fraction_alone(count: int, tmp_path: Path) -> None:
    """What earlier runs were trained on: the last of every hundred."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * count)
    split = split_for(open_corpus(str(path)), 0.01)
    assert split == Split(0.01)
    assert [index for index in range(count) if split.held_out(index)] == list(range(99, count, 100))


def test_validation_text_shorter_than_a_window(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "held.txt"
    path.write_text("alpha beta")
    with pytest.raises(
        UserError, match=r"validation text \(data\.validation=.*held\.txt\) has .*; give more text or low"
    ):
        prepare_data(tiny(f"data.validation={path}"))
    with pytest.raises(
        UserError, match=r"validation text has .*; raise data\.validation_fraction, give data\.validation="
    ):
        prepare_data(tiny("data.seq_len=3000"))


def test_an_empty_directory_and_a_mixed_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no files"):
        open_corpus(str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(UserError, match=r"mixes JSONL \(a\.jsonl\) and text \(b\.txt\)"):
        open_corpus(str(tmp_path))


def npy(text: bytes) -> bytes:
    file = io.BytesIO()
    np.save(file, np.frombuffer(text, np.uint8))
    return file.getvalue()


BINARIES = {
    "a.txt.lz4": (b"\x04\x22\x4d\x18\x64\x40", "LZ4-compressed, not text; decompress it first"),
    "a.txt": (b"PAR1\x15\x04", r"a Parquet table, not text; give it its own name \(\.parquet"),
    "a.jsonl": (b"\xff\xff\xff\xff\x10\x01\0\0", "an Arrow table, not text"),
    "a.docx": (b"PK\x03\x04\x14", "a zip archive"),
    "tokens.npy": (npy(b"text"), "a NumPy array, not text; tokens made elsewhere"),
    "tokens.bin": (np.arange(300, dtype="<u4").tobytes(), "a binary file"),
    "a.safetensors": (b'\x40\0\0\0\0\0\0\0{"__metadata__"', "a safetensors file, not text; a model is no text"),
    "a.pdf": (b"%PDF-1.7 ascii", "a PDF document"),
    "b.txt": ("text".encode("utf-16"), "UTF-16 text, not text|UTF-16 text"),
}


@pytest.mark.parametrize("name", BINARIES)
def test_a_file_that_is_no_text_is_named_for_what_it_is(tmp_path: Path, name: str) -> None:
    content, message = BINARIES[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "dataset_info.json").write_text("{}")
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match=message) as caught:
            open_corpus(str(source))
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_file_that_was_replaced_with_its_time_and_size_kept_is_read_again(tiny: Tiny, tmp_path: Path) -> None:
    """What ``cp -p``, ``rsync -t`` and ``tar`` do; the same for the tokenizer's file."""
    text, tokenizer = tmp_path / "a.txt", tmp_path / "tokenizer.json"
    words = "alpha beta gamma delta\n" * 300
    train_tokenizer([words], vocab_size=320).save(str(tokenizer))
    recipe = tiny(f"data.train={text}", f"data.tokenizer={tokenizer}", f"data.cache_dir={tmp_path / 'cache'}")

    def fingerprint(path: Path, content: str) -> str:
        before = path.stat() if path.exists() else None
        path.write_text(content)
        if before:
            assert path.stat().st_size == before.st_size
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return prepare_data(recipe).meta.fingerprint

    first = fingerprint(text, words)
    second = fingerprint(text, words.replace("gamma", "theta"))
    ids = tokenizer.read_text()
    both = {'"Ġbeta":': '"Ġdelta":', '"Ġdelta":': '"Ġbeta":'}
    third = fingerprint(tokenizer, re.sub('"Ġ(beta|delta)":', lambda match: both[match[0]], ids))
    assert len({first, second, third}) == 3
    assert fingerprint(tokenizer, ids) == second


def test_another_tokenizer_than_the_models_is_said(tiny: Tiny, tmp_path: Path) -> None:
    words = "alpha beta gamma delta\n" * 300
    for name, text in (("model", words), ("more", words), ("other", words.replace("gamma", "theta"))):
        (tmp_path / name).mkdir()
        tokenizer = train_tokenizer([text], vocab_size=320)
        tokenizer.add_tokens(["<|user|>"] if name == "more" else [])
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    (tmp_path / "a.txt").write_text(words)
    for name in ("model", "more", "other"):
        data = tiny(f"data.train={tmp_path / 'a.txt'}", f"data.tokenizer={tmp_path / name}").data
        said: list[str] = []
        prepare.plan_data(data, str(tmp_path / "model"), {}, said.append)
        assert any("is not that of model.pretrained" in text for text in said) == (name == "other")
