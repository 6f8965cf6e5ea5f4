"""Rows and picture of a comparison that ``poetx compare`` has made, or is still making, for docs/compare.md.

    python -m benchmarks.text --out DIR/text
    poetx compare benchmarks/compare/tiny.yaml data.train=DIR/text/text.jsonl \
        --methods benchmarks/compare/methods.yaml --sweep --seeds 0,1,2 --out DIR/tiny
    python -m benchmarks.comparison DIR/tiny --text DIR/text/text.json
    python -m benchmarks.tables
    python -m benchmarks.comparison     # only draws again what was recorded

Takes the place of what was recorded of that scale before: ``results/compare.jsonl``, and ``docs/compare-SCALE.png``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, provenance, rows_in
from poetx.compare.page import memory_figures

ROOT = Path(__file__).parent.parent
ROWS = RESULTS / "compare.jsonl"


def rows_of(directory: Path, text: Path) -> list[dict[str, Any]]:
    """The rows of a comparison, each with the shape of its model, its text, and where it was made."""
    settings = json.loads((directory / "comparison.json").read_text())
    gathered = json.loads(text.read_text())
    common = {"benchmark": "compare", "scale": directory.name, "sweep": settings["sweep"]} | {
        "text": {key: gathered[key] for key in ("bytes", "documents", "sha256")}
    }
    rows = []
    for line in (directory / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        recipe = settings["methods"][row["method"]]
        shape = {key: value for key, value in recipe["model"].items() if type(value) is int}
        shape |= {key: recipe["data"][key] for key in ("vocab_size", "seq_len")}
        shape |= {key: recipe["train"][key] for key in ("batch_size", "micro_batch_size")}
        rows.append(common | row | {"shape": shape} | provenance(torch.device("cpu")))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--text", type=Path, help="text.json, which benchmarks.text wrote")
    args = parser.parse_args()
    rows = rows_in(ROWS)
    if args.directory is not None:
        if args.text is None:
            parser.error("--text FILE: text.json, which benchmarks.text wrote")
        rows = [row for row in rows if row["scale"] != args.directory.name] + rows_of(args.directory, args.text)
        ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for scale in dict.fromkeys(row["scale"] for row in rows):
        mine = [row for row in rows if row["scale"] == scale]
        figure, _ = memory_figures(mine)
        figure.savefig(ROOT / f"docs/compare-{scale}.png", dpi=160)
        print(f"{scale}: {len(mine)} rows")


if __name__ == "__main__":
    main()
