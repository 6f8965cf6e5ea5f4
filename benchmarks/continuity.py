"""How far the loss moves at a merge: the demo model, trained without merging, then folded once, on fixed text.

python -m benchmarks.continuity --out benchmarks/results/continuity.jsonl
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import append, provenance
from poetx import merge_


def run(order: str, dtype: str, *, steps: int, directory: Path) -> dict[str, Any]:
    """Train ``steps`` steps without a merge; the loss on the same windows before and after one."""
    from poetx.data.prepare import prepare_data
    from poetx.data.sampler import evenly_spread
    from poetx.recipe import load_recipe
    from poetx.train.loop import evaluate
    from poetx.train.run import train

    recipe = load_recipe(
        "demo",
        [
            f"run_dir={directory / f'{order}-{dtype}'}",
            f"data.cache_dir={directory / 'cache'}",
            f"train.steps={steps}",
            f"train.eval_every={steps}",
            f"train.checkpoint_every={steps}",
            f"train.dtype={dtype}",
            "train.export=false",
            f"poet.neumann_order={order}",
            "poet.merge_every=null",
        ],
    )
    model = train(recipe).model
    text = prepare_data(recipe).validation
    windows = evenly_spread(32, len(text))

    def loss() -> float:
        return evaluate(model, text, windows, batch_size=8, device=torch.device("cpu"))

    before = loss()
    report = merge_(model)
    after = loss()
    return {
        "benchmark": "continuity",
        "order": order,
        "dtype": dtype,
        "steps": steps,
        "largest_angle": report.angle,
        "loss_before": before,
        "loss_after": after,
        "relative_jump": abs(after - before) / before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    args = parser.parse_args()
    origin = provenance(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        for order, dtype in (("3", "float32"), ("7", "float32"), ("exact", "float32"), ("3", "bfloat16")):
            row = run(order, dtype, steps=args.steps, directory=Path(scratch)) | origin
            print(
                f"order {order:5} {dtype:8} angle {row['largest_angle']:.3f}  loss {row['loss_before']:.6f} -> "
                f"{row['loss_after']:.6f}  relative jump {row['relative_jump']:.1e}",
                flush=True,
            )
            if args.out:
                append(args.out, [row])


if __name__ == "__main__":
    main()
