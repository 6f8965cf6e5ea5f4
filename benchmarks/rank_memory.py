"""What one rank takes in a step, as planned and as tracked in real processes, under data parallel and sharded.

    python -m benchmarks.rank_memory --ranks 2,4 --out benchmarks/results/rank_memory.jsonl

A small Llama over gloo; every tensor of the second step of the first rank is followed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from benchmarks.record import append, provenance
from poetx.distributed.ranks import rank_count
from poetx.memory import measure_memory
from poetx.memory.measure import MemoryProbe
from poetx.methods.base import convert_model, method_of
from poetx.models import build_model, settled
from poetx.planner.estimate import estimate_memory, part_of, planned_recipe
from poetx.train.sharding import all_ranks, shard_model_
from poetx.train.step import TrainingStep

SIZES = ["model.hidden_size=64", "model.intermediate_size=160", "model.num_layers=3", "model.num_heads=4"]
COMMON = [*SIZES, "data.vocab_size=300", "data.seq_len=64", "train.batch_size=4", "train.sample_tokens=0"]
BLOCKS = "poet.block_size=32"
CASES: dict[str, list[str]] = {
    "fast": ["method=fast", BLOCKS],
    "mem, bfloat16, checkpointed": [
        *("method=mem", BLOCKS, "train.dtype=bfloat16", "poet.rotation_dtype=bfloat16"),
        *("model.gradient_checkpointing=true", "train.chunked_loss=true"),
    ],
    "int8": ["method=int8", BLOCKS],
    "single-step, in micro-batches": ["method=single-step", BLOCKS, "train.micro_batch_size=1"],
    "single-step, bfloat16": ["method=single-step", "train.dtype=bfloat16", BLOCKS],
    "adamw": ["method=adamw"],
}
CPU = torch.device("cpu")


def measured(overrides: list[str]) -> MemoryProbe:
    """The memory of a rank's second step; called on all of them."""
    recipe = planned_recipe("demo", [*COMMON, *overrides], None)[1]
    recipe = settled(part_of(recipe, rank_count()), CPU)
    model = build_model(recipe, vocab_size=300, end_of_text_id=0, device=CPU)
    convert_model(model, recipe, CPU)
    if recipe.parallel == "fsdp":
        shard_model_(model, CPU, all_ranks(CPU))
    step = TrainingStep.of(recipe, model, method_of(recipe).build_optimizer(model, recipe.train.steps))
    count, size = recipe.train.batch_size // recipe.train.micro_batch, (recipe.train.micro_batch, 64)
    batches = [(torch.randint(0, 300, size), torch.randint(0, 300, size)) for _ in range(count)]
    step.take(batches)
    with measure_memory(model, step.optimizer) as memory:
        step.phase = memory.phase
        step.take(batches, clip=recipe.optimizer.clip or None)
    return memory


def _rank(rank: int, ranks: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store-{ranks}", rank=rank, world_size=ranks)
    found = {
        f"{way}/{case}": measured([*words, f"parallel={way}"]).to_dict()
        for way in ("ddp", "fsdp")
        for case, words in CASES.items()
    }
    if rank == 0:
        Path(directory, f"{ranks}.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", default="2,4", help="numbers of processes, separated by commas")
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    args = parser.parse_args()
    for ranks in map(int, args.ranks.split(",")):
        with tempfile.TemporaryDirectory() as directory:
            start_processes(_rank, args=(ranks, directory), nprocs=ranks, start_method="fork")
            found = json.loads(Path(directory, f"{ranks}.json").read_text())
        for key, tracked in found.items():
            way, case = key.split("/")
            words = [*COMMON, *CASES[case], f"parallel={way}"]
            planned: Any = estimate_memory("demo", words, device="cpu", ranks=ranks)
            row = {"benchmark": "rank_memory", "form": case, "parallel": way, "ranks": ranks}
            row |= {"planned": planned.peak, "tracked": tracked["peak"], "planned_categories": planned.categories}
            row |= {"error": round(planned.peak / tracked["peak"] - 1, 5)}
            print(row, flush=True)
            if args.out:
                append(args.out, [row | provenance(CPU)])


if __name__ == "__main__":
    main()
