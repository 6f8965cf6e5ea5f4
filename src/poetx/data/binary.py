"""What a file that is no text is, by its first bytes, and how to get text out of it."""

from __future__ import annotations

_UNPACK = "unpack it first"
_EXTRACT = 'extract its text first, as one {"text": ...} a line'
_TABLE = "give it its own name (.parquet, .arrow), by which tables are read"
_MODEL = "a model is no text: name it in model.pretrained, as a directory with config.json, or give its text"
#: (place, bytes, what it is, what to do).
_KINDS = (
    (0, b"\x04\x22\x4d\x18", "LZ4-compressed", "decompress it first (unlz4)"),
    (0, b"PK\x03\x04", "a zip archive (or a document or array file made of one)", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"PAR1", "a Parquet table", _TABLE),
    (0, b"ARROW1", "an Arrow table", _TABLE),
    (0, b"\xff\xff\xff\xff", "an Arrow table", _TABLE),
    (0, b"SQLite format 3\x00", "an SQLite database", _EXTRACT),
    (0, b"\x89HDF", "an HDF5 file", _EXTRACT),
    (0, b"\x93NUMPY", "a NumPy array", "tokens made elsewhere cannot be read: give the text"),
    (0, b"GGUF", "a GGUF model", _MODEL),
    (8, b'{"', "a safetensors file", _MODEL),
    (0, b"%PDF", "a PDF document", _EXTRACT),
    (0, b"\xff\xfe", "UTF-16 text", "convert it first (iconv -f UTF-16 -t UTF-8)"),
    (0, b"\xfe\xff", "UTF-16 text", "convert it first (iconv -f UTF-16 -t UTF-8)"),
)


def binary_kind(head: bytes) -> str | None:
    """One line about a file that begins with ``head``, which is no text: what it is, and what to do; None if text."""
    for place, magic, kind, remedy in _KINDS:
        if head[place:].startswith(magic) and (place == 0 or b"\0" in head[:place]):
            return f"{kind}, not text; {remedy}"
    if b"\0" in head:
        return 'a binary file (it has NUL bytes), not text; give UTF-8 text, or one {"text": ...} a line'
    return None
