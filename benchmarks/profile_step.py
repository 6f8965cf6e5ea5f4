"""Where one training step's time goes on a GPU: launches, device time, host time, and the kernels that take most.

    python -m benchmarks.profile_step llama-8b model.num_layers=4 --methods adamw,fast,mem,single-step \\
        --tokens 1x2048,4x2048 --out profile.jsonl

One JSON line a method and batch. ``wall_ms`` is a step as it is; ``device_ms`` is the sum of its kernels, so what is
missing is the GPU waiting for the host; ``phases_ms`` are between events on the stream.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.record import append, provenance
from poetx.bench.step import Run, build_run, by_method
from poetx.bench.timing import median, milliseconds
from poetx.models import resolve_device
from poetx.recipe import load_recipe

_WARM_UP, _REPEATS, _SHOWN = 4, 5, 24


def profiled(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """One step under the profiler: its kernels, copies and fills by name, how many and how long, milliseconds."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    kind = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    counts: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for event in seen.events() or ():
        if event.device_type == kind and (device.type == "cuda" or not event.cpu_children):
            counts[event.name] += 1
            times[event.name] += event.device_time_total if device.type == "cuda" else event.cpu_time_total
    kernels = [[name[:120], counts[name], round(time / 1e3, 4)] for name, time in times.most_common(_SHOWN)]
    return {"launches": counts.total(), "device_ms": round(times.total() / 1e3, 3), "kernels": kernels}


def phases(run: Run, ids: torch.Tensor, device: torch.device) -> dict[str, float]:
    """Milliseconds of forward, backward and step of one step, between events; empty but on a GPU."""
    if device.type != "cuda":
        return {}
    marks: list[tuple[str, torch.cuda.Event]] = []

    def mark(name: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        marks.append((name, event))

    run.training_step.phase, plain = mark, run.training_step.phase
    try:
        run.step(ids)
    finally:
        run.training_step.phase = plain
    torch.cuda.synchronize(device)
    return {name: round(start.elapsed_time(end), 3) for (name, start), (_, end) in itertools.pairwise(marks)}


def measured(run: Run, ids: torch.Tensor, device: torch.device) -> dict[str, Any]:
    step = partial(run.step, ids)
    for _ in range(_WARM_UP):
        step()
    wall = median([milliseconds(step, device) for _ in range(_REPEATS)])
    return {"wall_ms": wall, "phases_ms": phases(run, ids, device)} | profiled(step, device)


def show(row: dict[str, Any]) -> None:
    what = f"{row['method']} {row['sequences']} x {row['seq_len']}"
    print(f"{what}: {row['wall_ms']} ms, kernels {row['device_ms']} ms in {row['launches']} launches")
    print("   phases", row["phases_ms"])
    for name, count, time in row["kernels"][:12]:
        print(f"   {time:9.3f} ms {count:6d} x {name[:100]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--methods", default="adamw,fast,mem,single-step")
    parser.add_argument("--tokens", default="1x2048", help="sequences x length, separated by commas")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.overrides, text=False)
    batches = [tuple(int(part) for part in words.split("x")) for words in args.tokens.split(",")]
    recipe = recipe.with_keys({"data.seq_len": max(length for _, length in batches)})
    device = resolve_device(recipe.train.device)
    for method in args.methods.split(","):
        run = build_run(by_method(recipe, method), device)
        for sequences, length in batches:
            ids = torch.randint(recipe.data.vocab_size, (sequences, length)).to(device)
            row = {"benchmark": "profile", "recipe": args.recipe, "overrides": args.overrides, "method": method}
            row |= {"sequences": sequences, "seq_len": length} | measured(run, ids, device) | provenance(device)
            append(args.out, [row])
            show(row)
        del run
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
