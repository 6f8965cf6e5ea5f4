"""Trials: one run directory each, trained to its end or found finished, so that a comparison may be killed anywhere.

DIR/comparison.json          what all trials share; another comparison in DIR is refused
    METHOD/seed-0, seed-1 …  the trials that count
    METHOD/sweep-1-1 …       the search for rates before them: rung and trial
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from poetx.bench.step import build_run
from poetx.bench.timing import milliseconds
from poetx.data.prepare import prepare_data
from poetx.errors import UserError
from poetx.files import read_json, write_text
from poetx.models import resolve_device
from poetx.optim.baselines.rules import RULES
from poetx.planner.estimate import MemoryEstimate, estimate_memory
from poetx.recipe import Recipe
from poetx.recipe.loading import flat
from poetx.train.checkpoint import checkpoints
from poetx.train.metrics import divergence, is_whole, put_elapsed_, read_metrics
from poetx.train.run import train

SETTINGS = "comparison.json"
#: Factors on (the matrices' rate, the rate of the rest) that a sweep tries, the same number for every method.
TWO_RATES: tuple[tuple[float, ...], ...] = ((1, 1), (2, 1), (1 / 2, 1), (4, 1), (1 / 4, 1), (1, 2), (1, 1 / 2), (2, 2))
ONE_RATE: tuple[tuple[float, ...], ...] = ((1,), (2,), (1 / 2,), (4,), (1 / 4,), (8,), (1 / 8,), (16,))
#: Of the steps of a whole run: how long the trials of each rung of a sweep are; half of them goes on to the next.
RUNGS = (1 / 8, 1 / 4, 1 / 2)
_EVALUATIONS = 5
#: Of what a budget has left for steps; the rest is for planning, checkpoints and measuring memory.
_SHARE = 0.85
_FORWARD = 1 / 3  # of a step's time
#: Settings that each run gets from the comparison, and what says them there.
OWN = {
    **dict.fromkeys(("train.seed", "poet.seed"), " (--seeds)"),
    **{"run_dir": " (--out)", "train.export": "", "train.keep_checkpoints": "", "train.memory_every": ""},
    **dict.fromkeys(("train.eval_every", "train.checkpoint_every"), " (every fifth of the steps)"),
}
Say = Callable[[str], None]


class Stopped(Exception):
    """A signal has asked to end; what is done is kept."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


@dataclass(frozen=True)
class Trial:
    """One run of a comparison.

    Attributes:
        rates: by dotted key. seed: of everything. place: its run directory.
    """

    method: str
    recipe: Recipe
    rates: dict[str, float]
    seed: int

    @property
    def place(self) -> Path:
        return self.recipe.directory


def rates_of(recipe: Recipe) -> dict[str, float]:
    """The learning rates of a method by dotted key: of the matrices first, where they have one of their own."""
    own, values = recipe.optimizer, recipe.optimizer.model_dump()
    for key in ("angle", "poet_lr"):
        if key in values:
            return {f"optimizer.{key}": values[key], "optimizer.lr": own.lr}
    if "matrix_lr" in values:
        usual = RULES[own.name].lr if own.name in RULES else None
        rest = "lr" if values.get("end_lr") is None else "end_lr"
        return {"optimizer.matrix_lr": values["matrix_lr"] or usual or own.lr, f"optimizer.{rest}": values[rest]}
    return {"optimizer.lr": own.lr}


def compared(recipe: Recipe, steps: int, *, searching: bool = False) -> dict[str, Any]:
    """What a trial of ``recipe`` changes in it beside rates and seed, for so many steps.

    Args:
        searching: a trial of the search, of which only the last loss counts.
    """
    before = recipe.train.steps
    every = steps if searching else max(1, steps // _EVALUATIONS)
    return {
        "train.steps": steps,
        "optimizer.warmup_steps": round(recipe.optimizer.warmup_steps * min(1, steps / before)),
        "train.eval_every": every,
        "train.checkpoint_every": every,
        "train.keep_checkpoints": 1,
        "train.memory_every": None if searching else steps,  # the last one, when all state is there
        "train.export": False,
    }


def open_comparison(
    directory: Path,
    recipes: Mapping[str, Recipe],
    seeds: Sequence[int],
    *,
    sweep: bool,
    steps: Callable[[], int],
    budget: float | None = None,
) -> int:
    """Make ``directory`` this comparison's, or check that it is; returns the steps of a whole run.

    Args:
        steps: called where the comparison is new. Methods may be added to an older one, nothing else changes.
        budget: seconds from which ``steps`` follow; None: from no time.

    Raises:
        UserError: another comparison, something else, or a damaged one is there.
    """
    path, there = directory / SETTINGS, {}
    common: dict[str, Any] = {"sweep": sweep, "seeds": list(seeds), "budget": budget}
    mine = {name: recipe.to_dict() | {"name": name, "run_dir": None} for name, recipe in recipes.items()}
    if path.is_file():
        there = _settings(path)
        for key, value in common.items():
            if there.get(key, value) != value:
                raise UserError(
                    f"{directory}: has a comparison with {key}={there.get(key)}, not {value}; give another --out"
                )
        known = there["methods"]
        for name, recipe in recipes.items():
            values = recipe if name not in known else Recipe.from_dict(known[name] | {"name": name})
            before, now = (dict(flat(one.to_dict())) for one in (values, recipe))
            changed = [key for key in before | now if before.get(key) != now.get(key)]
            if other := next((key for key in changed if key not in ("name", "run_dir")), None):
                what = f"{other}: {before.get(other)} -> {now.get(other)}"
                raise UserError(f"{directory}: compares {name} with another recipe ({what}); give another --out")
        number = there["steps"]
        mine = known | mine
    else:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UserError(f"{directory}: exists and holds no comparison; choose another with --out")
        number = steps()
    directory.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({**there, "steps": number, **common, "methods": mine}, indent=1))
    return number


def _settings(path: Path) -> dict[str, Any]:
    """What ``comparison.json`` says. Raises :class:`UserError` where it is damaged."""
    there = read_json(path)
    methods, steps = there.get("methods"), there.get("steps")
    known = isinstance(methods, dict) and all(isinstance(values, dict) for values in methods.values())
    if not known or type(steps) is not int or steps < 2:
        raise UserError(f"{path}: damaged; remove its directory, or give another --out")
    return there


def finished_methods(directory: Path, seeds: Sequence[int]) -> dict[str, Recipe]:
    """The methods of the comparison in ``directory`` all of whose runs have reached their end."""
    there = _settings(directory / SETTINGS)
    places = {
        name: [directory / name / f"seed-{seed}" / "metrics.jsonl" for seed in seeds] for name in there["methods"]
    }
    return {
        name: Recipe.from_dict(values | {"name": name})
        for name, values in there["methods"].items()
        if all(_finished(metrics, there["steps"]) for metrics in places[name])
    }


def _check_text(directory: Path, recipe: Recipe) -> None:
    """Remember the text of a comparison. Raises :class:`UserError` where it has changed since another method's run."""
    there, text = _settings(directory / SETTINGS), prepare_data(recipe).meta.fingerprint
    if there.setdefault("text", text) != text:
        raise UserError(
            f"{directory}: was begun on other text (the files of data.train or the tokenizer have changed since), so "
            "that methods could not be compared; bring them back, or give another --out"
        )
    write_text(directory / SETTINGS, json.dumps(there, indent=1))


def compare(
    recipes: Mapping[str, Recipe], directory: Path, *, steps: int, seeds: Sequence[int], sweep: bool, say: Say
) -> Iterator[dict[str, Any]]:
    """Train every method with every seed, after a search for its rates with ``sweep``; a row for each.

    Raises:
        Stopped: by a signal. UserError: whatever ends a run.
    """
    for method, recipe in recipes.items():
        place = directory / method
        cache = recipe.data.cache_dir or str(directory.absolute())
        recipe = recipe.with_keys({"data.cache_dir": cache, "name": method})
        _check_text(directory, recipe)
        rates, note = rates_of(recipe), ""
        if sweep:
            rates, note = _search(method, recipe, rates, place, steps=steps, seed=seeds[0], say=say)
        predicted = estimate_memory(recipe.with_keys(_trial_keys(recipe, rates, seeds[0], steps)), device=_kind(recipe))
        for seed in seeds:
            trial = _trial(method, recipe, rates, place / f"seed-{seed}", seed=seed, steps=steps)
            row = _run(trial, say)
            yield row | {
                "predicted_peak": predicted.peak,
                "weights": _largest(predicted, "frozen") + _largest(predicted, "trainable"),
                "state": _largest(predicted, "optimizer"),
                "gradient": _largest(predicted, "gradient"),
                "trained": predicted.trainable,
                "rates_note": note,
            }


def _largest(estimate: MemoryEstimate, category: str) -> int:
    return max(phase.categories[category] for phase in estimate.phases.values())


def _kind(recipe: Recipe) -> str:
    return resolve_device(recipe.train.device).type


def _trial_keys(
    recipe: Recipe, rates: Mapping[str, float], seed: int, steps: int, *, searching: bool = False
) -> dict[str, Any]:
    keys = {**compared(recipe, steps, searching=searching), **rates, "train.seed": seed}
    return keys if recipe.poet is None else keys | {"poet.seed": seed}


def _trial(
    method: str, recipe: Recipe, rates: dict[str, float], place: Path, *, seed: int, steps: int, searching: bool = False
) -> Trial:
    keys = _trial_keys(recipe, rates, seed, steps, searching=searching)
    return Trial(method, recipe.with_keys(keys | {"run_dir": str(place)}), rates, seed)


def _search(
    method: str, recipe: Recipe, rates: dict[str, float], place: Path, *, steps: int, seed: int, say: Say
) -> tuple[dict[str, float], str]:
    """Successive halving over factors on the rates: the best rates, and a word where they lie at the edge."""
    factors = list(TWO_RATES if len(rates) == 2 else ONE_RATE)
    points = {by: {key: rate * factor for (key, rate), factor in zip(rates.items(), by, strict=True)} for by in factors}
    for number, part in enumerate(RUNGS, start=1):
        losses: dict[tuple[float, ...], float] = {}
        for index, by in enumerate(factors, start=1):
            length = max(2, round(steps * part))
            trial = _trial(
                method, recipe, points[by], place / f"sweep-{number}-{index}", seed=seed, steps=length, searching=True
            )
            loss = _run(trial, say)["loss"]
            losses[by] = float("inf") if loss is None else loss
        factors = sorted(losses, key=losses.__getitem__)[: len(factors) // 2]
    best = factors[0]
    tried = TWO_RATES if len(rates) == 2 else ONE_RATE
    ends = [key for i, key in enumerate(rates) if best[i] in (min(t[i] for t in tried), max(t[i] for t in tried))]
    return points[best], f"best at the edge of what was tried: {', '.join(ends)}" if ends else ""


def _run(trial: Trial, say: Say) -> dict[str, Any]:
    """The trial's row; trains it where it is not finished."""
    metrics, label = trial.place / "metrics.jsonl", f"{trial.method}, {trial.place.name}"
    if not _finished(metrics, trial.recipe.train.steps):
        shown = ", ".join(f"{key.partition('.')[2]} {rate:.3g}" for key, rate in trial.rates.items())
        say(f"{label}: {trial.recipe.train.steps} steps, {shown}")
        again = bool(checkpoints(trial.place))
        try:
            result = train(trial.recipe, resume=again, overwrite=not again)
        except UserError as error:
            raise UserError(str(error).replace("continue with --resume", "run the same command again")) from None
        if result.signum is not None:
            raise Stopped(result.signum)
        shutil.rmtree(trial.place / "checkpoints", ignore_errors=True)
    return _row(trial, [entry for entry in read_metrics(metrics) if is_whole(entry)])


def _finished(metrics: Path, steps: int) -> bool:
    """Whether a run's lines are all there, to the last: else, as after a fault of the disk, it is trained again."""
    entries = [entry for entry in read_metrics(metrics) if is_whole(entry)]
    found = {(entry["event"], entry["step"]) for entry in entries if entry["event"] != "audit" or "tokens" in entry}
    needed = {("train", step) for step in range(1, steps + 1)}
    return needed | {("validation", steps), ("audit", steps)} <= found


def _row(trial: Trial, entries: list[dict[str, Any]]) -> dict[str, Any]:
    put_elapsed_(entries)
    steps = [entry for entry in entries if entry["event"] == "train"]
    held = [entry for entry in entries if entry["event"] == "validation"]
    audit = next(entry for entry in reversed(entries) if entry["event"] == "audit")
    memory = [entry for entry in entries if entry["event"] == "memory"]
    diverged = divergence(entries)
    speeds = [entry["tokens_per_second"] for entry in steps[2:-1] or steps]  # first and last steps are measured
    tokens = trial.recipe.train.batch_size * trial.recipe.data.seq_len
    return {
        "method": trial.method,
        "seed": trial.seed,
        "rates": trial.rates,
        "steps": trial.recipe.train.steps,
        "tokens": audit["tokens"],
        "loss": None if diverged else held[-1]["loss"],
        "diverged": diverged,
        "tokens_per_second": statistics.median(speeds),
        "measured_peak": memory[-1]["peak"] if memory else None,
        "skipped_steps": audit["skipped_steps"],
        "curve": [[entry["step"] * tokens, round(entry["elapsed"], 3), entry["loss"]] for entry in held],
    }


def steps_in(recipes: Mapping[str, Recipe], seconds: float, *, seeds: int, sweep: bool) -> int:
    """How many steps every whole run may have, so that all of them take about so many seconds, by timing a few.

    Evaluations and the building of every trial are counted, reading text is not.

    Raises:
        UserError: fewer than 20.
    """
    began, trials = time.perf_counter(), sum(len(ONE_RATE) >> i for i in range(len(RUNGS))) if sweep else 0
    units = seeds + (sum(len(ONE_RATE) / 2**i * part for i, part in enumerate(RUNGS)) if sweep else 0)
    taken = beside = 0.0
    for recipe in recipes.values():
        step, building = _seconds_a_step(recipe)
        evaluation = _FORWARD * step * recipe.train.eval_windows / recipe.train.batch_size
        taken += step * units
        beside += seeds * (building + (_EVALUATIONS + 1) * evaluation) + trials * (building + 2 * evaluation)
    left = seconds - (time.perf_counter() - began) - beside
    number = max(0, int(_SHARE * left / taken))
    if number < 20:
        raise UserError(
            f"--budget of {seconds:g} seconds is {number} steps a run; give more, fewer methods or a smaller model"
        )
    return number


def _seconds_a_step(recipe: Recipe) -> tuple[float, float]:
    """Seconds of a step, and of building a model and its optimizer with the first step."""
    began, device = time.perf_counter(), resolve_device(recipe.train.device)
    run = build_run(recipe, device)
    settings = run.recipe.train
    shape = settings.micro_batch, recipe.data.seq_len
    ids = torch.randint(recipe.data.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    milliseconds(lambda: run.step(ids), device)
    building = time.perf_counter() - began
    times = [milliseconds(lambda: run.step(ids), device) for _ in range(3)]
    return statistics.median(times) / 1e3 * (settings.batch_size // settings.micro_batch), building
