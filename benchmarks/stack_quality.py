"""Whether the memory stack costs quality: the demo model under each configuration, same data, same steps.

    python -m benchmarks.stack_quality --out benchmarks/results/stack_quality.jsonl

Clipping is off in all of them, because released gradients have no common norm to clip by.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import append, provenance

LIGHT = ["model.gradient_checkpointing=true", "train.chunked_loss=true"]
FULL = [*LIGHT, "optimizer.state_dtype=int8", "optimizer.release_gradients=true"]
BF16 = ["train.dtype=bfloat16", "poet.rotation_dtype=bfloat16"]
CONFIGURATIONS = {
    "plain, float32": [],
    "checkpointing + chunked loss": LIGHT,
    "the same + 8-bit state + released gradients": FULL,
    "bfloat16 weights, float32 rotations": ["train.dtype=bfloat16"],
    "everything bfloat16, as in the paper": BF16,
    "everything bfloat16, full stack": [*BF16, *FULL],
    "bfloat16 weights, float32 rotations, full stack": ["train.dtype=bfloat16", *FULL],
}


def run(overrides: list[str], *, mode: str, steps: int, seed: int, directory: Path) -> float:
    """Final validation loss of the demo model, nats a token."""
    from poetx.train.metrics import read_metrics
    from poetx.train.recipe import load_recipe
    from poetx.train.run import train

    common = [
        f"run_dir={directory / 'run'}",
        f"data.cache_dir={directory / 'cache'}",
        f"train.steps={steps}",
        f"train.seed={seed}",
        f"train.eval_every={steps}",
        f"train.checkpoint_every={steps}",
        "train.export=false",
        "optimizer.clip=null",
        f"poet.mode={mode}",
    ]
    result = train(load_recipe("demo", [*common, *overrides]), overwrite=True)
    return [e["loss"] for e in read_metrics(result.run_dir / "metrics.jsonl") if e["event"] == "validation"][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    args = parser.parse_args()
    origin = provenance(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        plain = None
        for name, overrides in CONFIGURATIONS.items():
            loss = run(overrides, mode="mem", steps=args.steps, seed=args.seed, directory=Path(scratch))
            plain = loss if plain is None else plain
            print(f"{name:50} validation loss {loss:.4f}  ({loss - plain:+.4f})", flush=True)
            row: dict[str, Any] = {"benchmark": "stack_quality", "configuration": name, "overrides": overrides}
            row |= {"loss": loss, "against_plain": loss - plain, "steps": args.steps, "seed": args.seed}
            if args.out:
                append(args.out, [row | origin])


if __name__ == "__main__":
    main()
