"""Text to tokens to windows: every source, every mistake, reuse of the cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from poetx.data.sources import held_out, open_corpus
from poetx.data.tokenizer import find_end_of_text, read_tokenizer, train_tokenizer
from poetx.data.tokens import PreparedData, TokenWindows, prepare_data, window_count
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
    end = "<|endoftext|>"
    assert decode(data, "train") == "".join(t + end for i, t in enumerate(texts) if not held_out(i, 0.25))
    assert decode(data, "validation") == "".join(t + end for i, t in enumerate(texts) if held_out(i, 0.25))
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
    "content", ['{"content": "a"}\n', '[{"text": "a"}]', '{\n  "text": "a"\n}', "[" * 20_000, "\n"]
)
def test_other_json_is_refused_by_itself_and_text_among_code(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    for source in (path, tmp_path):
        with pytest.raises(UserError, match=r'no JSON lines with a "text" field \(a\.json\).*rename it to \.txt'):
            open_corpus(str(source))
    (tmp_path / "b.py").write_text("b")
    assert open_corpus(str(tmp_path)).kind == "directory"


def test_a_byte_order_mark_before_json_lines(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"document {i} " * 9}) for i in range(30)), encoding="utf-8-sig")
    assert decode(prepare_data(tiny(f"data.train={path}")), "train").startswith("document 0 ")


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


def test_a_damaged_cache_is_made_again(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny(f"data.cache_dir={tmp_path / 'cache'}")
    data = prepare_data(recipe)
    path = data.directory / "train.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    leftover = tmp_path / "cache" / ".data-x.tmp-999999999"
    leftover.mkdir()
    assert (prepare_data(recipe).directory / "train.bin").read_bytes() == content
    assert not leftover.exists()


def test_windows_cover_every_label_once() -> None:
    tokens = np.arange(23, dtype=np.uint16)
    windows = TokenWindows(tokens, seq_len=5)
    assert len(windows) == window_count(23, 5) == 4
    inputs, labels = windows.batch([0, 1, 2, 3])
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
    with pytest.raises(UserError, match=r"data\.tokenizer=.*no tokenizer\.json there"):
        prepare_data(tiny(f"data.tokenizer={tmp_path / 'nowhere'}"))
    path.write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        prepare_data(tiny(f"data.tokenizer={path}"))


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
    "list.jsonl": (b"[1]\n", r'list\.jsonl, line 1: no "text" field'),
    "sections.txt": (
        b"word " * 7000,
        r"fraction=0\.3 holds out nothing: a file .* has 3; raise it to 0\.334, give more",
    ),
    "section.txt": (b"word " * 700, r"holds out nothing: a file .* has 1; give more text, or give data\.validation"),
    "three.jsonl": (b'{"text": "a"}\n' * 3, r"whole documents are held out, .* has 3; raise it to 0\.334, give more"),
    "gaps.jsonl": (b'{"text": "a"}\n{"text": "a"}\n{"text": "a"}\n{"text": ""}\n', r"the documents that .* are empty"),
    "short.jsonl": (b'{"text": "a"}\n{"text": "b"}\n', r"training text has \d+ tokens, fewer than one window"),
    "single.jsonl": (b'{"text": "' + b"word " * 500 + b'"}\n', r"nothing: whole documents .* has 1; give more doc"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_text_is_one_line_and_leaves_nothing(tiny: Tiny, tmp_path: Path, name: str) -> None:
    content, message = MISTAKES[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    overrides = [f"data.train={path}", f"data.cache_dir={tmp_path / 'runs'}", "data.validation_fraction=0.5"]
    if name in ("single.jsonl", "sections.txt", "section.txt", "three.jsonl", "gaps.jsonl"):
        overrides[-1] = "data.validation_fraction=0.3"
    with pytest.raises(UserError, match=message) as caught:
        prepare_data(tiny(*overrides))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_text_too_short_for_the_split_is_refused_before_anything_slow(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("some words\n" * 9000)
    overrides = [f"data.train={path}", f"data.cache_dir={tmp_path / 'cache'}", "data.validation_fraction=0.01"]
    messages: list[str] = []
    with pytest.raises(UserError, match=r"data\.train=.* has 7; raise it to 0\.143"):
        prepare_data(tiny(*overrides), progress=messages.append)
    assert messages == []
    prepare_data(tiny(*overrides, "data.validation_fraction=0.143"))


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
    with pytest.raises(UserError, match=r"mixes JSONL \(a\.jsonl\) and other files \(b\.txt\)"):
        open_corpus(str(tmp_path))
