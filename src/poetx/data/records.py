"""Records with named fields: from JSON lines, tables (CSV, Parquet, Arrow), or a data set on the Hub, one at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

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
_ROWS = 256  # of a table, in memory at once


def kind_of(path: Path, fields: Collection[str]) -> str:
    """``JSONL``, ``CSV``, ``Parquet``, ``Arrow`` or ``text``, by the name.

    As ``.json`` may be anything, its first line counts, which must be a record with one of ``fields``.
    """
    suffix = name_inside(path).suffix.lower()
    if suffix == ".json":
        first = _first_value(path)
        return "JSONL" if isinstance(first, dict) and not first.keys().isdisjoint(fields) else "text"
    if suffix in (".parquet", ".arrow"):
        suffix = path.suffix.lower()  # these compress by themselves
    return KINDS.get(suffix, "text")


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """The records of a file that is one of records, each with its place for messages.

    Raises:
        UserError: what is no record, with its place; a damaged file; a format without its package.
    """
    read = {"CSV": _csv_rows, "Parquet": _parquet_rows, "Arrow": _arrow_rows}
    return read.get(kind_of(path, ()), _json_lines)(path)


def _first_value(path: Path) -> Any:
    try:
        with open_text(path) as file:
            while (line := file.readline(_LONGEST_LINE)).isspace():
                pass
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _json_lines(path: Path) -> Iterator[tuple[str, Record]]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}, line {number}"
                yield place, _json_record(line, place)


def _json_record(line: str, place: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({getattr(error, 'msg', 'a number that is too long')})") from None
    except RecursionError:
        raise UserError(f"{place}: brackets nested too deeply to be read; remove the line") from None
    if not isinstance(record, dict):
        raise UserError(f'{place}: {type(record).__name__}, not a record; write one {{"text": ...}} a line')
    return record


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
    names = [str(name) for name in names]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "none"
