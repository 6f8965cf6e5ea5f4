"""Text that no run sees twice: what this machine's Python and Debian packages bring, as one JSON-lines file.

    python -m benchmarks.text --out DIRECTORY [--megabytes 80] [--debian bible-kjv-text,debian-policy]

Sources: Python's standard library, source and documentation of every installed package, ``/usr/share/doc``, manuals in
English, and Debian packages named with ``--debian``, which ``apt-get download`` fetches. Writes ``text.jsonl`` (one
document a line: ``text``, ``source``) and ``text.json`` (bytes, documents and licence of every source, SHA-256 of it
all). The same packages give the same bytes: documents are ordered by a hash of their content, which also mixes the
sources. A document is left out where more than half of its longer lines have been there before.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.metadata
import json
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
LARGEST = 400_000  # bytes of a document; larger ones are tables and generated code
SHORTEST = 500
_LONG_LINE = 24  # characters from which a line says something
_GENERATED = re.compile(r"[A-Za-z0-9+/=]{400}|(?:0x[0-9a-fA-F]+,\s*){40}|(?:-?\d+(?:\.\d+)?,\s*){80}")


def python_library() -> Iterator[tuple[str, Path]]:
    """Files of the standard library."""
    top = Path(sysconfig.get_paths()["stdlib"])
    for path in top.rglob("*"):
        if path.suffix in SUFFIXES and not {"site-packages", "dist-packages"} & set(path.parts):
            yield "python", path


def python_packages() -> Iterator[tuple[str, Path]]:
    """Source and documentation of every installed distribution."""
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"]
        for file in package.files or ():
            if file.suffix in SUFFIXES and ".." not in file.parts:
                yield f"pypi:{name}", Path(str(package.locate_file(file)))


def documentation() -> Iterator[tuple[str, Path]]:
    """Text under ``/usr/share/doc`` and manuals in English, also compressed ones."""
    for path in Path("/usr/share/doc").rglob("*"):
        if path.name.removesuffix(".gz").endswith((".txt", ".md", ".rst")) or path.name in ("copyright", "README.gz"):
            yield f"deb:{path.parts[4]}", path
    for path in Path("/usr/share/man").glob("man*/*.gz"):
        yield "manuals", path


def debian(names: list[str], scratch: Path) -> Iterator[tuple[str, Path]]:
    """Text of Debian packages, fetched into ``scratch``; raises where apt cannot fetch one."""
    for name in names:
        subprocess.run(["apt-get", "download", name], cwd=scratch, check=True, capture_output=True)
        archive = next(scratch.glob(f"{name}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", archive, scratch / name], check=True)
        for path in (scratch / name).rglob("*"):
            yield f"deb:{name}", path


def read(path: Path) -> str | None:
    """Its text; None for what is no UTF-8 text, too short, too long, or generated data."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size > LARGEST:
        return None
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError):
        return None
    fine = SHORTEST <= len(text) <= LARGEST and "\0" not in text and not _GENERATED.search(text)
    return text if fine else None


def licence(source: str) -> str:
    """Of a source, as its package names it."""
    kind, _, name = source.partition(":")
    if kind == "pypi":
        about = importlib.metadata.metadata(name)
        classes = [line.rpartition(" :: ")[2] for line in about.get_all("Classifier") or () if "License ::" in line]
        named = about["License-Expression"] or ", ".join(classes) or (about["License"] or "").strip().partition("\n")[0]
        return named or "see its LICENSE"
    if kind == "python":
        return "PSF-2.0"
    return "see /usr/share/doc/*/copyright" if kind == "manuals" else f"see /usr/share/doc/{name}/copyright"


def gather(files: list[tuple[str, Path]], limit: int) -> Iterator[tuple[str, str]]:
    """(source, text) of different documents in the order of their hashes, ``limit`` bytes in all."""
    documents: dict[bytes, tuple[str, Path]] = {}
    for source, path in sorted(files):
        if text := read(path):
            documents.setdefault(hashlib.sha256(text.encode()).digest(), (source, path))
    seen: set[int] = set()
    taken = 0
    for _, (source, path) in sorted(documents.items()):
        text = read(path) or ""
        lines = [line.strip() for line in text.splitlines() if len(line.strip()) >= _LONG_LINE]
        marks = [int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "big") for line in lines]
        if sum(mark in seen for mark in marks) * 2 > len(marks):
            continue
        seen.update(marks)
        taken += len(text.encode())
        if taken > limit:
            return
        yield source, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=80)
    parser.add_argument("--debian", default="", help="Debian packages to fetch, separated by commas")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    digest, sources = hashlib.sha256(), dict[str, list[int]]()
    with tempfile.TemporaryDirectory() as scratch, (args.out / "text.jsonl").open("w") as out:
        names = [name for name in args.debian.split(",") if name]
        files = [*python_library(), *python_packages(), *documentation(), *debian(names, Path(scratch))]
        for source, text in gather(files, int(args.megabytes * 1e6)):
            digest.update(text.encode())
            sources.setdefault(source, [0, 0])[0] += len(text.encode())
            sources[source][1] += 1
            out.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
    total, count = (sum(numbers) for numbers in zip(*sources.values(), strict=True))
    about = {"bytes": total, "documents": count, "sha256": digest.hexdigest()}
    listed = {
        source: {"bytes": size, "documents": number, "licence": licence(source)}
        for source, (size, number) in sorted(sources.items(), key=lambda item: -item[1][0])
    }
    (args.out / "text.json").write_text(json.dumps(about | {"sources": listed}, indent=1))
    for source, entry in list(listed.items())[:20]:
        print(f"{entry['bytes'] / 1e6:7.2f} MB  {entry['documents']:6d} documents  {source}: {entry['licence']}")
    print(f"{total / 1e6:.1f} MB, {count} documents, {len(sources)} sources, sha256 {about['sha256']}")


if __name__ == "__main__":
    main()
