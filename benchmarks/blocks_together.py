"""Forward and backward of a small Llama whose layers make their blocks together, and one by one: A B A B, medians.

python -m benchmarks.blocks_together --out benchmarks/results/blocks_together.jsonl
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import poetx
from benchmarks.record import append, provenance

#: width, inner width, block size, tokens, mode
SIZES = [
    (256, 704, 32, 1024, "fast"),
    (256, 704, 32, 128, "fast"),
    (256, 704, 32, 128, "mem"),
    (64, 192, 16, 128, "fast"),
]


def measure(width: int, inner: int, block_size: int, tokens: int, mode: str, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=inner, num_hidden_layers=4, num_attention_heads=4
    )
    together = LlamaForCausalLM(config)
    poetx.convert_(together, poetx.PoetConfig(block_size=block_size, mode=mode))  # pyright: ignore[reportArgumentType]
    alone = copy.deepcopy(together.train())
    for _, layer in poetx.poet_layers(alone):
        layer.blocks_together = None
    ids = torch.randint(256, (tokens // 128, 128))
    times: dict[str, list[float]] = {"together": [], "alone": []}
    for _ in range(repeats):
        for name, model in (("together", together), ("alone", alone)):
            start = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            times[name].append(time.perf_counter() - start)
    found = {name: round(1e3 * statistics.median(each), 2) for name, each in times.items()}
    return {"width": width, "block_size": block_size, "tokens": tokens, "mode": mode, "ms": found} | {
        "ratio": round(found["together"] / found["alone"], 3)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for size in SIZES:
        rows.append({"benchmark": "blocks_together"} | measure(*size, repeats=args.repeats))
        print(rows[-1], flush=True)
    if args.out:
        append(args.out, [row | provenance(torch.device("cpu")) for row in rows])


if __name__ == "__main__":
    main()
