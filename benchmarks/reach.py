"""What fits which card, with which host: every way to keep the frozen weights, planned.

python -m benchmarks.reach                 # the settings with a target, then all models and ways; rows that are there
python -m benchmarks.reach --targets       # stay (delete them to plan again)
python -m benchmarks.reach --only qwen     # what has this in its model or way
python -m benchmarks.reach --contexts      # an 8B by sequence length, with its layers' inputs on the card or the host
python -m benchmarks.tables                # writes docs/reach.md from them
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, append, provenance
from poetx.planner import GIB
from poetx.planner.reach import LINKS, WAYS, plan
from poetx.recipe import load_recipe

MODELS = ("llama-3b", "llama-8b", "llama-3.1-8b", "qwen2.5-14b", "qwen2.5-32b", "llama-3.1-70b")
BATCH = ["data.seq_len=2048", "train.batch_size=1", "train.micro_batch_size=1"]
#: Model and way: at most so many GB on the device, and on the host.
TARGETS: dict[tuple[str, str], tuple[float, float | None]] = {
    ("qwen2.5-32b", "int8, resident"): (48, None),
    ("llama-3.1-70b", "int4, resident"): (60, None),
    ("qwen2.5-32b", "bfloat16, streamed"): (22, 70),
    ("llama-3.1-70b", "int8, streamed"): (36, 78),
    ("llama-8b", "bfloat16, streamed"): (7.5, None),
}


#: Single-step weights: all of their bits, wherever they are.
SINGLE = (("single-step", None), ("single-step", "frozen"))


def name_of(weights: str | None, offload: str | None) -> str:
    """A way in words; ``weights``: their format, or ``"single-step"``."""
    return f"{weights or 'bfloat16'}, {'streamed' if offload else 'resident'}"


def row_of(model: str, weights: str | None, offload: str | None) -> dict[str, Any]:
    """One plan, with its bytes and what it costs on each link."""
    started = time.perf_counter()
    single = weights == "single-step"
    recipe = load_recipe(model, [*BATCH, *(["method=single-step"] if single else [])], text=False)
    way = plan(recipe, None if single else weights, offload)
    estimate = way.estimate
    return {
        "benchmark": "reach",
        "model": model,
        "way": name_of(weights, offload),
        "device_gib": round(way.device_gib, 2),
        "host_gib": round(way.host_gib, 2),
        "moved_gib": round(estimate.moved / GIB, 2),
        "stepped_gib": round(estimate.stepped / GIB, 2),
        "categories_gib": {name: round(size / GIB, 2) for name, size in estimate.categories.items()},
        "parameters": estimate.parameters,
        "tokens_per_second": {name: round(way.tokens_per_second(link)) for name, link in LINKS.items()},
        "enough_tokens": {name: way.enough_tokens(link) for name, link in LINKS.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }


#: Tokens of one sequence, and where what decoder layers keep is.
CONTEXTS = [1 << power for power in (11, 13, 15, 17, 19)]
OFFLOADS = (None, "activations", "both")


def context_row(tokens: int, offload: str | None) -> dict[str, Any]:
    """A plan of the 8B shape on one sequence of ``tokens``."""
    started = time.perf_counter()
    recipe = load_recipe(
        "llama-8b", [*BATCH, f"data.seq_len={tokens}", "model.gradient_checkpointing=true"], text=False
    )
    way = plan(recipe, None, offload)
    return {
        "benchmark": "reach_contexts",
        "model": "llama-8b",
        "way": f"offload={offload}",
        "tokens": tokens,
        "device_gib": round(way.device_gib, 2),
        "host_gib": round(way.host_gib, 2),
        "moved_gib": round(way.estimate.moved / GIB, 2),
        "phase": way.estimate.phase,
        "categories_gib": {name: round(size / GIB, 2) for name, size in way.estimate.categories.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", action="store_true", help="only the settings with a target")
    parser.add_argument("--contexts", action="store_true", help="only the 8B by sequence length")
    parser.add_argument("--only", default="", help="only models and ways with this in their name")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.out = args.out or RESULTS / ("reach_contexts.jsonl" if args.contexts else "reach.jsonl")
    known = args.out.read_text().splitlines() if args.out.exists() else []
    done = {(row["model"], row["way"], *([row["tokens"]] if "tokens" in row else [])) for row in map(json.loads, known)}
    cells = [(model, *way) for model in MODELS for way in (*WAYS, *SINGLE)]
    cells.sort(key=lambda cell: ((cell[0], name_of(*cell[1:])) not in TARGETS, cell[1:] in SINGLE))
    origin = provenance(torch.device("cpu"))
    if args.contexts:
        for tokens in CONTEXTS:
            for offload in OFFLOADS:
                if ("llama-8b", f"offload={offload}", tokens) not in done:
                    row = context_row(tokens, offload)
                    append(args.out, [origin | row])
                    print(tokens, offload, row["device_gib"], row["host_gib"], row["moved_gib"], flush=True)
        return
    for model, *way in cells:
        key = (model, name_of(*way))
        if key in done or (args.targets and key not in TARGETS) or args.only not in ", ".join(key):
            continue
        row = row_of(model, *way)
        append(args.out, [origin | row])
        print(*key, row["device_gib"], row["host_gib"], row["moved_gib"], flush=True)


if __name__ == "__main__":
    main()
