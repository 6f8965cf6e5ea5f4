"""``poetx compare``: one recipe under many methods, and the frontier of loss and memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from poetx.cli.bench import names_in
from poetx.cli.quiet import quiet_transformers
from poetx.cli.recipes import CommandWithSettings
from poetx.errors import UserError
from poetx.files import locked
from poetx.recipe import Recipe
from poetx.recipe.several import methods_in

_EPILOG = (
    "Examples: poetx compare demo --methods adamw,muon,scale,single-step --budget 30m | "
    "poetx compare mine.yaml train.steps=2000 --methods adamw,fast,single-step --seeds 0,1,2 --sweep"
)
_SHOWN = (0, 1, 4, 5, 9)  # columns in the terminal; the others are in the files
_WIDTH = 160
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="compare", epilog=_EPILOG, cls=CommandWithSettings)(compare)


def compare(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Built-in name, YAML file or run directory.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe settings.")] = None,
    methods: Annotated[str, typer.Option(help="Separated by commas: adamw, muon, scale, fast, single-step …")] = "",
    steps: Annotated[int | None, typer.Option(min=2, help="Steps of every run; the recipe's unless given.")] = None,
    budget: Annotated[str | None, typer.Option(help="Time for all of it, 90s, 30m or 4h, in place of steps.")] = None,
    seeds: Annotated[str, typer.Option(help="A run of each method for each, separated by commas.")] = "0",
    sweep: Annotated[
        bool, typer.Option("--sweep", help="First search every method's rates, as long for each.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where; default: runs/compare-NAME.")] = None,
) -> None:
    """Train one recipe by many methods: same model, text, tokens and seeds. Continues where it was stopped.

    Writes results.jsonl, table.md and index.html. The search tries eight pairs of rates by successive halving.
    """
    if steps is not None and budget is not None:
        raise UserError("--steps and --budget are both given; give one of them")
    seconds = None if budget is None else seconds_in(budget)
    settings = list(overrides or ()) + ([] if steps is None else [f"train.steps={steps}"])
    if not methods:
        raise UserError("--methods is missing: names separated by commas, such as adamw,muon,single-step")
    _run(
        recipe,
        settings,
        methods_in(names_in("methods", methods)),
        _numbers(seeds),
        seconds=seconds,
        sweep=sweep,
        out=out,
    )


def seconds_in(text: str) -> float:
    """``90s``, ``30m`` or ``4h`` in seconds. Raises :class:`UserError` on anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if match is None or float(match[1]) == 0:
        raise UserError(f"--budget {text}: write a time such as 90s, 30m or 4h")
    return float(match[1]) * _SECONDS[match[2]]


def _numbers(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise UserError(f"--seeds {text}: write different whole numbers separated by commas, such as 0,1,2")
    return [int(word) for word in words]


def _check_own(settings: Sequence[str]) -> None:
    """Refuse settings that every run of a comparison gets from it."""
    from poetx.compare.trials import OWN
    from poetx.recipe.loading import parsed

    for key, _ in parsed(settings):
        if key in OWN:
            raise UserError(f"{key}: is what compare settles for all runs{OWN[key]}; leave it out")


def _run(
    source: str,
    settings: list[str],
    methods: dict[str, dict[str, Any]],
    seeds: list[int],
    *,
    seconds: float | None,
    sweep: bool,
    out: Path | None,
) -> None:
    from poetx.recipe.several import load_methods

    quiet_transformers()
    recipes = load_methods(source, settings, methods)
    first = next(iter(recipes.values()))
    if not first.data.train:
        raise UserError("data.train is missing; give it on the command line: data.train=PATH")
    directory = out or Path("runs") / f"compare-{first.name}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = directory.parent / f".{directory.name}.lock"  # what a comparison finds in its directory is looked at
    with locked(lock, busy=f"{directory}: another comparison runs there; wait, or give another --out", keep=False):
        _compare(recipes, settings, directory, seeds, seconds=seconds, sweep=sweep)


def _compare(
    recipes: dict[str, Recipe],
    settings: list[str],
    directory: Path,
    seeds: list[int],
    *,
    seconds: float | None,
    sweep: bool,
) -> None:
    from rich.console import Console
    from rich.table import Table

    from poetx.compare.page import HEAD, frontier, held, table, write_results
    from poetx.compare.trials import Stopped, finished_methods, open_comparison, steps_in
    from poetx.compare.trials import compare as compared

    first = next(iter(recipes.values()))
    console = Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def length() -> int:
        if seconds is None:
            return first.train.steps
        say("timing a few steps of each method ...")
        return steps_in(recipes, seconds, seeds=len(seeds), sweep=sweep)

    _check_own(settings)
    number = open_comparison(directory, recipes, seeds, sweep=sweep, steps=length, budget=seconds)
    recipes = {**finished_methods(directory, seeds), **recipes}  # the table keeps those of former commands
    tokens = number * first.train.batch_size * first.data.seq_len
    title = f"{first.name}: {len(recipes)} methods, {number} steps, {tokens / 1e6:.3g}M tokens"
    say(title)
    rows: list[dict[str, Any]] = []
    try:
        for row in compared(recipes, directory, steps=number, seeds=seeds, sweep=sweep, say=say):
            rows.append(row)
            loss = "diverged" if row["loss"] is None else f"validation loss {row['loss']:.4f}"
            say(f"{row['method']}, seed {row['seed']}: {loss}, {row['tokens_per_second']:,.0f} tokens/s")
            write_results(directory, title, rows, sweep=sweep)
    except Stopped as stopped:
        say(f"stopped; the same command continues in {directory}")
        raise typer.Exit(128 + stopped.signum) from None
    shown = Table()
    for place in _SHOWN:
        shown.add_column(HEAD[place], no_wrap=True, justify="right" if place else "left")
    for line in table(rows):
        shown.add_row(*(line[place] for place in _SHOWN))
    Console(width=max(console.width, _WIDTH)).print(shown)  # whole numbers, whatever the terminal's width
    none = "none, all diverged"
    say(f"on the frontier of loss and memory: {', '.join(frontier(rows)) or none}")
    say(f"of loss, state and gradient: {', '.join(frontier(rows, held)) or none}")
    say(f"wrote {directory / 'index.html'}, table.md and results.jsonl")
