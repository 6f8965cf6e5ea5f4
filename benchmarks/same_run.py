"""Compare training at two revisions: the same short runs at both, every number equal to the bit.

    python -m benchmarks.same_run main HEAD            # two commits, tags or branches
    python -m benchmarks.same_run HEAD WORKTREE        # what is not committed yet
    python -m benchmarks.same_run main HEAD --resume   # and HEAD continues what main began

Four short runs on the CPU with the demos' model and text: the paper's form, the single step, an int8 base, released
gradients; two merges in each but the single step, which folds at every step. Whatever ``metrics.jsonl`` holds must be
equal, but for times and memory; fields that only HEAD records are listed. Each revision tokenises the text for itself,
so that a change there shows, too.

Nothing of poetx is imported here, only its command line is used: modules may move between the two revisions. Where a
recipe key was renamed since BASE, ``--base-key NEW=OLD`` gives the name it had.

Bits depend on the number of threads, so both revisions run with the same: torch's own choice, or OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORKTREE = "WORKTREE"  # instead of a revision: src as it is now
ENTRY = "import sys; from poetx.cli import main; sys.exit(main())"
WHERE = "import importlib.util; print(importlib.util.find_spec('poetx').origin)"
MERGES = "poet.merge_every={merge_every}"
#: Recipe and settings of each run.
RUNS = {
    "demo": ("demo", MERGES),
    "demo-single-step": ("demo-single-step",),
    "int8": ("demo", MERGES, "poet.mode=mem", "poet.weight_format=int8"),
    "released": ("demo", MERGES, "optimizer.release_gradients=true", "optimizer.clip=null"),
}
IGNORED = frozenset({"seconds", "tokens_per_second", "peak_memory_gib"})  # differ from run to run
FRACTIONS = frozenset({"norm_drift"})  # of a norm already, and in float32 nothing but rounding, near 1e-9
MISSING = "missing"
Line = Mapping[str, Any]  # of metrics.jsonl


@dataclass(frozen=True)
class Difference:
    """One value of ``metrics.jsonl`` that is not the same; a whole line that only one side has is its field "line"."""

    step: int
    name: str  # event.field
    base: Any
    head: Any
    relative: float  # see relative_difference

    def __str__(self) -> str:
        return f"step {self.step} {self.name}: {self.base!r} -> {self.head!r} (relative {self.relative:.1e})"


@dataclass
class Comparison:
    """What :func:`compare` found."""

    lines: int  # on either side
    fields: int  # distinct names of compared values
    first: Difference | None = None  # beyond the tolerance
    largest: dict[str, float] = field(default_factory=dict)  # relative difference by name, where there is any
    new: frozenset[str] = frozenset()  # fields that no line of BASE has: recorded since, no number changed


class RunFailed(Exception):
    """A revision could not do a run. The message says which and why."""


def compare(base: Sequence[Line], head: Sequence[Line], *, tolerance: float = 0.0) -> Comparison:
    """Compare the lines of two metrics files, matched by step and event; the fields ``IGNORED`` are left out.

    Args:
        tolerance: relative difference up to which two numbers count as the same; 0: they are equal to the bit.
    """
    base_places, head_places = _by_place(base), _by_place(head)
    places = sorted(base_places | head_places, key=lambda place: place[0])  # by step, else in the order of the files
    former = {f"{event}.{name}" for (_, event, _), values in base_places.items() for name in values}
    names: set[str] = set()
    found: list[Difference] = []
    for place in places:
        step, event, _ = place
        old, new = base_places.get(place), head_places.get(place)
        if old is None or new is None:
            sides = (MISSING, "there") if old is None else ("there", MISSING)
            found.append(Difference(step, f"{event}.line", *sides, math.inf))
            continue
        for name in old | new:
            names.add(f"{event}.{name}")
            if f"{event}.{name}" not in former:
                continue
            pair = old.get(name, MISSING), new.get(name, MISSING)
            if repr(pair[0]) != repr(pair[1]):  # a float's repr is exact, and tells -0.0 from 0.0
                found.append(Difference(step, f"{event}.{name}", *pair, relative_difference(name, *pair)))
    result = Comparison(lines=len(places), fields=len(names), new=frozenset(names - former))
    result.first = next((each for each in found if tolerance == 0 or each.relative > tolerance), None)
    for each in found:
        result.largest[each.name] = max(each.relative, result.largest.get(each.name, 0.0))
    return result


def relative_difference(name: str, a: Any, b: Any) -> float:
    """|a - b| / max(|a|, |b|), of ``FRACTIONS`` just |a - b|; infinite unless both are finite numbers."""
    if any(
        isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) for value in (a, b)
    ):
        return math.inf
    return abs(a - b) if name in FRACTIONS else abs(a - b) / (max(abs(a), abs(b)) or 1.0)


def _by_place(lines: Sequence[Line]) -> dict[tuple[int, str, int], dict[str, Any]]:
    """The compared values of each line by step, event, and a number that tells a line written twice."""
    places: dict[tuple[int, str, int], dict[str, Any]] = {}
    for line in (line for line in lines if line["event"] != "sample"):  # texts: of weights that are compared anyway
        number = 0
        while (place := (line["step"], line["event"], number)) in places:
            number += 1
        places[place] = dict(_flat({key: value for key, value in line.items() if key not in ("step", "event")}))
    return places


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif key not in IGNORED:
            yield f"{prefix}{key}", value


def read_lines(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics so far."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def overrides(run: str, *, steps: int, renamed: Mapping[str, str]) -> list[str]:
    """The settings of a run of ``steps`` steps; ``renamed`` has the revision's own name for a key, where it differs."""
    cadence = (
        f"train.steps={steps}",
        f"train.eval_every={max(1, steps // 3)}",
        "train.eval_windows=16",
        f"train.checkpoint_every={steps // 2}",
        "train.keep_checkpoints=2",
        "train.export=false",
        "train.device=cpu",  # elsewhere two runs of the same code may differ
    )
    pairs = [word.format(merge_every=steps * 5 // 12).split("=", 1) for word in (*RUNS[run][1:], *cadence)]
    return [f"{renamed.get(key, key)}={value}" for key, value in pairs]


@dataclass(frozen=True)
class Side:
    """One of the two revisions: its name on the screen, its source, and a directory for its runs and tokens."""

    name: str
    source: Path
    directory: Path
    renamed: Mapping[str, str]

    def train(self, run: str, *, steps: int, killed: Path | None = None) -> list[dict[str, Any]]:
        """Do a run; its metrics.

        Args:
            killed: leave here what a kill soon after the checkpoint at half the steps would have left of the run.
        """
        run_dir = self.directory / run

        def copy_once() -> None:
            assert killed is not None
            # The first line after the checkpoint: that is whole.
            if not killed.exists() and any(line["step"] > steps // 2 for line in read_lines(run_dir)):
                shutil.copytree(run_dir, killed)

        settings = overrides(run, steps=steps, renamed=self.renamed)
        places = [f"run_dir={run_dir}", f"data.cache_dir={self.directory / 'tokens'}"]
        self._poetx("train", RUNS[run][0], *settings, *places, meanwhile=copy_once if killed else None)
        if killed and (not killed.exists() or max(line["step"] for line in read_lines(killed)) > steps - 2):
            raise RunFailed(f"{self.name} was over before half of it could be copied; give more --steps")
        return read_lines(run_dir)

    def resume(self, run_dir: Path) -> list[dict[str, Any]]:
        """Continue a run from its newest checkpoint, by its own recipe; its metrics."""
        self._poetx("train", str(run_dir), "--resume")
        return read_lines(run_dir)

    def check_source(self) -> None:
        """Make sure that this revision's code runs, and not an installed one."""
        command = [sys.executable, "-c", WHERE]
        found = subprocess.run(
            command, cwd=self.directory, env=self._environment(), capture_output=True, text=True, check=True
        ).stdout.strip()
        assert Path(found).is_relative_to(self.source), f"{self.name}: poetx is imported from {found}"

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(self.source), os.environ.get("PYTHONPATH")]))
        return os.environ | {"PYTHONPATH": path}

    def _poetx(self, *words: str, meanwhile: Callable[[], None] | None = None) -> None:
        """The command line to its end; ``meanwhile`` is called a few times a second."""
        log = self.directory / "output.txt"
        command = [sys.executable, "-c", ENTRY, *words]
        with log.open("w") as output:
            child = subprocess.Popen(
                command, cwd=self.directory, env=self._environment(), stdout=output, stderr=subprocess.STDOUT
            )
        try:
            while child.poll() is None:
                if meanwhile is not None:
                    meanwhile()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(0.1)
        finally:
            child.kill()  # nothing, unless we were interrupted
            child.wait()
        if child.returncode:
            last = " | ".join(log.read_text(errors="replace").split("\n")[-4:]).strip(" |")
            raise RunFailed(f"{self.name} ended with exit code {child.returncode}: {last}")


@contextlib.contextmanager
def checked_out(revision: str, directory: Path) -> Iterator[Path]:
    """The ``src`` of a revision, in a git worktree for the duration; of the working tree, as a copy."""
    if revision == WORKTREE:
        yield Path(shutil.copytree(ROOT / "src", directory / "src"))
        return
    try:
        git("worktree", "add", "--quiet", "--detach", str(directory), revision)
        yield directory / "src"
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            git("worktree", "remove", "--force", str(directory))


def git(*words: str) -> str:
    """Output of a git command on this repository."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def show(title: str, found: Comparison, *, tolerance: float) -> None:
    """A row of the table, and under it the largest differences."""
    verdict = f"first difference at {found.first}" if found.first else "same"
    if found.largest and not found.first:
        verdict = f"within {tolerance:g}"
    print(f"{title:<34}{found.lines:>6}{found.fields:>8}  {verdict}", flush=True)
    if found.new:
        print(f"    new since BASE: {', '.join(sorted(found.new))}")
    for name, relative in sorted(found.largest.items(), key=lambda item: -item[1]):
        print(f"    {name:<28} largest relative difference {relative:.1e}")


def results(base: Side, head: Side, run: str, args: argparse.Namespace) -> Iterator[tuple[str, Comparison]]:
    """Title and outcome of each comparison of a run, as soon as it is known."""
    killed = head.directory / f"{run}-begun" if args.resume else None
    expected = base.train(run, steps=args.steps, killed=killed)
    yield run, compare(expected, head.train(run, steps=args.steps), tolerance=args.tolerance)
    if killed is not None:
        title = f"{run}, from step {args.steps // 2}"
        yield title, compare(expected, head.resume(killed), tolerance=args.tolerance)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", metavar="BASE", help="revision to compare with")
    parser.add_argument("head", metavar="HEAD", help=f"revision to check; {WORKTREE}: src as it is now (or as BASE)")
    parser.add_argument("--runs", type=lambda text: text.split(","), default=list(RUNS), help=",".join(RUNS))
    parser.add_argument("--steps", type=int, default=60, help="of every run; at least 12 (default 60)")
    parser.add_argument("--resume", action="store_true", help="let HEAD also continue BASE's runs halfway")
    parser.add_argument("--tolerance", type=float, default=0.0, metavar="REL", help="relative difference to allow")
    parser.add_argument(
        "--base-key", action="append", default=[], metavar="NEW=OLD", help="name of a recipe key in BASE"
    )
    args = parser.parse_args(argv)
    if unknown := [run for run in args.runs if run not in RUNS]:
        parser.error(f"--runs {','.join(unknown)}: there are {', '.join(RUNS)}")
    if args.steps < 12:
        parser.error(f"--steps {args.steps}: at least 12")
    if wrong := [pair for pair in args.base_key if "=" not in pair]:
        parser.error(f"--base-key {wrong[0]}: write NEW=OLD")
    for revision in {args.base, args.head} - {WORKTREE}:
        try:
            git("rev-parse", "--quiet", "--verify", f"{revision}^{{commit}}")
        except subprocess.CalledProcessError:
            parser.error(f"{revision}: no such revision here; give a commit, a tag, a branch, or {WORKTREE}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 1 if any run differs or fails."""
    args = parse(argv)
    began, good = time.perf_counter(), True
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="same-run-"))).resolve()
        sides: list[Side] = []
        for name, revision in (("BASE", args.base), ("HEAD", args.head)):
            source = stack.enter_context(checked_out(revision, scratch / f"{name}-source"))
            directory = scratch / name
            directory.mkdir()
            renamed = dict(pair.split("=", 1) for pair in args.base_key) if name == "BASE" else {}
            sides.append(Side(name, source, directory, renamed))
            sides[-1].check_source()
            what = "" if revision == WORKTREE else f" ({git('log', '-1', '--format=%h %s', revision)})"
            print(f"{name} {revision}{what}")
        print(f"{'run':<34}{'lines':>6}{'fields':>8}  result", flush=True)
        for run in args.runs:
            try:
                for title, found in results(sides[0], sides[1], run, args):
                    show(title, found, tolerance=args.tolerance)
                    good = good and found.first is None
            except RunFailed as error:
                print(f"{run:<34}{'-':>6}{'-':>8}  failed: {error}", flush=True)
                good = False
    print(f"{'same' if good else 'not the same'}, {(time.perf_counter() - began) / 60:.1f} minutes")
    return 0 if good else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # leaves no worktree behind
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
