"""Files as text, decompressed on the way: by what their first bytes say, whatever they are called."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TextIO, cast

from poetx.data.binary import binary_kind
from poetx.errors import UserError
from poetx.files import check_fetched

#: By suffix: the first bytes and the name of the format.
_COMPRESSED = {
    ".gz": (b"\x1f\x8b", "gzip"),
    ".bz2": (b"BZh", "bzip2"),
    ".xz": (b"\xfd7zXZ\x00", "xz"),
    ".zst": (b"\x28\xb5\x2f\xfd", "Zstandard"),
}
_HEAD = 512
_CHUNK = 1 << 14  # compressed bytes at once


def name_inside(path: Path) -> Path:
    """``a.jsonl`` of ``a.jsonl.gz``."""
    return path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path


def check_is_text(path: Path) -> None:
    """Raise :class:`UserError` where the beginning of a file, decompressed, is no text, saying what it is."""
    with _decompressed(path) as file, _damage_said(path):
        head = file.read(_HEAD)
    if kind := binary_kind(head):
        raise UserError(f"{path}: {kind}")


@contextlib.contextmanager
def open_text(path: Path, *, newline: str | None = None) -> Iterator[TextIO]:
    """Read a file as UTF-8, without a byte order mark.

    Raises:
        UserError: bytes that are not UTF-8 or not the compressed data that they begin as; a format without its package.
    """
    with (
        _decompressed(path) as raw,
        io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline) as file,
        _damage_said(path),
    ):
        yield cast(TextIO, file)


@contextlib.contextmanager
def _damage_said(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        check_is_text(path)
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from None
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the format's
            raise
        raise UserError(f"{path}: damaged {_compression(path)} data ({error}); fetch it again") from None


def _compression(path: Path) -> str | None:
    """The name of the format by the first bytes of a file; None where it is not compressed.

    Raises:
        UserError: its name says otherwise.
    """
    check_fetched(path)
    with path.open("rb") as file:
        head = file.read(8)
    found = next((name for magic, name in _COMPRESSED.values() if head.startswith(magic)), None)
    named = _COMPRESSED.get(path.suffix.lower())
    if named and found is None and head:
        raise UserError(f"{path}: not {named[1]}-compressed, as its name says; rename it, or fetch it again")
    return found


def _decompressed(path: Path) -> IO[bytes]:
    compression = _compression(path)
    if compression == "Zstandard":
        return _open_zstandard(path)
    if compression == "bzip2":
        return io.BufferedReader(_Streams(path, bz2.BZ2Decompressor))
    if compression == "xz":
        return io.BufferedReader(_Streams(path, lzma.LZMADecompressor, padding=True))
    return cast(IO[bytes], gzip.open(path)) if compression else path.open("rb")


def _open_zstandard(path: Path) -> IO[bytes]:
    try:
        from compression import zstd  # Python 3.14  # pyright: ignore[reportMissingImports]

        return zstd.open(path)
    except ImportError:
        pass
    try:
        import zstandard  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"{path}: Zstandard-compressed; pip install 'poetx[data]' to read it, or decompress it first (unzstd)"
        ) from None
    frames = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return io.BufferedReader(_Streams(path, frames.decompressobj, error=zstandard.ZstdError))


class _Streams(io.RawIOBase):
    """All streams of a compressed file, one after the other, as parallel compressors write them.

    The libraries' own readers take for the end what they cannot read after the first: a damaged one, or (xz) zeros
    between two; that of Zstandard takes a file that is cut off for a whole one.

    Args:
        new: makes what decompresses one stream.
        padding: zeros may lie between streams.
    """

    def __init__(
        self, path: Path, new: Callable[[], Any], *, error: type[Exception] = OSError, padding: bool = False
    ) -> None:
        self._new, self._error, self._padding = new, error, padding
        self._file, self._stream, self._waiting = path.open("rb"), None, io.BytesIO()

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not (size := self._waiting.readinto(buffer)):
            data = self._file.read(_CHUNK)
            if not data and self._stream is not None:
                raise EOFError("it ends in the middle")
            if not data:
                return 0
            try:
                self._waiting = io.BytesIO(b"".join(self._decompress(data)))
            except self._error as error:
                raise EOFError(str(error)) from None
        return size

    def _decompress(self, data: bytes) -> Iterator[bytes]:
        while data := data.lstrip(b"\0") if self._padding and self._stream is None else data:
            self._stream = stream = self._stream or self._new()
            yield stream.decompress(data)
            data = b""
            if stream.eof:
                self._stream, data = None, stream.unused_data
