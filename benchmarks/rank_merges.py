"""What a merge or a fold costs one rank, by the number of ranks that the model is sharded over.

    python -m benchmarks.rank_merges --out benchmarks/results/rank_merges.jsonl

Processor seconds of a process (``time.process_time``), its communication included, so that processes may share cores:
of the rank that takes most, the median of some merges. A merge deals layers out (paper's form); a single step folds the
rows that a rank has, of which the time in the fold is counted, and the whole step beside it, in which every rank
orthogonalizes all momenta.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes

from benchmarks.record import append, provenance
from poetx import POETX, PoetConfig, convert_, merge_, param_groups
from poetx.layers.walk import poet_layers
from poetx.optim.single_step.matrix import SIDES, Matrix

FORMS: dict[str, dict[str, Any]] = {
    "fast": {"mode": "fast"},
    "int8": {"mode": "mem", "weight_format": "int8"},
    "single-step": {"method": "single-step"},
}
RANKS = (1, 2, 4)
LAYERS = 8


def build(form: str, width: int, ranks: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))
    convert_(model, PoetConfig(block_size=128, init="normalized", **FORMS[form]))
    if ranks > 1:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    return model


def seconds(action: Callable[[], object], repeats: int) -> float:
    """Processor seconds of one call, the median after one to warm up."""
    taken = []
    for _ in range(repeats + 1):
        if dist.is_initialized():
            dist.barrier()
        began = time.process_time()
        action()
        taken.append(time.process_time() - began)
    return median(taken[1:])


def merge_seconds(form: str, width: int, ranks: int, repeats: int) -> dict[str, float]:
    model = build(form, width, ranks)
    param_groups(model, lr=1e-3, poet_lr=1e-3)
    for _, layer in poet_layers(model):
        for skew in layer.rotations:
            (skew.to_local() if hasattr(skew, "to_local") else skew).detach().fill_(1e-3)  # pyright: ignore
    return {"merge": seconds(lambda: merge_(model), repeats)}


def fold_seconds(form: str, width: int, ranks: int, repeats: int) -> dict[str, float]:
    optimizer = POETX(build(form, width, ranks), angle=0.01)
    matrices, inside = optimizer._matrices or [], []
    take = Matrix.take_step

    def timed(*args: Any) -> None:
        began = time.process_time()
        take(*args)
        inside.append(time.process_time() - began)

    def step() -> None:
        for number, matrix in enumerate(matrices):
            generator = torch.Generator().manual_seed(number)
            for side in SIDES:
                momentum = matrix.state[f"momentum_{side}"]
                momentum += torch.randn(momentum.shape, generator=generator)
                matrix.peaks[side].fill_(1.0)
            matrix.touched = True
        optimizer.step()

    Matrix.take_step = timed
    whole = seconds(step, repeats)
    Matrix.take_step = take
    return {"fold": median(sum(inside[at : at + LAYERS]) for at in range(LAYERS, len(inside), LAYERS)), "step": whole}


def _rank(rank: int, ranks: int, forms: list[str], width: int, repeats: int, directory: str) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store-{ranks}", rank=rank, world_size=ranks)
    found = {}
    for form in forms:
        function = fold_seconds if "method" in FORMS[form] else merge_seconds
        found |= {f"{form}/{what}": s for what, s in function(form, width, ranks, repeats).items()}
    everyone: list[Any] = [found] * ranks
    if ranks > 1:
        dist.all_gather_object(everyone, found)
    if rank == 0:
        Path(directory, f"{ranks}.json").write_text(json.dumps({k: max(one[k] for one in everyone) for k in found}))
    if ranks > 1:
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--forms", default=",".join(FORMS), help=f"of {', '.join(FORMS)}")
    parser.add_argument("--width", type=int, default=2048, help="of each of eight square layers")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for ranks in RANKS:
            words = (ranks, args.forms.split(","), args.width, args.repeats, directory)
            start_processes(_rank, args=words, nprocs=ranks, start_method="fork")
            found[ranks] = json.loads(Path(directory, f"{ranks}.json").read_text())
    for key in found[1]:
        form, what = key.split("/")
        row = {"benchmark": "rank_merges", "form": form, "what": what, "width": args.width, "layers": LAYERS}
        row |= {"seconds": {str(ranks): round(found[ranks][key], 4) for ranks in RANKS}}
        row |= {"from_2_to_4": round(found[2][key] / found[4][key], 3)}
        print(row)
        if args.out:
            append(args.out, [row | provenance(torch.device("cpu"))])


if __name__ == "__main__":
    main()
