"""Where text comes from: files on disk, or the running Python's own standard library.

A corpus is read as a stream of *documents*, each a stream of text pieces of at most ``PIECE`` characters, so that
neither a large file nor a large corpus is ever held in memory.
"""

from __future__ import annotations

import json
import logging
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from poetx.data.binary import binary_kind
from poetx.errors import UserError

logger = logging.getLogger(__name__)

BUILTIN = "builtin"
PIECE = 1 << 20  # characters handed to the tokenizer at once
# A single text file has no document boundaries, so it is held out in runs of whole lines of about this size.
SECTION = 1 << 14  # characters
BUILTIN_BYTES = 16 << 20  # some versions of Python ship more than others
_SKIPPED_DIRS = {
    *("test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "__pycache__"),
}
_JSONL_SUFFIXES = (".jsonl", ".ndjson")
_FEW_SECTIONS = 40  # of a file too short for sections of the usual size
_LONGEST_LINE = 1 << 26  # characters read of a .json file to see whether it has a record a line

Kind = Literal["builtin", "file", "directory", "jsonl"]
Document = Iterable[str]


@dataclass(frozen=True)
class Corpus:
    """One text source: ``source`` as the user gave it, its kind, and its files in reading order."""

    source: str
    kind: Kind
    files: tuple[Path, ...]

    def documents(self, section: int = SECTION) -> Iterator[Document]:
        """The documents in order, a single file's in sections. Each must be consumed before the next is asked for.

        Args:
            section: characters of a single file's.

        Raises:
            UserError: a file that is not UTF-8 or vanished, or a JSONL line without text, with its place.
        """
        if self.kind == "jsonl":
            for path in self.files:
                yield from _jsonl_documents(path)
        elif self.kind == "file":
            yield from _sections(self.files[0], section)
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

    A ``.json`` file is JSONL when its first line is a record with a text. Any other is refused by itself, as are
    tables (``.csv``, ``.tsv``), and both are text among other files, as in a directory of code.

    Args:
        key: the recipe key, for error messages.

    Raises:
        UserError: nothing there, nothing readable in it, or a directory that mixes text and JSONL.
    """
    if source == BUILTIN:
        return Corpus(source, "builtin", tuple(_standard_library()))
    if not source:
        raise UserError(f"{key}=: names no file; give a text file, a directory of text, or JSONL")
    path = Path(source).expanduser()
    if path.is_file():
        _check_text([path], f"{key}={source}")
        return Corpus(source, "jsonl" if _is_jsonl(path) else "file", (path.resolve(),))
    if not path.is_dir():
        raise UserError(f"{key}={source}: no such file or directory")
    visible = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    for link in visible:
        if link.is_symlink() and link.is_dir():
            logger.warning("%s: a link to a directory, which is not followed", link)
    once = {_identity(file): file for file in sorted(p.resolve() for p in visible if p.is_file())}
    files = sorted(once.values())
    if not files:
        raise UserError(f"{key}={source}: the directory has no files")
    _check_text(files, f"{key}={source}")
    jsonl = [file for file in files if _is_jsonl(file)]
    if jsonl and len(jsonl) < len(files):
        other = next(file for file in files if file not in jsonl)
        raise UserError(f"{key}={source}: mixes JSONL ({jsonl[0].name}) and other files ({other.name})")
    return Corpus(source, "jsonl" if jsonl else "directory", tuple(files))


def _identity(file: Path) -> tuple[int, int | str]:
    """What two names of one file share: text that is linked to would else be learnt and held out."""
    status = file.stat()
    return status.st_dev, status.st_ino or str(file)


@dataclass(frozen=True)
class Split:
    """Which documents are held out for validation: evenly spread, exactly ``fraction`` of them in the end.

    Attributes:
        section: characters of a document where a single file is cut into them.
        note: what the user should know of it.
    """

    fraction: float | Fraction = 0
    section: int = SECTION
    note: str = ""

    def held_out(self, index: int) -> bool:
        """Whether document ``index`` belongs to validation."""
        return int((index + 1) * self.fraction) > int(index * self.fraction)


def split_for(corpus: Corpus, fraction: float) -> Split:
    """The split of ``fraction``. Of so little text that this holds out nothing: a tenth, and at least one document.

    Reads to the first document that is held out.

    Raises:
        UserError: no text, or one document that is not a file by itself.
    """
    split, count, characters = Split(fraction), 0, 0
    for index, document in enumerate(corpus.documents()):
        if split.held_out(index):
            return split
        count, characters = count + 1, characters + sum(map(len, document))
    if count == 0:
        raise UserError(f"data.train={corpus.source}: no text to train on")
    if corpus.kind == "file":
        section = max(1, characters // _FEW_SECTIONS)
        more: float | Fraction = max(fraction, 0.1)
        what = f"{more:.0%} of it, in sections of {section} characters"
    elif count > 1:
        section, more = SECTION, Fraction(1, min(10, count))
        what = f"{int(count * more)} of its {count} documents"
    else:
        raise UserError(
            f"data.validation_fraction={fraction} holds out nothing: data.train={corpus.source} is one document; "
            "give the text file itself, which is held out in sections, more documents, or data.validation=PATH"
        )
    note = f"data.validation_fraction={fraction} is nothing of so little text: holding out {what}"
    return Split(more, section, note)


def _check_text(files: list[Path], what: str) -> None:
    """Refuse files without text, JSON and tables by themselves, and what a file's first bytes say is no text."""
    if not any(file.stat().st_size for file in files):
        raise UserError(f"{what}: empty, there is no text in it")
    for file in {file.suffix: file for file in reversed(files)}.values():  # one of each kind
        if kind := binary_kind(file):
            raise UserError(f"{file}: {kind}")
    suffixes = {file.suffix.lower() for file in files}
    if suffixes == {".json"} and not _is_jsonl(files[0]):
        found = f'no JSON lines with a "text" field ({files[0].name})'
    elif suffixes <= {".csv", ".tsv"}:
        found = f"a table ({files[0].name}), whose header and separators would be learnt as well"
    else:
        return
    raise UserError(
        f'{what}: {found}; write it as one {{"text": ...}} a line into a .jsonl file, or rename it to .txt to train on '
        "it as it is"
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
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return None


def _split(text: str) -> Iterator[str]:
    for start in range(0, len(text), PIECE):
        yield text[start : start + PIECE]


def _sections(path: Path, size: int) -> Iterator[Document]:
    return ([piece] for piece in _pieces(path, size, line=size))


def _pieces(path: Path, size: int = PIECE, *, line: int = SECTION) -> Iterator[str]:
    """A file in pieces of about ``size`` characters that end at line ends; a line may be cut after ``line``."""
    buffer: list[str] = []
    filled = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while text := file.readline(line):
                buffer.append(text)
                filled += len(text)
                if filled >= size:
                    yield "".join(buffer)
                    buffer, filled = [], 0
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from None
    if buffer:
        yield "".join(buffer)


def _jsonl_documents(path: Path) -> Iterator[Document]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _split(_jsonl_text(line, f"{path}, line {number}"))
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from None


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


def _not_text(path: Path, error: UnicodeDecodeError) -> UserError:
    return UserError(f"{path}: {binary_kind(path) or f'not UTF-8 text ({error.reason})'}")
