"""Instructions made of the standard library: what a function does, answered by its docstring's first sentence.

python -m benchmarks.docstrings OUT.jsonl
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_LONGEST = 160  # characters of an answer
_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}


def conversations(root: Path) -> Iterator[dict[str, str]]:
    """A prompt and its completion for every documented function below ``root``, each prompt once."""
    seen = set()
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not (text := ast.get_docstring(node)):
                continue
            answer = re.split(r"(?<=[.!?])\s|\n\s*\n", text.strip(), maxsplit=1)[0]
            answer = " ".join(answer.split())
            prompt = f"What does {path.stem}.{node.name}({', '.join(arg.arg for arg in node.args.args)}) do?"
            if 10 <= len(answer) <= _LONGEST and prompt not in seen:
                seen.add(prompt)
                yield {"prompt": prompt, "completion": answer}


def main() -> None:
    """Write the conversations to a JSONL file and say how many there are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    rows = list(conversations(Path(sysconfig.get_paths()["stdlib"])))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{out}: {len(rows)} conversations")


if __name__ == "__main__":
    main()
