"""Kill one rank at random under ``torchrun --max-restarts``, and compare the curve with a job that was never killed.

    python -m benchmarks.kill_ranks --kills 5

Forms with that many kills in the rows already are left out, so the same command goes on where it was stopped. A small
Llama on text made here, two processes over gloo, in every form under DDP and FSDP2: a merge every 5 steps, a checkpoint
at every 2nd. A kill comes up to a second after a random checkpoint is there, so it falls into start-up, steps, merges
and the writing of checkpoints alike; torchrun starts all ranks again, and the run goes on by itself.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.kill import RECIPE, _newest_step, _write_text
from benchmarks.record import RESULTS, append, provenance, rows_in
from poetx.train.metrics import read_metrics

METHODS = {
    "fast": ["method=fast"],
    "int8": ["method=int8"],
    "single-step, free": ["method=single-step"],
    "mem": ["method=mem"],
    "single-step, rotation": ["method=single-step", "poet.update=rotation"],
}
FORMS = {(way, form): [*words, f"parallel={way}"] for form, words in METHODS.items() for way in ("fsdp", "ddp")}
RANKS = 2
STEPS, SPREAD = 30, 1.0  # of the recipe; seconds


def start(words: list[str], directory: Path, *, restarts: int) -> subprocess.Popen[bytes]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", f"--max-restarts={restarts}"]
    with (directory / "said.txt").open("ab") as said:
        command = [
            sys.executable,
            "-W",
            "ignore",
            *launch,
            "-m",
            "poetx",
            "train",
            str(directory / "kill.yaml"),
            *words,
        ]
        return subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": "1"})


def workers(job: subprocess.Popen[bytes]) -> list[int]:
    """The process numbers of the ranks that are there."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    return [int(number) for number in children.read_text().split()] if children.exists() else []


def kill_while_it_runs(job: subprocess.Popen[bytes], kills: int, run_dir: Path, seed: int) -> list[int]:
    """Kill a random rank so many times; the newest checkpoint's step at each kill."""
    generator, steps = random.Random(seed), []
    for goal in sorted(generator.sample(range(0, STEPS, 2), kills)):
        while job.poll() is None and (_newest_step(run_dir) < goal or len(workers(job)) < RANKS):
            time.sleep(0.01)
        time.sleep(generator.uniform(0, SPREAD))
        ranks = workers(job)
        if job.poll() is None and len(ranks) == RANKS:
            os.kill(generator.choice(ranks), signal.SIGKILL)
            steps.append(_newest_step(run_dir))
            while job.poll() is None and set(workers(job)) & set(ranks):
                time.sleep(0.01)
    return steps


def losses(run_dir: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(run_dir / "metrics.jsonl") if entry["event"] == "train"]


def compare(way: str, form: str, directory: Path, kills: int, seed: int) -> dict[str, Any]:
    common = [f"data.train={directory / 'text'}", f"data.cache_dir={directory / 'cache'}", *FORMS[way, form]]
    places = [directory / f"{way}, {form}, {name}" for name in ("undisturbed", "killed")]
    began = time.perf_counter()
    job = start([*common, f"run_dir={places[0]}"], directory, restarts=0)
    assert job.wait() == 0, (directory / "said.txt").read_text()[-2000:]
    job = start([*common, f"run_dir={places[1]}"], directory, restarts=kills + 1)
    steps = kill_while_it_runs(job, kills, places[1], seed)
    assert job.wait() == 0, (directory / "said.txt").read_text()[-2000:]
    one, other = map(losses, places)
    largest = max(abs(a - b) / a for a, b in zip(one, other, strict=True))
    row = {"benchmark": "kill_ranks", "form": form, "parallel": way, "ranks": RANKS, "kills": len(steps)}
    row |= {"steps_at_kill": steps, "losses": len(one), "largest_difference": largest, "seed": seed}
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=5, help="of each form")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "kill_ranks.jsonl", help="append JSON lines here")
    args = parser.parse_args()
    different = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        _write_text(directory / "text")
        (directory / "kill.yaml").write_text(RECIPE)
        done = {(row["parallel"], row["form"]) for row in rows_in(args.out) if row["kills"] >= args.kills}
        for number, (way, form) in enumerate(FORMS):
            if (way, form) in done:
                continue
            row = compare(way, form, directory, args.kills, args.seed + number)
            print(row, flush=True)
            append(args.out, [row | provenance(torch.device("cpu"))])
            different += [row] if row["largest_difference"] else []
    if different:
        raise SystemExit(f"{len(different)} jobs ended on another curve than undisturbed: {different[0]}")


if __name__ == "__main__":
    main()
