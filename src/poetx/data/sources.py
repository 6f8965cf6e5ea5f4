"""Where text comes from: files on disk, a data set on the Hub, or the running Python's own standard library.

A corpus is read as a stream of *documents*, each a stream of text pieces of at most ``PIECE`` characters, so that
neither a large file nor a large corpus is ever held in memory.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from poetx.data.chat import conversation, format_of
from poetx.data.opening import check_is_text, name_inside, open_text
from poetx.data.records import Record, holds_records, hub_records, kind_of, read_records, shown_fields
from poetx.errors import UserError
from poetx.files import read_json, reason
from poetx.recipe.places import is_hub_name, is_prepared

logger = logging.getLogger(__name__)

BUILTIN = "builtin"
PIECE = 1 << 20  # characters handed to the tokenizer at once
# A single text file has no document boundaries, so it is held out in runs of whole lines of about this size.
SECTION = 1 << 14  # characters
BUILTIN_BYTES = 16 << 20  # some versions of Python ship more than others
_SKIPPED_DIRS = {
    *("test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "__pycache__"),
}
_PATTERN = re.compile(r"[*?\[]")
#: What lies beside the records of a data set and is none of them.
_BESIDE = re.compile(r"(readme|licen[cs]e|notice|citation|dataset_infos?|state|croissant)(\.\w+)?", re.IGNORECASE)
_HELD_OUT = re.compile(r"(?<![a-z])(test|val|valid|validation|dev|eval)(?![a-z])")
#: Any of these in a record says that it is a conversation.
CHAT_FIELDS = ("messages", "conversations", "prompt", "instruction")

Sources = str | Sequence[str] | Mapping[str, float]
Kind = Literal["builtin", "file", "directory", "jsonl", "table", "hub"]
Document = Iterable[str]


@dataclass(frozen=True)
class Part:
    """One source of a corpus, as the user named it.

    Attributes:
        kind: "file" is one text without boundaries; "directory" are files of text, each a document; all but them and
            "builtin" are records.
        files: in reading order; none of a data set on the Hub.
        split: of such a data set.
        weight: its share of a mixture; None: every token once an epoch.
        top: a directory whose new files would belong to this part.
        format: of records, "text" or what conversations are written as.
    """

    source: str
    kind: Kind
    files: tuple[Path, ...] = ()
    split: str = "train"
    weight: float | None = None
    top: Path | None = None
    format: str = "text"

    def records(self) -> Iterator[tuple[str, Record]]:
        """Records with their places, of a part that has records."""
        if self.kind == "hub":
            yield from hub_records(self.source, split=self.split)
        for path in self.files:
            yield from read_records(path)

    def documents(self, section: int, text_field: str) -> Iterator[Document]:
        """The documents in order, a single file's in sections."""
        if self.kind == "file":
            yield from ([piece] for piece in _pieces(self.files[0], section, line=section))
        elif self.kind == "directory":
            yield from map(_pieces, self.files)
        elif self.kind == "builtin":
            for path in self.files:
                if text := _read_or_none(path):
                    yield _split(text)
        elif self.format != "text":
            for place, record in self.records():
                yield (message["content"] for message in conversation(record, self.format, place))
        else:
            for place, record in self.records():
                yield _split(_text_of(record, text_field, place))

    def fingerprint(self) -> list[list[str | int]]:
        """Path, size and times (ns) of every file: what decides whether cached tokens are current.

        Of the two times one is that of any change, which programs that bring old modification times back (``cp -p``,
        ``rsync -t``, ``tar``) cannot set. A data set on the Hub counts as current for ever.
        """
        if self.kind == "hub":
            return [[self.source, self.split]]
        rows: list[list[str | int]] = []
        for path in self.files:
            status = path.stat()
            rows.append([str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns])
        return rows


@dataclass(frozen=True)
class Corpus:
    """All sources of a text, one after the other."""

    parts: tuple[Part, ...]
    text_field: str = "text"

    @property
    def source(self) -> str:
        """The sources as the user named them."""
        return ", ".join(part.source for part in self.parts)

    @property
    def files(self) -> list[Path]:
        """All files in reading order."""
        return [file for part in self.parts for file in part.files]

    @property
    def weights(self) -> list[float] | None:
        """The shares of a mixture; None: none, every token once an epoch."""
        weights = [part.weight for part in self.parts if part.weight is not None]
        return weights or None

    @property
    def has_chats(self) -> bool:
        """Whether some of it are conversations."""
        return any(part.format != "text" for part in self.parts)

    @property
    def has_text_records(self) -> bool:
        """Whether some of it are records with a field of text."""
        return any(part.kind in ("jsonl", "table", "hub") and part.format == "text" for part in self.parts)

    def documents(self, section: int = SECTION) -> Iterator[Document]:
        """The documents in order, single files' in sections. Each must be consumed before the next is asked for.

        Args:
            section: characters of a single file's.

        Raises:
            UserError: a file that is not UTF-8 or damaged, or a record without text, with its place.
        """
        for part in self.parts:
            yield from part.documents(section, self.text_field)


def open_corpus(
    source: Sources,
    *,
    key: str = "data.train",
    text_field: str = "text",
    format: str = "auto",
    split: str = "train",
) -> Corpus:
    """Find the files of one or several sources.

    A source is "builtin", a text file, a file of records (JSONL, CSV, Parquet, Arrow), a directory of either, a pattern
    like ``data/*.jsonl.gz``, a directory of ``save_to_disk``, or the name of a data set on the Hub. Any file may be
    compressed. A ``.json`` file is a list of records, or JSONL when its first line is one. Any other is refused by
    itself, and is text
    among other files, as in a directory of code; so are tables (``.csv``, ``.tsv``) and lists among text.

    Args:
        source: one, several, or several with their weights.
        key: the recipe key, for error messages.
        text_field: the field of records that has their text.
        format: what records are: ``text``, ``messages``, ``sharegpt``, ``prompt`` or ``alpaca``; ``auto``: what the
            fields of the first one say.
        split: of data sets on the Hub.

    Raises:
        UserError: nothing there, nothing readable in it, or a directory that mixes records and text.
    """
    weights = source if isinstance(source, Mapping) else {}
    names = [source] if isinstance(source, str) else list(source)
    found = [_find(name, key, text_field, split, weights.get(name)) for name in names]
    _check_disjoint(found, key)
    return Corpus(tuple(_formatted(part, format, text_field) for part in found), text_field)


def _check_disjoint(parts: Sequence[Part], key: str) -> None:
    """Refuse a file in two sources: it would be learnt twice, and what one of them holds out by the other."""
    where: dict[tuple[int, int | str], str] = {}
    for part in parts if len(parts) > 1 else ():
        for file in part.files:
            if (other := where.setdefault(_identity(file), part.source)) != part.source:
                raise UserError(f"{key}: {file} is in {other} and in {part.source}; name it in one of them")


def _formatted(part: Part, format: str, text_field: str) -> Part:
    if part.kind in ("builtin", "file", "directory"):
        if format not in ("auto", "text"):
            raise UserError(f"data.format={format}: {part.source} is text, which has no records; leave it out")
        return part
    if format == "auto":
        first = next(part.records(), None)
        record = first[1] if first else {}
        format = format_of(record, text_field)
        if format == "text" and text_field in record and (chats := format_of(record, "")) != "text":
            logger.warning(
                '%s: its "%s" field is trained on; its records are conversations, too: data.format=%s takes those',
                *(part.source, text_field, chats),
            )
    return replace(part, format=format)


def _find(source: str, key: str, text_field: str, split: str, weight: float | None) -> Part:
    if source == BUILTIN:
        return Part(source, "builtin", tuple(_standard_library()), weight=weight)
    if not source:
        raise UserError(f"{key}=: names no file; give a text file, a directory of text, or JSONL")
    path, top = Path(source).expanduser(), None
    if is_prepared(source):
        raise UserError(f"{key}={source}: tokens of poetx data, which data.train alone reads, by itself; give the text")
    if path.is_file():
        files = [path.resolve()]
    elif path.is_dir():
        files, top = _files_under(path, f"{key}={source}"), path
    elif _PATTERN.search(source):
        files = _once(_readable([Path(name) for name in glob.glob(str(path), recursive=True)]))  # noqa: PTH207
        if not files:
            raise UserError(f"{key}={source}: no file fits this pattern")
        if "**" in source:
            top = Path(source[: source.index("**")] or ".")
    elif is_hub_name(source):
        return Part(source, "hub", split=split, weight=weight)
    elif path.exists():
        raise UserError(f"{key}={source}: a pipe or a device, which cannot be read again; write it into a file first")
    else:
        several = f"; several are a list, {key}=[A, B]" if "," in source else ""
        raise UserError(f"{key}={source}: no such file or directory{several}")
    kind, files = _kind(files, f"{key}={source}", text_field, alone=path.is_file())
    return Part(source, kind, tuple(files), weight=weight, top=top)


def _files_under(path: Path, what: str) -> list[Path]:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in path.iterdir() if (child / "state.json").is_file())
        raise UserError(f"{what}: a directory of save_to_disk with the splits {', '.join(splits)}; name one of them")
    if (path / "state.json").is_file() and "_data_files" in (state := read_json(path / "state.json")):
        if state.get("_indices_data_files"):
            raise UserError(f"{what}: a selection of its rows, which is not read; save what flatten_indices() gives")
        return [(path / file["filename"]).resolve() for file in state["_data_files"]]
    files = _once(_readable(_visible(path)))
    if not files:
        raise UserError(f"{what}: the directory has no files (hidden ones are not read)")
    return files


def _readable(found: Iterable[Path]) -> list[Path]:
    """The files among what was found. What else has text, or had, is said."""
    found = list(found)
    files = [path for path in found if path.is_file()]
    entered = {parent for file in files for parent in file.parents}
    for path in sorted(set(found).difference(files, entered)):
        if not path.exists():
            what = "a link to what is not there"
        elif path.is_dir():
            what = "a link to a directory" if path.is_symlink() else "a directory"
        else:
            what = "a pipe, a socket or a device"
        logger.warning("%s: %s, which is not read", path, what)
    return files


#: Files that Spark and Hive write beside a table.
_MARK = re.compile(r"_SUCCESS|_(common_)?metadata|_(committed|started)_\d+")
#: Hidden names that hold no text of the data.
_TOOLS = {".git", ".gitignore", ".gitattributes", ".gitkeep", ".github", ".DS_Store", ".cache", ".ipynb_checkpoints"}


def _visible(directory: Path) -> Iterator[Path]:
    """All files and links below a directory that are not hidden. Raises :class:`UserError` where it is unreadable."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed ({reason(error)}); make it readable, or move it away")

    hidden: list[Path] = []
    for place, directories, files in os.walk(directory, onerror=refuse):
        hidden += [Path(place, name) for name in [*directories, *files] if name.startswith(".") and name not in _TOOLS]
        directories[:] = [name for name in directories if not name.startswith(".")]
        links = [name for name in directories if Path(place, name).is_symlink()]
        yield from (Path(place, name) for name in [*links, *files] if not (name[0] == "." or _MARK.fullmatch(name)))
    if hidden:
        logger.warning("%s: %d hidden, %s first, which are not read", directory, len(hidden), min(hidden).name)


def _once(files: Iterable[Path]) -> list[Path]:
    """Sorted, and one name of each file: text that is linked to would else be learnt and held out."""
    once = {_identity(file): file for file in sorted(path.resolve() for path in files)}
    names = set(once.values())
    for file in sorted(names):
        if (inside := name_inside(file)) != file and inside in names:
            logger.warning("%s and %s are both there, and both are read; move one away", inside, file.name)
    return sorted(names)


def _identity(file: Path) -> tuple[int, int | str]:
    """What all names of a file share."""
    status = file.stat()
    return status.st_dev, status.st_ino or str(file)


def _kind(files: list[Path], what: str, text_field: str, *, alone: bool) -> tuple[Kind, list[Path]]:
    """What the files of a source are, and those of them that are read."""
    if not any(file.stat().st_size for file in files):
        raise UserError(f"{what}: empty, there is no text in it")
    kinds = {file: kind_of(file, (text_field, *CHAT_FIELDS)) for file in files}
    own = [file for file in files if not _BESIDE.fullmatch(file.name)]
    if {kinds[file] for file in own} - {"text"}:
        files = own
    if not alone and "text" in (found := {kinds[file] for file in files}) and found <= {"text", "CSV", "JSON"}:
        kinds = dict.fromkeys(files, "text")  # tables and lists are text among text, as in a directory of code
    readable = [file for file in reversed(files) if kinds[file] not in ("Parquet", "Arrow")]
    for file in {file.suffix: file for file in readable}.values():  # one of each kind
        check_is_text(file)
    if all(file.name.lower().endswith(".json") and kinds[file] == "text" for file in files):
        raise UserError(
            f'{what}: no JSON lines with a "{text_field}" field ({files[0].name}); write it as one {{"text": ...}} a '
            "line into a .jsonl file, or rename it to .txt to train on it as it is"
        )
    first, other = files[0], next((file for file in files if kinds[file] != kinds[files[0]]), None)
    if other is not None:
        raise UserError(f"{what}: mixes {kinds[first]} ({first.name}) and {kinds[other]} ({other.name}); name one kind")
    if kinds[first] == "text":
        if holds_records(first, (text_field, *CHAT_FIELDS)):
            raise UserError(f"{first}: its lines are JSON records, and its name says text; let that end in .jsonl")
        return ("file" if alone else "directory"), files
    held_out = [file.name for file in files if _HELD_OUT.search(file.name)]
    if 0 < len(held_out) < len(files):
        logger.warning("%s: %s is trained on as well; a pattern such as DIR/train* leaves it out", what, held_out[0])
    return ("jsonl" if kinds[first] in ("JSONL", "JSON") else "table"), files


def _standard_library() -> list[Path]:
    """The .py files of the running Python's standard library, sorted, up to ``BUILTIN_BYTES`` in all."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files, total = [], 0
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_DIRS.intersection(path.relative_to(root).parts):
            continue
        total += path.stat().st_size
        if total > BUILTIN_BYTES:
            break
        files.append(path)
    if not files:
        raise UserError(
            f"data.train=builtin: this Python has no standard library source in {root}; give data.train=PATH"
        )
    return files


def _read_or_none(path: Path) -> str | None:
    """The text, or None where a file of the standard library is not UTF-8 (encoding tests are not)."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return None


def _split(text: str) -> Iterator[str]:
    for start in range(0, len(text), PIECE):
        yield text[start : start + PIECE]


def _pieces(path: Path, size: int = PIECE, *, line: int = SECTION) -> Iterator[str]:
    """A file in pieces of about ``size`` characters that end at line ends; a line may be cut after ``line``."""
    buffer: list[str] = []
    filled = 0
    with open_text(path, newline="") as file:
        while text := file.readline(line):
            if "\0" in text:
                raise UserError(f"{path}: has NUL bytes, so is binary, UTF-16 or damaged; move it away, or mend it")
            buffer.append(text)
            filled += len(text)
            if filled >= size:
                yield "".join(buffer)
                buffer, filled = [], 0
    if buffer:
        yield "".join(buffer)


#: Fields of questions and of answers, under names that are no format of their own.
_ANSWERED = (("prompt", "chosen"), ("question", "answer"), ("prompt", "response"), ("question", "response"))


def _text_of(record: Record, field: str, place: str) -> str:
    if field not in record:
        answers = next((names for names in _ANSWERED if set(names) <= record.keys()), None)
        if answers:
            raise UserError(
                f'{place}: no "{field}" field (it has: {shown_fields(record)}); to learn the answers, call '
                f'{answers[0]} and {answers[1]} "prompt" and "completion"'
            )
        raise UserError(
            f'{place}: no "{field}" field (it has: {shown_fields(record)}); name the one with the text by '
            f'data.text_field=NAME (of poetx eval --text-field), or call it "{field}"'
        )
    text = record[field]
    if not isinstance(text, str):
        raise UserError(f'{place}: "{field}" is {type(text).__name__}, not a string')
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f'{place}: "{field}" has half a surrogate pair, which is no character')
    return text
