"""Train one run by 1, 2 and 4 processes, in every form, and compare the losses; count what a step sends.

    python -m benchmarks.ranks_agree --out benchmarks/results/ranks_agree.jsonl

A Llama of one layer in float32 on text made here, over gloo: 50 steps with two merges, batches of 4 sequences, each
form plain and with activation checkpointing. The bytes are those of the tensors handed to all-reduce in one step,
beside what shapes say (:mod:`benchmarks.rank_bytes`) where every row of the embedding has a gradient.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.kill import _write_text
from benchmarks.rank_bytes import sent_by_shapes
from benchmarks.record import append, provenance
from poetx.recipe import Recipe, load_recipe
from poetx.train import loop
from poetx.train.metrics import read_metrics
from poetx.train.run import train

RECIPE = """
name: ranks
model: {hidden_size: 64, intermediate_size: 112, num_layers: 1, num_heads: 4}
data: {vocab_size: 300, seq_len: 16, validation_fraction: 0.25}
poet: {block_size: 16, init: normalized, merge_every: 20}
optimizer: {lr: 3.0e-3, poet_lr: 2.0e-3, clip: 1.0, warmup_steps: 3}
train: {steps: 50, batch_size: 4, eval_every: 25, eval_windows: 6, checkpoint_every: 50, device: cpu, dtype: float32,
        export: false}
"""
FORMS: dict[str, list[str]] = {
    "fast": ["method=fast"],
    "mem": ["method=mem"],
    "int8": ["method=int8"],
    "single-step, free": ["method=single-step", "train.micro_batch_size=1"],
    "single-step, rotation": ["method=single-step", "poet.update=rotation"],
    "adamw": ["method=adamw"],
}
SAVINGS = {"": [], ", checkpointed": ["model.gradient_checkpointing=true", "train.chunked_loss=true"]}
RANKS = (1, 2, 4)
TOLERANCE = 1e-5


def runs(directory: Path, ranks: int) -> dict[str, list[str]]:
    """Overrides of every run, by its name."""
    common = [f"data.train={directory / 'text'}", f"data.cache_dir={directory / 'cache'}"]
    return {
        form + saving: [*common, *settings, *more, f"run_dir={directory / str(ranks) / (form + saving)}"]
        for form, settings in FORMS.items()
        for saving, more in SAVINGS.items()
    }


def _rank(rank: int, ranks: int, directory: Path) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store-{ranks}", rank=rank, world_size=ranks)
    sent = _count_sent()
    for name, overrides in runs(directory, ranks).items():
        sent.clear()
        train(load_recipe(str(directory / "ranks.yaml"), overrides))
        if rank == 0:
            (directory / str(ranks) / name / "sent").write_text(str(max(sent, default=0)))
    if ranks > 1:
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def _count_sent() -> list[int]:
    """Bytes that this rank hands to all-reduce between the start and the end of each training step."""
    counted, inside = [], [False]
    reduce, step = dist.all_reduce, loop.train_step

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if inside[0]:
            counted[-1] += tensor.nbytes
        return reduce(tensor, *args, **kwargs)

    def train_step(*args: Any) -> Any:
        counted.append(0)
        inside[0] = True
        try:
            return step(*args)
        finally:
            inside[0] = False

    dist.all_reduce, loop.train_step = all_reduce, train_step
    return counted


def compare(directory: Path) -> list[dict[str, Any]]:
    """One row a form and number of processes: the largest relative difference of its losses from one process's."""
    rows = []
    alone = {name: _losses(directory, 1, name) for name in runs(directory, 1)}
    for ranks in RANKS[1:]:
        for name, overrides in runs(directory, ranks).items():
            losses = _losses(directory, ranks, name)
            largest = max(abs(a - b) / a for a, b in zip(alone[name], losses, strict=True))
            sent = int((directory / str(ranks) / name / "sent").read_text())
            recipe = load_recipe(str(directory / "ranks.yaml"), overrides)
            rows.append(
                {"benchmark": "ranks_agree", "form": name, "ranks": ranks, "losses": len(losses)}
                | {"largest_difference": largest, "first": losses[0], "last": losses[-1]}
                | {"bytes_a_step": sent, "bytes_by_shapes": sent_by_shapes(recipe, _rows(recipe))}
            )
    return rows


def _losses(directory: Path, ranks: int, name: str) -> list[float]:
    """Of training and validation, in order."""
    entries = read_metrics(directory / str(ranks) / name / "metrics.jsonl")
    return [entry["loss"] for entry in entries if "loss" in entry]


def _rows(recipe: Recipe) -> int:
    from poetx.train.checkpoint import checkpoints, tensor_shapes

    return tensor_shapes(checkpoints(recipe.directory)[-1])["model.embed_tokens.weight"][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        _write_text(directory / "text")
        (directory / "ranks.yaml").write_text(RECIPE)
        for ranks in RANKS:
            began = time.perf_counter()
            spawn(_rank, args=(ranks, directory), nprocs=ranks)
            print(f"{ranks} processes: {time.perf_counter() - began:.0f} s", flush=True)
        rows = compare(directory)
    for row in rows:
        print(row)
    if args.out:
        append(args.out, [row | provenance(torch.device("cpu")) for row in rows])
    if worst := [row for row in rows if row.get("largest_difference", 0) > TOLERANCE]:
        raise SystemExit(f"{len(worst)} runs differ by more than {TOLERANCE}: {worst[0]['form']}")


if __name__ == "__main__":
    main()
