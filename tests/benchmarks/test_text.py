"""Gathered text: no document twice, not nearly either, no generated data, and the same for the same files."""

from __future__ import annotations

import gzip
from pathlib import Path

from benchmarks import text


def prose(name: str, lines: int = 40) -> str:
    return "".join(f"Line {i} of {name}, long enough to say something.\n" for i in range(lines))


def test_documents_are_different_and_in_the_order_of_their_hashes(tmp_path: Path) -> None:
    contents = {name: prose(name) for name in ("a", "b", "c", "d")}
    contents["copy"] = contents["a"]
    contents["near"] = prose("b", 30) + prose("something new", 10)
    contents["short"] = "A line.\n"
    contents["generated"] = prose("x") + "0x1f, " * 50
    files = []
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        files.append((f"pypi:{name}", tmp_path / name))
    (tmp_path / "manual.gz").write_bytes(gzip.compress(prose("manual").encode()))
    (tmp_path / "binary").write_bytes(b"\xff\xfe" * 400)
    files += [("manuals", tmp_path / "manual.gz"), ("deb:x", tmp_path / "binary"), ("deb:x", tmp_path / "absent")]
    found = list(text.gather(files, 10**6))
    assert len(found) == 5  # a or its copy, c, d, the manual, and b or what is nearly b
    assert len({source for source, _ in found} & {"pypi:b", "pypi:near"}) == 1
    assert len({source for source, _ in found} & {"pypi:a", "pypi:copy"}) == 1
    assert ("manuals", prose("manual")) in found
    assert found == list(text.gather(files[::-1], 10**6))
    two = sum(len(content.encode()) for _, content in found[:2])
    assert list(text.gather(files, two)) == found[:2]


def test_a_licence_for_every_kind_of_source() -> None:
    assert "BSD" in text.licence("pypi:torch")
    assert text.licence("python") == "PSF-2.0"
    assert text.licence("deb:git") == "see /usr/share/doc/git/copyright"
