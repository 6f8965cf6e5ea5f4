"""``poetx`` on the command line. Heavy imports happen inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from poetx.cli.bench import app as bench_app
from poetx.cli.memory import register as register_memory
from poetx.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from poetx.recipe import Recipe
    from poetx.train.progress import Reporter
    from poetx.train.run import RunResult

app = typer.Typer(
    name="poetx",
    help="Train language models in the memory of a LoRA run, by POET-X.",
    epilog="Start with: poetx train    (a demo of a few minutes, no download)",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_DEVICE = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
_RUN = Annotated[str, typer.Argument(metavar="RUN", help="Run directory, or exported model directory.")]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code. A user's mistake is one line on stderr and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model's text may have any character, a terminal's encoding not
    try:
        app(args=argv)
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BrokenPipeError:  # `poetx ... | head`
        return 128 + signal.SIGPIPE
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib import metadata

        print(f"poetx {metadata.version('poetx')}")
        raise typer.Exit


@app.command(
    epilog="Examples: poetx train | poetx train llama-60m data.train=corpus.jsonl run_dir=runs/mine | "
    "poetx train runs/mine --resume"
)
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="Built-in name, YAML file, or run directory. Default: the demo."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Recipe settings, for example train.steps=500 poet=null."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest whole checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an earlier run in the same place.")] = False,
) -> None:
    """Train a model from a recipe. With no recipe: a demo of a few minutes, with nothing to download."""
    overrides = list(overrides or [])
    if recipe is not None and "=" in recipe and not Path(recipe).exists():
        overrides.insert(0, recipe)
        recipe = None
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")

    from rich.console import Console

    from poetx.recipe import DEMOS, load_recipe

    loaded = load_recipe(recipe, overrides)  # before torch is imported: a typing mistake is answered at once
    if recipe in (None, *DEMOS) and loaded.run_dir is None and not overwrite:
        loaded = _place_demo(loaded, resume=resume)

    from poetx.train.environment import keep_freed_memory
    from poetx.train.progress import LiveReporter, PlainReporter
    from poetx.train.run import train as run_training

    keep_freed_memory()
    _quiet_transformers()
    console = Console()
    reporter = LiveReporter(console) if console.is_terminal else PlainReporter(console)
    with _library_warnings_to(reporter):
        result = run_training(loaded, resume=resume, overwrite=overwrite, reporter=reporter)
    if result.signum is not None:
        console.print(_stopped_text(result), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(128 + result.signum)
    _show_result(console, loaded, result)


@app.command(epilog="Example: poetx export runs/demo my-model")
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; must not exist, or be empty.")],
) -> None:
    """Write a run's newest checkpoint as a plain Hugging Face model that transformers loads by itself."""
    from poetx.train.export import TOKENIZER_DIR, export_model, load_run

    if not (Path(run) / "recipe.yaml").is_file():
        raise UserError(f"{run}: not a run directory (no recipe.yaml in it)")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: exists and is not an empty directory; choose another")
    _quiet_transformers()
    loaded = load_run(run, device="cpu")
    _show_notes(loaded.notes)
    directory.parent.mkdir(parents=True, exist_ok=True)
    export_model(loaded.model, Path(run) / TOKENIZER_DIR, directory)
    print(f"wrote {directory}: load it with AutoModelForCausalLM.from_pretrained({str(directory)!r})")


@app.command(epilog='Example: poetx generate runs/demo --prompt "def read(path):"')
def generate(
    run: _RUN,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among this many likeliest tokens; 0: all.")] = 50,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling.")] = 0,
    device: _DEVICE = "auto",
) -> None:
    """Continue a text with a trained model."""
    from poetx.train.export import generate_text, load_run

    _quiet_transformers()
    loaded = load_run(run, device=device)
    _show_notes(loaded.notes)
    text = generate_text(loaded, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
    print(prompt + text)


@app.command(name="eval", epilog="Example: poetx eval runs/demo --data other-text.txt")
def evaluate(
    run: _RUN,
    data: Annotated[
        str | None,
        typer.Option(help="Text to evaluate on (as data.train in a recipe). Default: the run's own."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in one forward pass.")] = 8,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a window. Default: the run's; of a model, up to 256.")
    ] = None,
    device: _DEVICE = "auto",
) -> None:
    """Loss and perplexity on validation text."""
    from poetx.runs.evaluate import evaluate_run

    _quiet_transformers()
    result = evaluate_run(run, data=data, batch_size=batch_size, seq_len=seq_len, device=device)
    _show_notes(result.notes)
    print(
        f"loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.2f} "
        f"({result.tokens:,} tokens of {result.source}, windows of {result.seq_len})"
    )


@app.command(epilog="Example: poetx spectrum runs/demo")
def spectrum(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory.")],
    device: _DEVICE = "auto",
    json_lines: Annotated[bool, typer.Option("--json", help="One JSON object a layer instead of a table.")] = False,
) -> None:
    """Singular values of every rotated layer now, against the start of the run."""
    from poetx.runs.run_spectrum import run_spectrum

    _quiet_transformers()
    result = run_spectrum(Path(run), device=device)
    _show_notes(result.notes)
    if json_lines:
        for name, layer in result.layers.items():
            facts = {key: value for key, value in vars(layer).items() if key != "singular_values"}
            print(json.dumps({"layer": name, "step": result.step} | facts))
        return
    width = max(map(len, result.layers))
    print(f"step {result.step}, against the start")
    print(f"{'layer':<{width}}  ||W|| ratio-1  median change  largest change  entropy")
    for name, layer in result.layers.items():
        assert layer.norm_ratio is not None
        print(
            f"{name:<{width}}  {layer.norm_ratio - 1:+13.1e}  {layer.drift_median:13.1e}  {layer.drift_max:14.1e}  "
            f"{layer.entropy:7.4f}"
        )


@app.command(epilog="Example: poetx report runs/demo")
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: RUN/report.html.")] = None,
) -> None:
    """Write one self-contained HTML page: loss, speed, memory, merges, spectrum."""
    from poetx.runs.report import write_report

    print(f"wrote {write_report(run, output or run / 'report.html')}")


@app.command(epilog="Example: poetx env")
def env() -> None:
    """Show versions, devices, and which kernels are used and why."""
    import torch

    import poetx.ops
    from poetx.models import resolve_device
    from poetx.train.environment import device_name, versions

    rows = list(versions().items())
    device = resolve_device("auto")
    rows.append(("device", f"{device} ({device_name(device)})"))
    rows += [
        (f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB")
        for index in range(torch.cuda.device_count())
        for properties in [torch.cuda.get_device_properties(index)]
    ]
    rows.append(("cpu threads", str(torch.get_num_threads())))
    rows += poetx.ops.kernel_report()
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


register_memory(app)
app.add_typer(bench_app)


def _place_demo(recipe: Recipe, *, resume: bool) -> Recipe:
    """A demo finds its own place: the first free of runs/NAME, runs/NAME-2, …, or the latest one to resume."""

    from poetx.train.checkpoint import checkpoints

    number, place, latest = 1, recipe.directory, None
    while checkpoints(place):
        latest, number = place, number + 1
        place = recipe.directory.with_name(f"{recipe.directory.name}-{number}")
    chosen = latest if resume and latest else place
    return recipe.with_keys({"run_dir": str(chosen)})


def _stopped_text(result: RunResult) -> str:
    stopped = f"stopped by {signal.Signals(result.signum or 0).name} after step {result.step} of {result.steps}"
    if result.checkpoint is None:
        return f"{stopped}; there was nothing to save yet"
    return f"{stopped}; saved {result.checkpoint}\ncontinue with: poetx train {result.run_dir} --resume"


def _show_result(console: Console, recipe: Recipe, result: RunResult) -> None:
    from poetx.recipe import DEMOS

    def say(text: str = "", style: str | None = None) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True, style=style)

    minutes, seconds = divmod(round(result.seconds), 60)
    say()
    say(f"reached step {result.step} in {minutes}:{seconds:02d}, peak memory {result.peak_memory_gib:.2f} GiB")
    say(_audit_text(result.audit))
    if result.first_perplexity and result.last_perplexity:
        say(f"validation perplexity {result.first_perplexity:,.1f} before, {result.last_perplexity:,.1f} after")
    try:
        text = "".join(_sample(recipe, result))
        say("\nthe model continues:", style="dim")
        say(text)
    except UserError as error:  # the run is finished and saved: no sample is no failure
        say(f"\nno sample: {error}")
    say()
    say(f"run        {result.run_dir}  (metrics.jsonl, checkpoints/)")
    if result.export_dir:
        say(f"model      {result.export_dir}  (plain Hugging Face model)")
    say("try next")
    say(f'  poetx generate {result.run_dir} --prompt "class Parser:"')
    say(f"  poetx eval {result.run_dir}")
    say(f"  poetx report {result.run_dir}")
    if recipe.name in DEMOS and recipe.poet is not None:
        # AdamW's best rate of those tried: a dense model does not bear the demos' own.
        say("  poetx train demo poet=null optimizer.lr=1.5e-3 run_dir=runs/dense  # dense with AdamW, to compare")
        say(f"  poetx train {recipe.name} data.train=PATH run_dir=runs/mine  # the same on your own text")


def _audit_text(audit: dict[str, Any]) -> str:
    text = f"audit: {audit['step']} steps, {audit['skipped_steps']} skipped as not finite, {audit['tokens']:,} tokens"
    if audit["merges"]:
        text += (
            f", {audit['merges']} merges (largest angle {audit['merge_angle']:.3f}, largest norm drift before "
            f"correction {audit['norm_drift']:.0e})"
        )
    return text


def _sample(recipe: Recipe, result: RunResult) -> tuple[str, str]:
    """A prompt and its continuation: a line of Python for the built-in text, else the first validation words."""
    from transformers import AutoTokenizer

    from poetx.train.export import TOKENIZER_DIR, LoadedModel, generate_text

    tokenizer = AutoTokenizer.from_pretrained(result.run_dir / TOKENIZER_DIR, local_files_only=True)
    prompt = "def read_file(path):\n"
    if recipe.data.train != "builtin":
        prompt = tokenizer.decode(result.first_validation_tokens, skip_special_tokens=True)
    loaded = LoadedModel(result.model.eval(), tokenizer, result.model.device, None, [])
    return prompt, generate_text(loaded, prompt, max_new_tokens=80)


def _show_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"note: broken checkpoint passed over: {note}", file=sys.stderr)


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


def _quiet_transformers() -> None:
    """No progress bars and warnings of transformers between our own lines."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
