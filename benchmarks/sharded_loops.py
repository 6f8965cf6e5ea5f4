"""A loop of one's own by 1, 2 and 4 processes under DistributedDataParallel and FSDP2: losses and bytes.

    python -m benchmarks.sharded_loops --steps 50

What is in the rows already is left out, so the same command goes on where it was stopped. Two decoder-like layers with
biases and sizes that divide by nothing, over gloo, with two merges; each form in float64 and float32, plain and with
activation checkpointing. Bytes are what one rank gives to collectives in a step without a merge, and in a merge, which
single steps have none of.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from benchmarks.record import RESULTS, append, provenance, rows_in
from poetx import POETX, PoetConfig, convert_, merge_, merge_every, param_groups

FORMS: dict[str, dict[str, Any]] = {
    "fast": {"mode": "fast"},
    "mem": {"mode": "mem"},
    "int8": {"mode": "mem", "weight_format": "int8"},
    "single-step, free": {"method": "single-step", "mode": "mem"},
    "single-step, rotation": {"method": "single-step", "update": "rotation"},
}
WAYS = ("fsdp", "ddp")
RANKS = (1, 2, 4)
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
BATCH, TOKENS, VOCABULARY = 4, 16, 64


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int, *, checkpointed: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.mix, self.up, self.down = nn.Linear(width, width), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.checkpointed = checkpointed

    def body(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norms[0](x)).cumsum(1) / 4
        return x + self.down(nn.functional.silu(self.up(self.norms[1](x))))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)


class Model(nn.Module):
    def __init__(self, *, checkpointed: bool, width: int = 40, hidden: int = 52) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Layer(width, hidden, checkpointed=checkpointed) for _ in range(2))
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class SentBytes(TorchDispatchMode):
    """Bytes of the tensors that this rank gives to operators of c10d, inputs and outputs of each, the larger."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, Tensor)) for arg in args]
            self.total += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(into: dict[str, int], name: str) -> Iterator[None]:
    with SentBytes() as sent:
        yield
    into[name] = sent.total


def train(form: str, way: str, rank: int, ranks: int, steps: int, dtype: str, *, checkpointed: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Model(checkpointed=checkpointed).to(getattr(torch, dtype))
    convert_(model, PoetConfig(block_size=16, init="normalized", exclude_modules=("head",), **FORMS[form]))
    called: nn.Module = model
    if ranks > 1 and way == "ddp":
        called = DistributedDataParallel(model, broadcast_buffers=False)
    elif ranks > 1:
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    merges = "method" not in FORMS[form]
    if merges:
        optimizer = torch.optim.AdamW(param_groups(model, lr=3e-3, poet_lr=2e-3))
        merge_every(optimizer, model, steps=steps * 2 // 5)
    else:
        optimizer = POETX(model, lr=3e-3, angle=0.01)
    generator, losses, sent = torch.Generator().manual_seed(1), [], {}
    share = BATCH // ranks
    for step in range(steps):
        tokens = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=generator)[rank * share : (rank + 1) * share]
        with counted(sent, "step" if step == 1 else "unused"):
            loss = nn.functional.cross_entropy(called(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / ranks
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(float(mean))
    with counted(sent, "merge"):
        if merges:
            merge_(model, optimizer)
    return {"losses": losses, "step": sent["step"], "merge": sent["merge"]}


def cells(ranks: int) -> list[dict[str, Any]]:
    """What so many processes run, what matters most first: each takes a minute where processes share a core."""
    keys = ("checkpointed", "dtype", "parallel", "form")
    values = product((False, True), TOLERANCE, WAYS if ranks > 1 else WAYS[:1], FORMS)
    return [dict(zip(keys, cell, strict=True)) | {"ranks": ranks} for cell in values]


def left(ranks: int, steps: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [c for c in cells(ranks) if not any((c | {"steps": steps}).items() <= row.items() for row in rows)]


def _rank(rank: int, ranks: int, steps: int, directory: str, asked: list[dict[str, Any]], out: Path) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store-{ranks}", rank=rank, world_size=ranks)
    alone: dict[Any, list[float]] = {} if ranks == 1 else torch.load(f"{directory}/alone.pt")
    for cell in asked:
        form, way, dtype, checkpointed = (cell[key] for key in ("form", "parallel", "dtype", "checkpointed"))
        run = train(form, way, rank, ranks, steps, dtype, checkpointed=checkpointed)
        if ranks == 1:
            alone[form, dtype, checkpointed] = run["losses"]
        elif rank == 0:
            pairs = zip(alone[form, dtype, checkpointed], run["losses"], strict=True)
            row = {"benchmark": "sharded_loops", **cell, "steps": steps}
            row |= {"largest_difference": max(abs(a - b) / a for a, b in pairs), "last": run["losses"][-1]}
            row |= {"step_bytes": run["step"], "merge_bytes": run["merge"]} | provenance(torch.device("cpu"))
            print(row, flush=True)
            append(out, [row])
    if ranks == 1:
        torch.save(alone, f"{directory}/alone.pt")
    else:
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="two merges fall into them")
    parser.add_argument("--out", type=Path, default=RESULTS / "sharded_loops.jsonl", help="append JSON lines here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        asked = {ranks: left(ranks, args.steps, rows_in(args.out)) for ranks in RANKS[1:]}
        kinds = [{k: cell[k] for k in ("checkpointed", "dtype", "form")} for own in asked.values() for cell in own]
        asked[1] = [cell for cell in cells(1) if any(kind.items() <= cell.items() for kind in kinds)]
        for ranks in RANKS:
            began = time.perf_counter()
            words = (ranks, args.steps, directory, asked[ranks], args.out)
            start_processes(_rank, args=words, nprocs=ranks, start_method="fork")
            print(f"{ranks} processes: {time.perf_counter() - began:.0f} s", flush=True)
    rows = [row for row in rows_in(args.out) if row["steps"] == args.steps]
    if off := [row for row in rows if not row["largest_difference"] <= TOLERANCE[row["dtype"]]]:
        raise SystemExit(f"{len(off)} runs differ by more than {TOLERANCE}: {off[0]}")


if __name__ == "__main__":
    main()
