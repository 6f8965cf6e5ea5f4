"""What the documentation site needs beside MkDocs: files outside docs/, and the docstrings' cross-references."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import griffe
from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

_ROOT = Path(__file__).resolve().parents[1]
_OUTSIDE = re.compile(r"\]\(\.\./([\w./-]+)")
_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([^`<]+)`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the repository that pages link to (``../examples/trainer.py``), and the pages that lie above."""
    texts = [Path(file.abs_src_path or "").read_text(encoding="utf-8") for file in files.documentation_pages()]
    linked = {match for text in texts for match in _OUTSIDE.findall(text) if (_ROOT / match).is_file()}
    for name in sorted(linked | set(_PAGES)):
        files.append(File.generated(config, name, abs_src_path=str(_ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links at where the files are in the site; a link to a directory becomes its text."""
    markdown = re.sub(r"\[([^\]]+)\]\(\.\./([\w/-]+)/?\)", r"\1", markdown)
    return re.sub(r"\]\(docs/", "](", _OUTSIDE.sub(r"](\1", markdown))


class Roles(griffe.Extension):
    """Turns ``:func:`poetx.merge_` `` of docstrings into code, which is how Markdown says it."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of whatever has been read."""
        if not obj.is_alias and obj.docstring:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
