"""Where text comes from: files on disk, or the running Python's own standard library.

A corpus is read as a stream of *documents*, each a stream of text pieces of at most ``PIECE`` characters, so that
neither a large file nor a large corpus is ever held in memory.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from poetx.errors import UserError

BUILTIN = "builtin"
PIECE = 1 << 20  # characters handed to the tokenizer at once
# A single text file has no document boundaries, so it is held out in runs of whole lines of about this size.
SECTION = 1 << 14  # characters
BUILTIN_BYTES = 16 << 20  # some versions of Python ship more than others
_SKIPPED_DIRS = {
    *("test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "__pycache__"),
}
_JSONL_SUFFIXES = (".jsonl", ".ndjson")
_LONGEST_LINE = 1 << 26  # characters read of a .json file to see whether it has a record a line

Kind = Literal["builtin", "file", "directory", "jsonl"]
Document = Iterable[str]


@dataclass(frozen=True)
class Corpus:
    """One text source: ``source`` as the user gave it, its kind, and its files in reading order."""

    source: str
    kind: Kind
    files: tuple[Path, ...]

    def documents(self) -> Iterator[Document]:
        """The documents in order. Each must be consumed before the next is asked for.

        Raises:
            UserError: a file that is not UTF-8 or vanished, or a JSONL line without text, with its place.
        """
        if self.kind == "jsonl":
            for path in self.files:
                yield from _jsonl_documents(path)
        elif self.kind == "file":
            yield from _sections(self.files[0])
        elif self.kind == "builtin":
            for path in self.files:
                if text := _read_or_none(path):
                    yield _split(text)
        else:
            for path in self.files:
                yield _pieces(path)

    def fingerprint(self) -> list[list[str | int]]:
        """Path, size and modification time (ns) of every file: what decides whether cached tokens are current."""
        rows: list[list[str | int]] = []
        for path in self.files:
            status = path.stat()
            rows.append([str(path), status.st_size, status.st_mtime_ns])
        return rows


def open_corpus(source: str, *, key: str = "data.train") -> Corpus:
    """Find the files of ``source``: "builtin", a text file, a JSONL file, or a directory of either.

    A ``.json`` file is JSONL when its first line is a record with a text. Any other is refused by itself, and text
    among other files, as in a directory of code.

    Args:
        key: the recipe key, for error messages.

    Raises:
        UserError: nothing there, nothing readable in it, or a directory that mixes text and JSONL.
    """
    if source == BUILTIN:
        return Corpus(source, "builtin", tuple(_standard_library()))
    path = Path(source).expanduser()
    if path.is_file():
        _check_not_empty([path], f"{key}={source}")
        kind: Kind = "jsonl" if _is_jsonl(path) else "file"
        if kind == "file":
            _check_not_json([path], f"{key}={source}")
        return Corpus(source, kind, (path.resolve(),))
    if not path.is_dir():
        raise UserError(f"{key}={source}: no such file or directory")
    files = sorted(
        file.resolve()
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise UserError(f"{key}={source}: the directory has no files")
    _check_not_empty(files, f"{key}={source}")
    jsonl = [file for file in files if _is_jsonl(file)]
    if not jsonl:
        _check_not_json(files, f"{key}={source}")
    if jsonl and len(jsonl) < len(files):
        other = next(file for file in files if file not in jsonl)
        raise UserError(f"{key}={source}: mixes JSONL ({jsonl[0].name}) and other files ({other.name})")
    return Corpus(source, "jsonl" if jsonl else "directory", tuple(files))


def held_out(index: int, fraction: float) -> bool:
    """Whether document ``index`` belongs to validation: evenly spread, exactly ``fraction`` of them in the end."""
    return int((index + 1) * fraction) > int(index * fraction)


def _check_not_empty(files: list[Path], what: str) -> None:
    if not any(file.stat().st_size for file in files):
        raise UserError(f"{what}: empty, there is no text in it")


def _check_not_json(files: list[Path], what: str) -> None:
    if all(file.suffix.lower() == ".json" for file in files):
        raise UserError(
            f'{what}: no JSON lines with a "text" field ({files[0].name}); write it as one {{"text": ...}} a line, '
            "or rename it to .txt to train on it as it is"
        )


def _is_jsonl(path: Path) -> bool:
    """Whether a file has a JSON record a line: by its name or, as ``.json`` may be anything, by its first line."""
    suffix = path.suffix.lower()
    if suffix != ".json":
        return suffix in _JSONL_SUFFIXES
    try:
        with path.open(encoding="utf-8-sig") as file:
            while (line := file.readline(_LONGEST_LINE)).isspace():
                pass
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "text" in record


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
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def _split(text: str) -> Iterator[str]:
    for start in range(0, len(text), PIECE):
        yield text[start : start + PIECE]


def _pieces(path: Path) -> Iterator[str]:
    """A file in pieces that end at line ends where there are any."""
    buffer: list[str] = []
    size = 0
    for line in _lines(path):
        buffer.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(buffer)
            buffer, size = [], 0
    if buffer:
        yield "".join(buffer)


def _sections(path: Path) -> Iterator[Document]:
    buffer: list[str] = []
    size = 0
    for line in _lines(path):
        buffer.append(line)
        size += len(line)
        if size >= SECTION:
            yield ["".join(buffer)]
            buffer, size = [], 0
    if buffer:
        yield ["".join(buffer)]


def _lines(path: Path) -> Iterator[str]:
    """Lines of at most ``SECTION`` characters each (a file need not have line ends)."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            while line := file.readline(SECTION):
                yield line
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} near byte {error.start} of a block)") from None


def _jsonl_documents(path: Path) -> Iterator[Document]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _split(_jsonl_text(line, f"{path}, line {number}"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from None


def _jsonl_text(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({getattr(error, 'msg', 'a number that is too long')})") from None
    except RecursionError:
        raise UserError(f"{place}: brackets nested too deeply to be read; remove the line") from None
    if not isinstance(record, dict) or "text" not in record:
        raise UserError(f'{place}: no "text" field')
    text = record["text"]
    if not isinstance(text, str):
        raise UserError(f'{place}: "text" is {type(text).__name__}, not a string')
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f'{place}: "text" has half a surrogate pair, which is no character')
    return text
