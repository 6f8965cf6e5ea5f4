"""Every kind of source gives the same documents, whatever it is packed in; every wrong one is one line."""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib.util
import io
import json
import lzma
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from poetx.data.opening import check_is_text, open_text
from poetx.data.prepare import prepare_data
from poetx.data.sampler import batch_windows
from poetx.data.sources import open_corpus
from poetx.data.tokens import TokenWindows
from poetx.errors import UserError
from poetx.recipe import Recipe, load_recipe

Tiny = Callable[..., Recipe]
TEXTS = [f"document {number}: some words, with \"quotes\",\ncommas and 'é'" for number in range(40)]


def needs(module: str) -> Any:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"no {module}")


def jsonl(field: str = "text") -> bytes:
    return "".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(TEXTS)).encode()


def table(separator: str) -> bytes:
    file = io.StringIO()
    csv.writer(file, delimiter=separator).writerows([["id", "text"], *enumerate(TEXTS)])
    return file.getvalue().encode()


def zstd(data: bytes) -> bytes:
    compressor = pytest.importorskip("zstandard").ZstdCompressor()
    return compressor.compress(data[:700]) + compressor.compress(data[700:])  # as pzstd writes it, in several frames


def arrow(path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    rows = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    if kind == "parquet":
        from pyarrow.parquet import write_table

        write_table(rows, path, row_group_size=7)
        return
    new = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
    with new(str(path), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=7)


SOURCES: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_bytes(jsonl()),
    "a.ndjson.gz": lambda path: path.write_bytes(gzip.compress(jsonl())),
    "a.json.xz": lambda path: path.write_bytes(lzma.compress(jsonl())),
    "a.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(jsonl())),
    "b.jsonl": lambda path: path.write_bytes(gzip.compress(jsonl())),  # compressed, whatever it is called
    "a.jsonl.zst": lambda path: path.write_bytes(zstd(jsonl())),
    "a.json": lambda path: path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=2)),
    "b.json.gz": lambda path: path.write_bytes(gzip.compress(b"\n[" + jsonl().strip().replace(b"\n", b"\n,") + b"]\n")),
    "a.csv": lambda path: path.write_bytes(table(",")),
    "a.TSV.gz": lambda path: path.write_bytes(gzip.compress(table("\t"))),
    "a.parquet": lambda path: arrow(path, "parquet"),
    "a.arrow": lambda path: arrow(path, "file"),
    "data-00000-of-00001.arrow": lambda path: arrow(path, "stream"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_kind_of_file_has_the_same_documents(name: str, tmp_path: Path) -> None:
    SOURCES[name](tmp_path / name)
    (tmp_path / "README.md").write_text("what it is")  # beside records, it is none
    for source in (tmp_path / name, tmp_path, tmp_path / "*[ltwvV23zn]"):
        assert ["".join(document) for document in open_corpus(str(source)).documents()] == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_text_is_the_text(suffix: str, tmp_path: Path) -> None:
    text = "a line of some words\r\n" * 20_000
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}[suffix]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack(text.encode()))
    (part,) = open_corpus(str(path)).parts
    assert part.kind == "file"
    assert "".join("".join(document) for document in part.documents(1 << 14, "text")) == text
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(UserError, match=rf"^{path}: damaged .* data \(.*\); fetch it again$"), open_text(path) as file:
        file.read()


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("zstandard", "pyarrow", "datasets", "compression"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd\x24\x04")
    (tmp_path / "b.parquet").write_bytes(b"PAR1\x15\x04")
    (tmp_path / "c.arrow").write_bytes(b"ARROW1\x15\x04")
    for name in ("a.txt.zst", "b.parquet", "c.arrow"):
        with pytest.raises(UserError, match=rf"{name}: .*; pip install 'poetx\[data\]' to read it, or "):
            list(open_corpus(str(tmp_path / name)).documents())
    with pytest.raises(UserError, match=r"^some/set: .*pip install 'poetx\[data\]', or hf download some/set"):
        list(open_corpus("some/set").documents())


def test_a_directory_of_save_to_disk(tmp_path: Path) -> None:
    """Its caches are not read, and one of several splits must be named."""
    place = tmp_path / "set" / "train"
    place.mkdir(parents=True)
    arrow(place / "data-00000-of-00001.arrow", "stream")
    (place / "cache-0123.arrow").write_bytes(b"not that")
    (place / "dataset_info.json").write_text("{}")
    (place / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert ["".join(document) for document in open_corpus(str(place)).documents()] == TEXTS
    with pytest.raises(UserError, match=r"save_to_disk with the splits train; name one of them"):
        open_corpus(str(tmp_path / "set"))


def test_a_data_set_on_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*where: str | None, **how: Any) -> Iterator[dict[str, str]]:
        asked.append((*where, how))
        return iter({"text": text} for text in TEXTS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for name in ("some/set", "some/set:part", "some/set::test"):
        assert ["".join(document) for document in open_corpus(name).documents()] == TEXTS
    stream = {"streaming": True, "split": "train"}
    assert asked[::2] == [  # its first record says what it is
        ("some/set", None, stream),
        ("some/set", "part", stream),
        ("some/set", None, stream | {"split": "test"}),
    ]


def test_another_field_of_the_records_is_the_text(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(jsonl("content"))
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    with pytest.raises(UserError, match=r'no JSON lines with a "text" field'):
        prepare_data(tiny(f"data.train={path}", cache))
    named = prepare_data(tiny(f"data.train={path}", cache, "data.text_field=content"))
    path.with_suffix(".jsonl").write_bytes(jsonl())
    assert named.meta.fingerprint == prepare_data(tiny(f"data.train={path}l", cache)).meta.fingerprint


def test_several_sources_are_one_text(tiny: Tiny, tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    sources = [f"{corpus}/[0-3].txt", f"{corpus}/4.txt", str(tmp_path / "a.jsonl")]
    found = open_corpus(sources)
    texts = [path.read_text() for path in sorted(corpus.iterdir())[:5]] + TEXTS
    assert "".join("".join(document) for document in found.documents()) == "".join(texts)
    data = prepare_data(tiny(f"data.train={json.dumps(sources)}", "data.validation_fraction=0.1"))
    assert data.meta.validation_tokens
    assert data.train.order == len(data.train)


def test_a_mixture_takes_every_source_by_its_weight(tiny: Tiny, tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    few = {str(tmp_path / "a.jsonl"): 3, str(corpus): 1}
    data = prepare_data(tiny(f"data.train={json.dumps(few)}"))
    small = int(data.meta.shares[0][0])
    assert sum(size for size, _ in data.meta.shares) == data.meta.train_tokens
    batches = [
        window for step in range(2500) for window in batch_windows(step, batch_size=8, windows=data.train.order, seed=0)
    ]
    of_small = [window for window in batches if data.train.start(window) < small]
    assert len(of_small) == 15_000
    visits = {window: of_small.count(window) for window in set(of_small)}
    assert len(visits) == (small - 1) // 16  # each window of it, as often as any other
    assert max(visits.values()) - min(visits.values()) <= 1
    assert batches[: 8 * 9] != [
        window for step in range(9) for window in batch_windows(step, batch_size=8, windows=data.train.order, seed=1)
    ]
    heavier = prepare_data(tiny(f"data.train={json.dumps(few | {str(corpus): 2})}"))
    assert heavier.meta.fingerprint != data.meta.fingerprint  # a run with other weights is another run


def test_no_window_has_tokens_of_two_sources() -> None:
    import numpy as np

    windows = TokenWindows(np.arange(30), seq_len=4, shares=[(11, 1.0), (19, 2.0)])
    assert windows.order == [(2, 1.0), (4, 2.0)]
    assert [windows.start(window) for window in range(len(windows))] == [0, 4, 11, 15, 19, 23]
    assert windows.batch([1, 2]).labels.tolist() == [[5, 6, 7, 8], [12, 13, 14, 15]]


def test_paths_of_a_recipe_are_absolute_and_names_on_the_hub_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    recipe = load_recipe("demo", ["data.train={a.txt: 1, builtin: 2, some/set: 3, there/set: 4, a/b.jsonl: 5}"])
    expected = [tmp_path / "a.txt", "builtin", "some/set", tmp_path / "there/set", tmp_path / "a/b.jsonl"]
    assert list(recipe.data.train or ()) == list(map(str, expected))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert load_recipe("demo", ["data.train=[a.txt, some/set]"]).data.train == (str(expected[0]), "some/set")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{a.txt: 0, b.txt: 1}", "positive weights"),
        ("{a.txt: heavy}", "positive weights"),
        ("{a.txt: 1, b.txt: 30000}", "without weights below 1/20000 of all"),
        ("{}", "positive weights"),
        ("[]", "list of different paths"),
        ("[a.txt, a.txt]", "list of different paths"),
        ("[3]", "must be text"),
    ],
)
def test_wrong_lists_and_weights(value: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.train=.*{message}"):
        load_recipe("demo", [f"data.train={value}"])
    with pytest.raises(UserError, match=r"^data\.validation: has weights"):
        load_recipe("demo", ["data.validation={a.txt: 1}"])


WRONG: dict[str, tuple[bytes, str]] = {
    "page.txt.gz": (b"<html>not found</html>", "not gzip-compressed, as its name says; rename it, or fetch it again"),
    "b.txt.zst": (b"words", "not Zstandard-compressed, as its name says"),
    "cut.jsonl.gz": (gzip.compress(jsonl())[:-40], r"damaged gzip data \(.*\); fetch it again"),
    "bits.jsonl.xz": (lzma.compress(jsonl())[:60] + bytes(90), "damaged xz data"),
    "bits.txt.bz2": (bz2.compress(jsonl())[:80] + bytes(90), "damaged bzip2 data"),
    "latin.txt.gz": (gzip.compress(b"caf\xe9 " * 3000), "not UTF-8"),
    "tar.txt.gz": (gzip.compress(bytes(257).replace(b"\0", b"a") + b"ustar\0\0\0"), "a tar archive|NUL bytes"),
    "no.csv": (b"id,words\n1,some\n", r'line 2: no "text" field \(it has: id, words\); name .* by data\.text_field='),
    "second.txt.bz2": (
        bz2.compress(b"some words\n" * 99) + b"X" + bz2.compress(b"more\n" * 99)[1:],
        "damaged bzip2 data",
    ),
    "second.txt.xz": (
        lzma.compress(b"some words\n" * 99) + b"X" + lzma.compress(b"more\n" * 99)[1:],
        "damaged xz data",
    ),
    "zeros.txt": (b"some words\n" * 2000 + bytes(60), "has NUL bytes, so is binary, UTF-16 or damaged; move it away"),
    "names.tsv": (b"id\ttext\tid\n1\tsome\t2\n", 'its header names "id" twice; rename one'),
    "ragged.csv": (b"id,text\n1,some\n2,a,b\n", r"line 3: 3 fields under a header of 2 \(id, text\); quote"),
    "quote.csv": (b'id,text\n1,"some"x\n', r"line 2: not CSV \(.*\); mend its quotes"),
    "head.tsv": (b"1\twords\n2\tmore\n", r'line 2: no "text" field \(it has: 1, words\)'),
    "none.jsonl": (b'{"text": null}\n', r'line 1: "text" is NoneType, not a string'),
    "half.jsonl": (b'{"text": "\\ud800"}\n', "half a surrogate pair"),
    "list.jsonl": (b'[{"text": "a"}]\n', "line 1: list, not a record"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
    "cut.json": (json.dumps([{"text": "a"}] * 9)[:-40].encode(), "record 7: not JSON"),
    "open.json": (b'[{"text": "a"}', "record 2: not JSON .a comma is missing before it, or the list does not end"),
    "comma.json": (b'[{"text": "a"}, {"text": "b"} {"text": "c"}]', "record 3: not JSON .a comma is missing"),
    "two.json": (b'[{"text": "a"}]\n[{"text": "b"}]', "goes on after the end of its list"),
    "mixed.json": (b'[{"text": "a"}, "b"]', r"record 2: str, not a record; write \[\{\"text\": ...\}, ...\]"),
    "deep.json": (b'[{"text": "a"}, ' + b"[" * 100_000, "record 2: brackets nested too deeply"),
    "wide.txt": ("words".encode("utf-16"), "UTF-16 text"),
    "nul.jsonl": (b'{"text": "a"}\0\n', "NUL bytes"),
    "twice.ndjson": (
        b'{"text": "a"}\n{"text": "b", "of": {"url": 1, "url": 2}}\n',
        'line 2: has "url" twice; leave one',
    ),
    "twice.json": (b'[{"text": "a"}, {"text": "b", "text": "c"}]', 'record 2: has "text" twice; leave one'),
    "first.json": (b'[{"text": "b", "text": "c"}]', 'record 1: has "text" twice; leave one'),
    "bars.csv": (
        b"id|text\n1|some, more\n",
        r"header is one field \(id.text\), separated by '.' perhaps; separate fields",
    ),
    "commas.tsv": (b"id,text\n1,some\n", r"header is one field \(id,text\), separated by ',' perhaps"),
    "space.csv": (b"id, text\n1, some\n", r"no \"text\" field \(it has: id, ' text'\)"),
    "indented.jsonl": (b'{\n "text": "a"\n}\n', "line 1: not JSON .*; write one whole record a line"),
    "lfs.csv": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "a pointer of Git LFS, not the file",
    ),
    "records.txt": (b'{"text": "a", "id": 1}\n\n{"text": "b"}\nmore', "its lines are JSON records, and its name says"),
    "dump.log.gz": (
        gzip.compress(b'{"messages": [{"role": "user", "content": "a"}]}\n' * 9),
        "its lines are JSON records, and its name says text",
    ),
    "pairs.jsonl": (
        b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
        'to learn the answers, call prompt and chosen "prompt" and "completion"',
    ),
    "sums.csv": (b"question,answer\na,b\n", 'to learn the answers, call question and answer "prompt" and "completion"'),
    "string.jsonl": (b'"words"\n', r"line 1: str, not a record"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_in_a_file_is_one_line(name: str, tiny: Tiny, tmp_path: Path) -> None:
    content, message = WRONG[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        prepare_data(tiny(f"data.train={tmp_path / name}", "data.validation_fraction=0.5"))
    assert str(caught.value).startswith(f"{tmp_path / name}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "data-1.arrow"])
def test_tables_that_are_cut_off(name: str, tmp_path: Path) -> None:
    SOURCES.get(name, SOURCES["data-00000-of-00001.arrow"])(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"{name}: not a whole (Parquet|Arrow) file \(.*\); fetch it again"):
        list(open_corpus(str(tmp_path / name)).documents())


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress, gzip.compress])
def test_every_stream_of_a_file_is_read(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    parts = [f"{number}\n".encode() * 9000 for number in range(3)]
    padding = bytes(8) if compress is not bz2.compress else b""  # which xz and gzip allow
    path = tmp_path / "a.txt"
    path.write_bytes(padding.join(map(compress, parts)) + padding)
    with open_text(path) as file:
        assert file.read().encode() == b"".join(parts)


def test_a_file_in_two_sources_is_refused_and_a_compressed_twin_is_said(
    tmp_path: Path, corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "link").symlink_to(corpus)
    for other in (corpus / "3.txt", tmp_path / "link", f"{corpus}/[0-4].txt"):
        with pytest.raises(UserError, match=rf"data\.train: {corpus}/\d\.txt is in .* and in .*; name it in one"):
            open_corpus({str(corpus): 1, str(other): 2})
    place = tmp_path / "twins"
    place.mkdir()
    (place / "a.jsonl").write_bytes(jsonl())
    (place / "a.jsonl.xz").write_bytes(lzma.compress(jsonl()))
    open_corpus(str(place))
    assert "a.jsonl and a.jsonl.xz are both there, and both are read; move one away" in caplog.text


@pytest.mark.parametrize("setting", ["data.chat_template=a.jinja", "data.text_field=body"])
def test_a_setting_that_no_text_reads_is_said(setting: str, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(table(",").replace(b"text", b"body"))
    said: list[str] = []
    prepare_data(tiny(setting), progress=said.append)
    assert any("has no effect, there are no" in text for text in said)
    if "text_field" in setting:
        said.clear()
        prepare_data(tiny(f"data.train={tmp_path / 'a.csv'}", setting), progress=said.append)
        assert not any("no effect" in text for text in said)


def test_a_list_longer_than_what_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from poetx.data import records

    monkeypatch.setattr(records, "_PIECE", 7)  # every place at which a value can be cut
    rows = [{"text": text, "more": [1, {"a": None}]} for text in (*TEXTS, "", 'a "quoted] one', "\u00e9" * 50)]
    for name, indent in (("a.json", None), ("b.json", 1)):
        (tmp_path / name).write_text(json.dumps(rows, indent=indent))
        assert [record for _, record in records.read_records(tmp_path / name)] == rows
    (tmp_path / "c.json").write_text(" [ ] ")
    assert list(records.read_records(tmp_path / "c.json")) == []


def test_patterns_and_names_that_mean_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=r"no file fits this pattern"):
        open_corpus(f"{tmp_path}/*.txt")
    with pytest.raises(UserError, match=r"^data\.train=nowhere/a\.txt: no such file or directory"):
        open_corpus("nowhere/a.txt")
    with pytest.raises(
        UserError, match=r"^data\.train=a\.txt,b\.txt: no such .*; several are a list, data\.train=\[A, B\]"
    ):
        open_corpus("a.txt,b.txt")
    for name in ("train-0.jsonl", "test-0.jsonl"):
        (tmp_path / name).write_bytes(jsonl())
    open_corpus(str(tmp_path))
    assert "test-0.jsonl is trained on as well; a pattern such as DIR/train* leaves it out" in caplog.text
    caplog.clear()
    assert len(open_corpus(f"{tmp_path}/train*").files) == 1
    assert caplog.text == ""
    check_is_text(tmp_path / "train-0.jsonl")


@pytest.mark.parametrize("source", ["", "/*", "/*.d"])
def test_what_has_text_and_is_not_read_is_said(source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.d").write_text("some words")
    (tmp_path / "gone.d").symlink_to("unmounted/b.txt")
    os.mkfifo(tmp_path / "pipe.d")
    if source:
        (tmp_path / "part.d").mkdir()
        (tmp_path / "part.d/c.txt").write_text("more words")
    assert len(open_corpus(f"{tmp_path}{source}").files) == 1
    said = ["gone.d: a link to what is not there", "part.d: a directory", "pipe.d: a pipe, a socket or a device"]
    assert caplog.messages == [f"{tmp_path}/{text}, which is not read" for text in said if source or "part" not in text]
    caplog.clear()
    if source == "/*":
        assert len(open_corpus(f"{tmp_path}/**").files) == 2
        assert "part.d" not in caplog.text
    with pytest.raises(UserError, match=r"pipe\.d: a pipe or a device, .* write it into a file first$"):
        open_corpus(str(tmp_path / "pipe.d"))


def test_marks_beside_a_table_are_no_text_of_it(tmp_path: Path) -> None:
    for name in ("lang=de/0.jsonl", "lang=en/0.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(jsonl())
    for name in ("_SUCCESS", "_committed_31415", "lang=en/_metadata"):
        (tmp_path / name).touch()
    assert len(open_corpus(str(tmp_path)).files) == 2


def test_hidden_files_are_left_out_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".git").mkdir()
    for name in ("a.txt", ".b.txt", ".git/c.txt"):
        (tmp_path / name).write_text("some words")
    assert len(open_corpus(str(tmp_path)).files) == 1
    assert caplog.messages == [f"{tmp_path}: 1 hidden, .b.txt first, which are not read"]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"has no files \(hidden ones are not read\)"):
        open_corpus(str(tmp_path))


def test_a_selection_of_rows_is_refused(tmp_path: Path) -> None:
    state = {"_data_files": [{"filename": "data.arrow"}], "_indices_data_files": [{"filename": "indices.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"a selection of its rows, which is not read; save what flatten_indices"):
        open_corpus(str(tmp_path))


@pytest.mark.parametrize("format", ["auto", "text", "alpaca"])
def test_conversations_that_have_a_text_as_well_are_said(
    format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"instruction": "count", "input": "to 3", "output": "1 2 3", "text": "count to 3: 1 2 3"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (part,) = open_corpus(str(tmp_path / "a.jsonl"), format=format).parts
    assert part.format == ("alpaca" if format == "alpaca" else "text")
    assert ("conversations, too: data.format=alpaca takes those" in caplog.text) == (format == "auto")
