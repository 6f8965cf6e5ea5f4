"""Fine-tuning by each method at a few rates: loss on the answers before and after, speed and memory.

    python -m benchmarks.fine_tuning train MODEL CHATS [--steps 150] [--only mem,lora]   (MODEL: what `make demo` left)
    python -m benchmarks.fine_tuning memory                                (planned, of models of a real size)

Both append rows and leave out what is there.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.record import RESULTS, append, provenance, rows_in
from poetx.planner import GIB, estimate_memory
from poetx.recipe import load_recipe
from poetx.recipe.several import load_methods
from poetx.train.metrics import read_metrics
from poetx.train.run import train

SETTINGS = (
    *("data.seq_len=128", "train.batch_size=8", "train.micro_batch_size=8", "model.gradient_checkpointing=false"),
    *("train.eval_windows=16", "train.export=false", "train.sample_tokens=0", "train.device=cpu"),
)
_POET = ("poet.block_size=64", "poet.merge_every=50")
#: Name of the row: method and rates.
TRIALS: dict[str, tuple[str, ...]] = {
    f"{method} {' '.join(rates)}": (*method_keys, *(f"optimizer.{rate}" for rate in rates))
    for method, method_keys, grid in (
        ("mem", _POET, (("poet_lr=1e-4", "lr=1e-5"), ("poet_lr=1e-3", "lr=1e-4"), ("poet_lr=2e-3", "lr=1e-3"))),
        ("single-step", ("method=single-step", _POET[0]), (("angle=0.003", "lr=1e-4"), ("angle=0.012", "lr=1e-3"))),
        ("adamw", ("method=adamw",), (("lr=1e-5",), ("lr=1e-4",), ("lr=1e-3",))),
        ("lora", ("method=lora",), (("lr=1e-4",), ("lr=1e-3",))),
    )
    for rates in grid
}


#: Shapes and methods whose memory is planned as ``poetx train sft`` would run them on a GPU.
SHAPES = ("llama-3b", "llama-3.1-8b")
METHODS: dict[str, tuple[str, ...]] = {
    **{name: () for name in ("adamw", "adamw-8bit", "lora", "mem", "int8", "int4", "single-step")},
    "int8, embedding and head by SMMF": ("optimizer.dense_optimizer=smmf",),
}


def plan() -> None:
    """Append the planned memory of a step of ``poetx train sft`` by each method to fine_tuning_memory.jsonl."""
    out = RESULTS / "fine_tuning_memory.jsonl"
    done = {(row["model"], row["method"]) for row in rows_in(out)}
    for shape in SHAPES:
        keys = [f"model.shape={shape}", "train.chunked_loss=true"]
        for method in (method for method in METHODS if (shape, method) not in done):
            name = method.partition(",")[0]
            recipe = load_methods("sft", [*keys, *METHODS[method]], [name])[name]
            estimate = estimate_memory(recipe, device="cuda")
            categories = {name: round(size / GIB, 2) for name, size in estimate.categories.items()}
            row = {"model": shape, "method": method, "peak_gib": round(estimate.peak / GIB, 2)}
            row |= {"categories_gib": categories, "parameters": estimate.parameters, "trainable": estimate.trainable}
            append(out, [row | provenance(torch.device("cpu"))])
            print(shape, method, row["peak_gib"], flush=True)


def main() -> None:
    """Run the trials and append a row for each to benchmarks/results/fine_tuning.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("memory")
    training = commands.add_parser("train")
    training.add_argument("model")
    training.add_argument("chats")
    training.add_argument("--steps", type=int, default=150)
    training.add_argument("--only", default="")
    arguments = parser.parse_args()
    if arguments.what == "memory":
        plan()
        return
    places = [f"model.pretrained={arguments.model}", f"data.train={arguments.chats}"]
    length = [f"train.steps={arguments.steps}", f"train.eval_every={arguments.steps}"]
    length += [f"optimizer.warmup_steps={max(1, arguments.steps // 20)}"]
    done = {(row["trial"], row["steps"]) for row in rows_in(RESULTS / "fine_tuning.jsonl")}
    with tempfile.TemporaryDirectory() as directory:
        for number, (name, keys) in enumerate(TRIALS.items()):
            if (name, arguments.steps) in done:
                continue
            if arguments.only and name.split()[0] not in arguments.only.split(","):
                continue
            run = [f"run_dir={Path(directory) / str(number)}"]
            result = train(load_recipe("sft", [*places, *SETTINGS, *length, *run, *keys]))
            if result.signum is not None:
                return  # stopped: no row of half a run
            losses = [e["loss"] for e in read_metrics(result.run_dir / "metrics.jsonl") if e["event"] == "validation"]
            row = {"trial": name, "steps": arguments.steps, "before": losses[0], "after": losses[-1]}
            row |= {"seconds": round(result.seconds, 1), "peak_memory_gib": round(result.peak_memory_gib, 3)}
            append(RESULTS / "fine_tuning.jsonl", [row | provenance(result.model.device)])
            print(f"{name:36}{losses[0]:.4f} -> {losses[-1]:.4f}  {result.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
