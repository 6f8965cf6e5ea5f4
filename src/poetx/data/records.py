"""Records with named fields: from JSON lines, tables (CSV, Parquet, Arrow), or a data set on the Hub, one at a time."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from poetx.data.opening import name_inside, open_text
from poetx.errors import UserError, one_line

Record = dict[str, Any]
#: By suffix, what a file of records is; compressed ones end in .gz and so on besides.
KINDS = {
    **dict.fromkeys((".jsonl", ".ndjson"), "JSONL"),
    **dict.fromkeys((".csv", ".tsv"), "CSV"),
    ".parquet": "Parquet",
    ".arrow": "Arrow",
}
_LONGEST_LINE = 1 << 26  # characters of a .json file's first record, or of one field of a CSV file
_PIECE = 1 << 16  # characters of a list read at once


class _KeyTwice(Exception):
    """A key that is twice in one object: which of the two is meant nobody can know."""


def _once(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise _KeyTwice(next(name for name in names if names.count(name) > 1))
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_once)
_ROWS = 256  # of a table, in memory at once


def kind_of(path: Path, fields: Collection[str]) -> str:
    """``JSONL``, ``JSON`` (one list), ``CSV``, ``Parquet``, ``Arrow`` or ``text``, by the name.

    As ``.json`` may be anything, its first line or the first of its list counts: a record with one of ``fields``.
    """
    suffix = name_inside(path).suffix.lower()
    if suffix == ".json":
        first = _first_value(path)
        if not isinstance(first, dict) or first.keys().isdisjoint(fields):
            return "text"
        return "JSON" if _is_array(path) else "JSONL"
    if suffix in (".parquet", ".arrow"):
        suffix = path.suffix.lower()  # these compress by themselves
    return KINDS.get(suffix, "text")


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """The records of a file that is one of records, each with its place for messages.

    Raises:
        UserError: what is no record, with its place; a damaged file; a format without its package.
    """
    read = {"CSV": _csv_rows, "Parquet": _parquet_rows, "Arrow": _arrow_rows}
    json_rows = _json_array if _is_array(path) else _json_lines
    return read.get(kind_of(path, ()), json_rows)(path)


def _is_array(path: Path) -> bool:
    """Whether a ``.json`` file is one list. Any other is JSON lines by its name, or by its first line."""
    if name_inside(path).suffix.lower() != ".json":
        return False
    with open_text(path) as file:
        return _first_line(file).lstrip().startswith("[")


def _first_line(file: TextIO) -> str:
    while (line := file.readline(_LONGEST_LINE)).isspace():
        pass
    return line


def _first_value(path: Path) -> Any:
    """The first record of a ``.json`` file, lines or a list; None where there is none."""
    try:
        if _is_array(path):
            return next(_json_array(path, json.JSONDecoder()), ("", None))[1]
        with open_text(path) as file:
            return json.loads(_first_line(file))
    except (ValueError, RecursionError):
        return None


def holds_records(path: Path, fields: Collection[str]) -> bool:
    """Whether the first two lines of a file that is text by its name are JSON records with one of ``fields``."""
    with open_text(path) as file:
        lines = [_first_line(file) for _ in range(2)]
    try:
        values = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return False
    return all(isinstance(value, dict) and not value.keys().isdisjoint(fields) for value in values)


def _json_array(path: Path, decoder: json.JSONDecoder = _DECODER) -> Iterator[tuple[str, Record]]:
    """The records of one list, of which a piece at a time is in memory."""
    with open_text(path) as file:
        buffer = _Buffer(file, decoder)
        buffer.take("[")
        for number in itertools.count(1):
            place = f"{path}, record {number}"
            if buffer.take("]"):
                break
            if number > 1 and not buffer.take(","):
                raise UserError(f"{place}: not JSON (a comma is missing before it, or the list does not end)")
            record = buffer.value(place)
            if not isinstance(record, dict):
                raise UserError(f'{place}: {type(record).__name__}, not a record; write [{{"text": ...}}, ...]')
            yield place, record
        if buffer.peek():
            raise UserError(f"{path}: goes on after the end of its list; write one list, or one record a line")


class _Buffer:
    """JSON values one after the other from a stream of text."""

    def __init__(self, file: TextIO, decoder: json.JSONDecoder) -> None:
        self._file, self._decoder, self._text, self._at = file, decoder, "", 0

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            rest = self._text[self._at : self._at + _PIECE].lstrip()
            if rest:
                self._at += self._text[self._at : self._at + _PIECE].index(rest[0])
                return rest[0]
            self._at += _PIECE
            if self._at >= len(self._text) and not self._more():
                return ""

    def take(self, character: str) -> bool:
        """Whether the next character is this one, which is then passed."""
        found = self.peek() == character
        self._at += found
        return found

    def value(self, place: str) -> Any:
        """The next value. Raises :class:`UserError` with ``place`` where it is none."""
        self.peek()
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
                return value
            except (RecursionError, _KeyTwice) as error:
                raise _refused(place, error) from None
            except ValueError as error:
                if len(self._text) - self._at > _LONGEST_LINE or not self._more():
                    what = getattr(error, "msg", "a number that is too long")
                    raise UserError(f"{place}: not JSON ({what})") from None

    def _more(self) -> bool:
        """Read as much again as waits, so that a long value is not begun many times."""
        waiting = self._text[self._at :]
        more = self._file.read(max(_PIECE, len(waiting)))
        self._text, self._at = waiting + more, 0
        return bool(more)


def _json_lines(path: Path) -> Iterator[tuple[str, Record]]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}, line {number}"
                yield place, _json_record(line, place)


def _json_record(line: str, place: str) -> Record:
    try:
        record = _DECODER.decode(line)
    except ValueError as error:
        what = getattr(error, "msg", "a number that is too long")
        raise UserError(f"{place}: not JSON ({what}); write one whole record a line") from None
    except (RecursionError, _KeyTwice) as error:
        raise _refused(place, error) from None
    if not isinstance(record, dict):
        raise UserError(f'{place}: {type(record).__name__}, not a record; write one {{"text": ...}} a line')
    return record


def _refused(place: str, error: Exception) -> UserError:
    if isinstance(error, _KeyTwice):
        return UserError(f'{place}: has "{error}" twice; leave one of them out')
    return UserError(f"{place}: brackets nested too deeply to be read; remove it")


def _csv_rows(path: Path) -> Iterator[tuple[str, Record]]:
    with open_text(path, newline="") as file:
        reader = csv.reader(file, delimiter="\t" if name_inside(path).suffix.lower() == ".tsv" else ",", strict=True)
        names: list[str] | None = None
        while True:
            limit = csv.field_size_limit(_LONGEST_LINE)  # the module's own is 131072; put back for everybody else
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise UserError(f"{path}, line {reader.line_num}: not CSV ({error}); mend its quotes") from None
            finally:
                csv.field_size_limit(limit)
            if row is None:
                return
            if names is None:
                names = row
                if twice := next((name for name in names if name and names.count(name) > 1), None):
                    raise UserError(f'{path}: its header names "{twice}" twice; rename one of these columns')
                if len(names) == 1 and (other := next((c for c in ";|,\t" if c in names[0]), None)):
                    raise UserError(
                        f"{path}: its header is one field ({shown_fields(names)}), separated by {other!r} perhaps; "
                        "separate fields by commas, or in a .tsv file by tabs"
                    )
            elif row:
                if len(row) != len(names):
                    raise UserError(
                        f"{path}, line {reader.line_num}: {len(row)} fields under a header of {len(names)} "
                        f"({shown_fields(names)}); quote fields that hold separators"
                    )
                yield f"{path}, line {reader.line_num}", dict(zip(names, row, strict=True))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Record]]:
    pyarrow = _pyarrow(path, "a Parquet table")
    from pyarrow.parquet import ParquetFile  # pyright: ignore[reportMissingImports]

    try:
        with ParquetFile(path) as file:
            yield from _rows(path, file.iter_batches(batch_size=_ROWS))
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, "Parquet", error) from None


def _arrow_rows(path: Path) -> Iterator[tuple[str, Record]]:
    pyarrow = _pyarrow(path, "an Arrow table")
    try:
        with pyarrow.memory_map(str(path)) as source:
            if path.open("rb").read(6) == b"ARROW1":
                file = pyarrow.ipc.open_file(source)
                yield from _rows(path, (file.get_batch(index) for index in range(file.num_record_batches)))
            else:
                yield from _rows(path, pyarrow.ipc.open_stream(source))
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, "Arrow", error) from None


def _rows(path: Path, batches: Any) -> Iterator[tuple[str, Record]]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            for record in batch.slice(start, _ROWS).to_pylist():
                number += 1
                yield f"{path}, row {number}", record


def _pyarrow(path: Path, what: str) -> Any:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"{path}: {what}; pip install 'poetx[data]' to read it, or write it as JSONL") from None
    return pyarrow


def _damaged(path: Path, what: str, error: Exception) -> UserError:
    return UserError(f"{path}: not a whole {what} file ({one_line(error)[:120]}); fetch it again")


def hub_records(name: str, *, split: str) -> Iterator[tuple[str, Record]]:
    """Stream a data set of the Hub, ``org/name``, ``org/name:config`` or ``org/name:config:split``.

    Raises:
        UserError: ``datasets`` is not installed, or the Hub cannot be reached or has no such data set.
    """
    repository, _, rest = name.partition(":")
    config, _, own_split = rest.partition(":")
    none = f"{name}: no such file or directory"
    download = f"hf download {repository} --repo-type dataset --local-dir DIR"
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"{none}; as a data set of the Hub it needs pip install 'poetx[data]', or {download}, and that DIR"
        ) from None
    try:
        rows = datasets.load_dataset(repository, config or None, split=own_split or split, streaming=True)
        for number, record in enumerate(rows, start=1):
            yield f"{name}, row {number}", dict(record)
    except Exception as error:  # by what is wrong, nearly any class of four libraries
        raise UserError(
            f"{none}, and no data set that the Hub gives ({type(error).__name__}: {one_line(error)[:160]}); "
            f"where there is no network: {download} elsewhere, and give that DIR"
        ) from None


def shown_fields(names: Any) -> str:
    """Names of fields in a message."""
    names = [str(name) if str(name) == str(name).strip() else repr(name) for name in names]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "none"
