"""How far beyond the best learning rate training still works: POET-X against AdamW on the demo model.

    python -m benchmarks.stability --out benchmarks/results/stability.jsonl

First each method's learning rates are swept with one seed, then both are run at 1, 2, 4 and 8 times their best, with
three seeds. All of a method's rates scale together (POET-X has two: rotations, and everything else). Same data, same
steps, same clipping. A run counts as diverged when it ends above 1.05 times the lowest loss it reached, or not finite.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import append, provenance

#: (base lr, rotation lr) tried for each method; the best one's final validation loss decides.
SWEEP = {
    "adamw": [(1e-3, None), (2e-3, None), (4e-3, None)],
    "poet-x": [(3e-3, 1e-3), (3e-3, 2e-3), (3e-3, 4e-3)],
}


def run(method: str, lr: float, poet_lr: float | None, *, seed: int, steps: int, directory: Path) -> dict[str, Any]:
    """Train the demo model once; its final and lowest validation loss, and whether it diverged."""
    from poetx.recipe import load_recipe
    from poetx.train.metrics import read_metrics
    from poetx.train.run import train

    run_dir = directory / f"{method}-{lr:g}-{poet_lr}-{seed}"
    overrides = [
        f"run_dir={run_dir}",
        f"data.cache_dir={directory / 'cache'}",
        f"train.steps={steps}",
        f"train.seed={seed}",
        f"train.eval_every={max(1, steps // 6)}",
        f"train.checkpoint_every={steps}",
        "train.max_bad_steps=100000",
        "train.export=false",
        f"optimizer.lr={lr:g}",
    ]
    overrides += ["poet=null"] if poet_lr is None else [f"optimizer.poet_lr={poet_lr:g}", f"poet.seed={seed}"]
    result = train(load_recipe("demo", overrides))
    losses = [e["loss"] for e in read_metrics(run_dir / "metrics.jsonl") if e["event"] == "validation"]
    losses = [math.inf if loss is None else loss for loss in losses]
    return {
        "benchmark": "stability",
        "method": method,
        "lr": lr,
        "poet_lr": poet_lr,
        "seed": seed,
        "steps": steps,
        "loss": losses[-1] if math.isfinite(losses[-1]) else None,
        "lowest_loss": min(losses),
        "diverged": not math.isfinite(losses[-1]) or losses[-1] > 1.05 * min(losses),
        "skipped_steps": result.skipped_steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    args = parser.parse_args()
    origin = provenance(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        done: dict[tuple[Any, ...], dict[str, Any]] = {}

        def one(method: str, lr: float, poet_lr: float | None, seed: int, factor: float | None) -> dict[str, Any]:
            key = (method, lr, poet_lr, seed)  # a factor on the best rate may land on a rate that was swept
            if key not in done:
                done[key] = run(method, lr, poet_lr, seed=seed, steps=args.steps, directory=Path(scratch)) | origin
            row = done[key] | {"factor": factor}
            if args.out:
                append(args.out, [row])
            print(
                f"{method:7} lr {lr:g} poet_lr {poet_lr} seed {seed} factor {factor}: loss {row['loss']} "
                f"{'DIVERGED' if row['diverged'] else ''}",
                flush=True,
            )
            return row

        for method, rates in SWEEP.items():
            swept = {rate: one(method, *rate, args.seeds[0], None) for rate in rates}
            best = min(rates, key=lambda rate: swept[rate]["loss"] or math.inf)
            for factor in args.factors:
                scaled = tuple(None if rate is None else rate * factor for rate in best)
                rows = [one(method, *scaled, seed, factor) for seed in args.seeds]
                finite = [row["loss"] for row in rows if row["loss"] is not None]
                mean = statistics.mean(finite) if finite else math.nan
                print(
                    f"  {method} x{factor:g}: mean {mean:.3f}, {sum(r['diverged'] for r in rows)} diverged", flush=True
                )


if __name__ == "__main__":
    main()
