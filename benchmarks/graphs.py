"""What one CUDA graph of forward and backward would gain: the same pass launched by the host, and replayed.

    python -m benchmarks.graphs llama-1b optimizer.lr=1e-4 --methods adamw,fast,mem,single-step --tokens 1x2048,4x2048

A trial beside the training step, which captures nothing: whether a capture is possible, the milliseconds of either way,
and how far the gradients of a replay are from those of a pass launched by the host. On a CPU it times the latter alone.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import append, provenance
from poetx.bench.step import Run, build_run, by_method
from poetx.bench.timing import median, milliseconds
from poetx.layers.blocks_together import blocks_together
from poetx.models import resolve_device
from poetx.recipe import load_recipe

_WARM_UP, _REPEATS = 3, 7


def forward_and_backward(run: Run, ids: Tensor) -> None:
    """A micro-batch of the training step, gradients written anew."""
    step = run.training_step
    with blocks_together(step.together):
        loss, router = step.losses(ids, ids)
        whole = loss / ids.numel()
        (whole if router is None else whole + router).backward()


def _gradients(run: Run) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in run.training_step.model.named_parameters() if p.grad is not None}


def _largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all gradients, relative to each one's norm."""
    pairs = ((found[name].double(), grad.double()) for name, grad in expected.items())
    return max(float((got - want).norm() / want.norm()) for got, want in pairs)


def _captured(once: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """As torch asks for: warmed up on a stream of its own, gradients absent, so that the graph has memory for them."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            once()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    return graph


def trial(run: Run, ids: Tensor, device: torch.device) -> dict[str, Any]:
    model = run.training_step.model

    def once() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        forward_and_backward(run, ids)

    for _ in range(_WARM_UP):
        once()
    row: dict[str, Any] = {"launched_ms": median([milliseconds(once, device) for _ in range(_REPEATS)])}
    if device.type != "cuda":
        return row
    expected = _gradients(run)
    once()
    row["largest_difference_of_two_launched"] = _largest_error(_gradients(run), expected)
    try:
        graph = _captured(once, device)
        graph.replay()
    except RuntimeError as error:
        return row | {"why_not": str(error).splitlines()[0]}
    found = _gradients(run)
    row |= {"largest_gradient_error": _largest_error(found, expected), "gradients": [len(expected), len(found)]}
    return row | {"replayed_ms": median([milliseconds(graph.replay, device) for _ in range(_REPEATS)])}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--methods", default="adamw,fast,mem,single-step")
    parser.add_argument("--tokens", default="1x2048", help="sequences x length, separated by commas")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    batches = [tuple(int(part) for part in words.split("x")) for words in args.tokens.split(",")]
    recipe = load_recipe(args.recipe, args.overrides, text=False)
    recipe = recipe.with_keys({"data.seq_len": max(length for _, length in batches)})
    device = resolve_device(recipe.train.device)
    for method in args.methods.split(","):
        for sequences, length in batches:
            run = build_run(by_method(recipe, method), device)  # anew: a capture that failed leaves anything
            ids = torch.randint(recipe.data.vocab_size, (sequences, length)).to(device)
            row = {"benchmark": "graphs", "recipe": args.recipe, "overrides": args.overrides, "method": method}
            row |= {"sequences": sequences, "seq_len": length} | trial(run, ids, device) | provenance(device)
            print(row, flush=True)
            if args.out:
                append(args.out, [row])
            del run
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
