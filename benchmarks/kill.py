"""Kill training at random instants, resume it, and compare with a run that was never killed, bit for bit.

    python -m benchmarks.kill --kills 300 --out benchmarks/results/kill.jsonl
    python -m benchmarks.kill --kills 30 --streamed --out benchmarks/results/kill.jsonl method=single-step

A small Llama on text made here; a merge every 5 steps, a checkpoint at every 2nd. The clock of each kill is drawn over
the time a whole run takes, so that kills fall into start-up, steps, merges, checkpoint writing and export alike.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.record import append, provenance

RECIPE = """
name: kill
model: {hidden_size: 32, intermediate_size: 48, num_layers: 1, num_heads: 2}
data: {vocab_size: 300, seq_len: 16, validation_fraction: 0.25}
poet: {block_size: 16, init: normalized, merge_every: 5}
optimizer: {lr: 3.0e-3, poet_lr: 2.0e-3, clip: 1.0, warmup_steps: 3}
train: {steps: 30, batch_size: 4, micro_batch_size: 2, eval_every: 6, eval_windows: 4, checkpoint_every: 2,
        keep_checkpoints: 2, device: cpu}
"""


@dataclass(frozen=True)
class Outcome:
    """What the kills did: how many, and how far the run had come at each (finished steps on disk)."""

    kills: int
    steps_at_kill: list[int]
    identical: bool


def _train(recipe_file: str, overrides: list[str], *, stand_in: bool) -> None:
    torch.set_num_threads(1)
    from poetx.recipe import load_recipe
    from poetx.train import run
    from poetx.train.checkpoint import checkpoints

    recipe = load_recipe(recipe_file, overrides)
    with contextlib.ExitStack() as stack:
        if stand_in:
            sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
            from accelerator import accelerator

            device = stack.enter_context(accelerator())
            stack.enter_context(mock.patch.object(run, "resolve_device", return_value=device))
        run.train(recipe, resume=bool(checkpoints(recipe.directory)))


def _fingerprint(run_dir: Path) -> tuple[list[dict[str, Any]], str]:
    """Every line of the metrics without its timings, and a hash of the exported weights."""
    from poetx.train.metrics import TIMING_KEYS, read_metrics

    lines = [{k: v for k, v in e.items() if k not in TIMING_KEYS} for e in read_metrics(run_dir / "metrics.jsonl")]
    weights = (run_dir / "export" / "model.safetensors").read_bytes()
    return lines, hashlib.sha256(weights).hexdigest()


def _context() -> Any:
    # A fork server has the imports done once; each child is still a process of its own to kill.
    context = multiprocessing.get_context("forkserver")
    ours = ["poetx.convert", "poetx.optim.build", "poetx.train.run"]
    context.set_forkserver_preload([*ours, "transformers.models.llama.modeling_llama"])
    return context


def _write_text(directory: Path) -> None:
    generator = random.Random(0)
    directory.mkdir()
    for number in range(8):
        words = generator.choices(["alpha", "beta", "gamma", "the", "of", "runs", "quickly"], k=500)
        (directory / f"{number}.txt").write_text(" ".join(words))


def run(kills: int, *, seed: int, directory: Path, settings: Sequence[str] = (), stand_in: bool = False) -> Outcome:
    """Kill until ``kills`` kills have hit; every finished run is compared with the undisturbed one.

    Args:
        settings: more of the recipe. stand_in: on the accelerator made of host memory of ``tests/accelerator.py``.
    """
    context = _context()
    _write_text(directory / "text")
    recipe = directory / "kill.yaml"
    recipe.write_text(RECIPE)
    common = [f"data.train={directory / 'text'}", f"data.cache_dir={directory / 'cache'}", *settings]

    def start(run_dir: Path, *more: str) -> Any:
        overrides = [*common, *more, f"run_dir={run_dir}"]
        child = context.Process(target=_train, args=(str(recipe), overrides), kwargs={"stand_in": stand_in})
        child.start()
        return child

    def finish(run_dir: Path, *more: str) -> float:
        began = time.perf_counter()
        child = start(run_dir, *more)
        child.join()
        assert child.exitcode == 0, f"training failed with exit code {child.exitcode}"
        return time.perf_counter() - began

    finish(directory / "warm-up", "train.steps=1")  # the tokenised text is cached now
    duration = finish(directory / "undisturbed")
    expected = _fingerprint(directory / "undisturbed")
    generator, steps, done, identical = random.Random(seed), [], 0, True
    while done < kills:
        run_dir = directory / f"killed-{done}"
        while True:
            child = start(run_dir)
            child.join(generator.uniform(0, duration))
            if child.exitcode is not None:
                break
            child.kill()
            child.join()
            done += 1
            steps.append(_newest_step(run_dir))
            if done >= kills:
                finish(run_dir)
                break
        assert child.exitcode in (0, -9), f"a resumed run failed with exit code {child.exitcode}"
        identical = identical and _fingerprint(run_dir) == expected
        shutil.rmtree(run_dir)
    return Outcome(kills=done, steps_at_kill=steps, identical=identical)


def _newest_step(run_dir: Path) -> int:
    from poetx.train.checkpoint import checkpoints, step_of

    found = checkpoints(run_dir)
    return step_of(found[-1]) if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append a JSON line here")
    parser.add_argument("--streamed", action="store_true", help="weights from host memory, on a stand-in for a GPU")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    args = parser.parse_args()
    settings = [*args.settings, *(["model.offload=frozen"] if args.streamed else [])]
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        place = Path(scratch)
        outcome = run(args.kills, seed=args.seed, directory=place, settings=settings, stand_in=args.streamed)
        seconds = time.perf_counter() - began
    row = {
        "benchmark": "kill",
        "kills": outcome.kills,
        "identical": outcome.identical,
        "kills_before_first_checkpoint": outcome.steps_at_kill.count(0),
        "distinct_steps": len(set(outcome.steps_at_kill)),
        "seconds": round(seconds, 1),
        "seed": args.seed,
    } | ({"settings": settings} if settings else {})
    print(row)
    if args.out:
        append(args.out, [row | provenance(torch.device("cpu"))])
    if not outcome.identical:
        raise SystemExit("a resumed run differs from the undisturbed one")


if __name__ == "__main__":
    main()
