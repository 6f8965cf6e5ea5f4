"""``poetx train``: a run from a recipe, what happens meanwhile, and what to do next."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from poetx.cli.quiet import quiet_transformers
from poetx.cli.recipes import CommandOfRecipes, complete_recipe, complete_setting
from poetx.cli.voices import end, on_every_rank, one_voice
from poetx.distributed.launch import LostRankError, started_ranks, was_restarted
from poetx.errors import UserError, out_of_memory
from poetx.files import reason

if TYPE_CHECKING:
    from rich.console import Console

    from poetx.recipe import Recipe
    from poetx.train.progress import Reporter
    from poetx.train.run import RunResult

DIVERGED = 3  # exit code of a run that reached its last step with a model that is worse than none

_EPILOG = (
    "Examples: poetx train | poetx train llama-60m data.train=corpus.jsonl run_dir=runs/mine | "
    "poetx train runs/mine --resume"
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog=_EPILOG, cls=CommandOfRecipes)(train)


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="Built-in name, YAML file, or run directory. Default: the demo.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Recipe settings, for example train.steps=500 poet=null.",
            autocompletion=complete_setting,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest whole checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an earlier run in the same place.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be trained; write nothing.")] = False,
) -> None:
    """Train a model from a recipe. With no recipe: a demo of a few minutes, with nothing to download.

    Exits with 3 where the last step was reached but the run diverged; 128 and the signal's number where one stopped it.
    """
    overrides = list(overrides or [])
    if recipe is not None and "=" in recipe and not Path(recipe).exists():
        overrides.insert(0, recipe)
        recipe = None
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if resume and dry_run:
        raise UserError("--dry-run shows what a fresh run would be; leave --resume out")
    with one_voice():
        if dry_run:
            _preview(recipe, overrides, overwrite=overwrite)
            return
        code = _train(recipe, overrides, resume=resume, overwrite=overwrite)
    if code:
        raise typer.Exit(code)


def _train(source: str | None, overrides: list[str], *, resume: bool, overwrite: bool) -> int:
    """The exit code of a run, alike on all ranks."""
    from rich.console import Console

    recipe, resume, overwrite = on_every_rank(lambda: _asked(source, overrides, resume=resume, overwrite=overwrite))

    from poetx.distributed.ranks import rank
    from poetx.train.progress import LiveReporter, PlainReporter
    from poetx.train.run import train as run_training

    quiet_transformers()
    output: Any = _Output(sys.stdout)
    console = Console(file=output)
    reporter = LiveReporter(console) if console.is_terminal else PlainReporter(console)
    try:
        with _library_warnings_to(reporter):
            result = run_training(recipe, resume=resume, overwrite=overwrite, reporter=reporter)
    except (UserError, OSError, LostRankError):
        raise
    except Exception as error:
        if text := out_of_memory(error):
            print(f"error: {text}", file=sys.stderr)
        else:  # ours, or a library's: whoever reports it needs the traceback
            traceback.print_exc()
        console.print(_failed_text(recipe.directory, error), markup=False, highlight=False, soft_wrap=True)
        return end(2 if text else 1)
    if rank() == 0 and result.signum is not None:
        console.print(_stopped_text(result), markup=False, highlight=False, soft_wrap=True)
    elif rank() == 0:
        _show_result(console, recipe, result)
    if result.signum is not None:
        return 128 + result.signum
    if result.diverged and rank() == 0:
        remedy = "try lower learning rates (optimizer.lr, optimizer.poet_lr) or a longer optimizer.warmup_steps"
        print(f"error: {result.diverged}; {remedy}", file=sys.stderr)
    return DIVERGED if result.diverged else 0


def _preview(source: str | None, overrides: list[str], *, overwrite: bool) -> None:
    recipe, _, overwrite = _asked(source, overrides, resume=False, overwrite=overwrite)

    from poetx.planner.preview import preview

    quiet_transformers()
    for name, value in preview(recipe, ranks=started_ranks(), overwrite=overwrite):
        first, *more = value.splitlines()
        print("\n".join([f"{name:9}{first}", *(f"{'':9}{line}" for line in more)]))
    print("nothing was written (--dry-run)")


def _asked(source: str | None, overrides: list[str], *, resume: bool, overwrite: bool) -> tuple[Recipe, bool, bool]:
    """The recipe, and whether to resume and to overwrite; started again by torchrun, a run goes on where it can."""
    from poetx.recipe import DEMOS, load_recipe

    recipe = load_recipe(source, overrides)  # before torch is imported: a typing mistake is answered at once
    if source in (None, *DEMOS) and recipe.run_dir is None and not overwrite:
        recipe = _place_demo(recipe, resume=resume)
    if was_restarted():
        from poetx.train.checkpoint import checkpoints

        return recipe, bool(checkpoints(recipe.directory)), False
    return recipe, resume, overwrite


class _Output:
    """Standard output that nobody reads any more (``| head``) or that cannot be written: the run goes on without it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._safely(lambda: self._stream.write(text)) or 0

    def flush(self) -> None:
        self._safely(self._stream.flush)

    def _safely(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if not isinstance(error, BrokenPipeError):
                text = f"standard output cannot be written ({reason(error)}): training goes on without it"
                with contextlib.suppress(OSError):
                    print(text, file=sys.stderr)


def _place_demo(recipe: Recipe, *, resume: bool) -> Recipe:
    """A demo finds its own place: the first free of runs/NAME, runs/NAME-2, …, or the latest one to resume.

    Started again by torchrun, it is the place it began in: that is free as long as it has no checkpoint.
    """
    from poetx.train.checkpoint import checkpoints
    from poetx.train.run import LOCK

    number, place, latest = 1, recipe.directory, None
    while checkpoints(place):
        latest, number = place, number + 1
        place = recipe.directory.with_name(f"{recipe.directory.name}-{number}")
    resume = resume or (was_restarted() and not (place / LOCK).exists())
    chosen = latest if resume and latest else place
    return recipe.with_keys({"run_dir": str(chosen)})


def _stopped_text(result: RunResult) -> str:
    stopped = f"stopped by {signal.Signals(result.signum or 0).name} after step {result.step} of {result.steps}"
    if result.checkpoint is None:
        return f"{stopped}; there was nothing to save yet"
    return f"{stopped}; saved {result.checkpoint}\ncontinue with: poetx train {_word(result.run_dir)} --resume"


def _failed_text(run_dir: Path, error: Exception) -> str:
    from poetx.train.checkpoint import checkpoints

    saved = checkpoints(run_dir)
    if not saved:
        return f"failed unexpectedly ({type(error).__name__}, above); there was nothing saved yet that could be lost"
    return (
        f"failed unexpectedly ({type(error).__name__}, above); nothing that was saved is lost: {saved[-1]}\n"
        f"continue with: poetx train {_word(run_dir)} --resume"
    )


def _show_result(console: Console, recipe: Recipe, result: RunResult) -> None:
    from poetx.recipe import DEMOS

    def say(text: str = "", style: str | None = None) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True, style=style)

    minutes, seconds = divmod(round(result.seconds), 60)
    say()
    say(f"reached step {result.step} in {minutes}:{seconds:02d}, peak memory {result.peak_memory_gib:.2f} GiB")
    say(_audit_text(result.audit))
    before = "of the untouched model" if recipe.model.pretrained else "before"
    if result.first_perplexity and result.last_perplexity:
        say(f"validation perplexity {result.first_perplexity:,.1f} {before}, {result.last_perplexity:,.1f} after")
    prompt = _prompt(recipe, result)
    if recipe.model.pretrained and len(result.samples) > 1:
        for first, last in zip(result.samples[0], result.samples[-1], strict=False):
            say(f"\n{first['prompt'].strip()}", style="dim")
            said = {"untouched": first["text"], "trained": last["text"], "in the data": last.get("answer", "")}
            for name, text in said.items():
                if text:
                    say(f"{name + ':':13}{' '.join(text.split())}")
    else:
        _show_continuation(say, result, prompt)
    say()
    say(f"run        {result.run_dir}  (metrics.jsonl, checkpoints/)")
    if result.export_dir:
        say(f"model      {result.export_dir}  (plain Hugging Face model)")
    say("try next")
    words = "" if result.chats else " ".join(prompt.split()[:6])
    if result.chats:
        say(f"  poetx chat {_word(result.run_dir)}")
    say(f"  poetx generate {_word(result.run_dir)}" + (f" --prompt {_word(words)}" if words else ""))
    say(f"  poetx eval {_word(result.run_dir)}")
    say(f"  poetx report {_word(result.run_dir)}")
    if recipe.name in DEMOS and recipe.poet is not None:
        say("  poetx train demo method=adamw run_dir=runs/dense  # dense with AdamW, to compare")
        say(f"  poetx train {recipe.name} data.train=PATH run_dir=runs/mine  # the same on your own text")


def _word(text: str | Path) -> str:
    """As a shell takes it."""
    return shlex.quote(str(text))


def _show_continuation(say: Callable[..., None], result: RunResult, prompt: str) -> None:
    try:
        text = _continuation(result, prompt)
        say("\nthe model continues:", style="dim")
        say(prompt + text)
    except Exception as error:  # the run is finished and saved, and a model may generate otherwise: no failure
        say(f"\nno sample: {error if isinstance(error, UserError) else repr(error)}")


def _audit_text(audit: dict[str, Any]) -> str:
    text = f"audit: {audit['step']} steps, {audit['skipped_steps']} skipped as not finite, {audit['tokens']:,} tokens"
    if audit["merges"]:
        text += (
            f", {audit['merges']} merges (largest angle {audit['merge_angle']:.3f}, largest norm drift before "
            f"correction {audit['norm_drift']:.0e})"
        )
    return text


def _prompt(recipe: Recipe, result: RunResult) -> str:
    """A line of Python for the built-in text, else the first validation words, or the first question."""
    if recipe.data.train == "builtin":
        return "def read_file(path):\n"
    return _tokenizer(result).decode(result.first_validation_tokens, skip_special_tokens=not result.chats)


def _continuation(result: RunResult, prompt: str) -> str:
    from poetx.distributed.sharded import is_sharded
    from poetx.runs.generate import generate_text
    from poetx.runs.load import LoadedModel

    if any(map(is_sharded, result.model.parameters())):
        raise UserError("the model is spread over the processes; see poetx generate")
    loaded = LoadedModel(result.model.eval(), _tokenizer(result), result.model.device, None, [])
    positions = getattr(result.model.config, "max_position_embeddings", None) or 320
    return generate_text(loaded, prompt, max_new_tokens=max(1, min(80, positions // 4)))


def _tokenizer(result: RunResult) -> Any:
    from poetx.runs.load import load_tokenizer
    from poetx.train.export import TOKENIZER_DIR

    return load_tokenizer(result.run_dir / TOKENIZER_DIR)


@contextlib.contextmanager
def _library_warnings_to(reporter: Reporter) -> Iterator[None]:
    """Show what the library logs as notes, so that it does not tear the live display."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: reporter.note(record.getMessage())
    logger = logging.getLogger("poetx")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
