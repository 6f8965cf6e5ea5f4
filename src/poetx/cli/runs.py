"""Commands that read a run: ``export``, ``generate``, ``eval``, ``spectrum``, ``report``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from poetx.cli.bench import names_in
from poetx.cli.quiet import quiet_transformers
from poetx.cli.voices import one_voice
from poetx.distributed.launch import started_ranks
from poetx.errors import UserError

DEVICE = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
RUN = Annotated[str, typer.Argument(metavar="RUN", help="Run directory, or exported model directory.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command(epilog="Example: poetx export runs/demo my-model")(export)
    app.command(epilog='Example: poetx generate runs/demo --prompt "def read(path):"')(generate)
    app.command(name="eval", epilog="Example: poetx eval runs/demo --data other-text.txt")(evaluate)
    app.command(epilog="Example: poetx spectrum runs/demo")(spectrum)
    app.command(epilog="Examples: poetx report runs/demo | poetx report runs/dense runs/demo -o both.html")(report)


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; must not exist, or be empty.")],
) -> None:
    """Write a run's newest checkpoint as a plain Hugging Face model that transformers loads by itself."""
    from poetx.runs.load import load_run
    from poetx.train.export import TOKENIZER_DIR, export_model

    if not (Path(run) / "recipe.yaml").is_file():
        raise UserError(f"{run}: not a run directory (no recipe.yaml in it)")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: exists and is not an empty directory; choose another")
    quiet_transformers()
    loaded = load_run(run, device="cpu")
    show_notes(loaded.notes)
    export_model(loaded.model, Path(run) / TOKENIZER_DIR, directory)
    print(f"wrote {directory}: load it with AutoModelForCausalLM.from_pretrained({str(directory)!r})")


def generate(
    run: RUN,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token each time.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among this many likeliest tokens; 0: all.")] = 50,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling.")] = 0,
    device: DEVICE = "auto",
) -> None:
    """Continue a text with a trained model."""
    from poetx.runs.generate import generate_text
    from poetx.runs.load import load_run

    quiet_transformers()
    loaded = load_run(run, device=device)
    show_notes(loaded.notes)
    text = generate_text(loaded, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
    print(prompt + text)


def evaluate(
    run: RUN,
    data: Annotated[
        str | None,
        typer.Option(help="Text to evaluate on (as data.train in a recipe). Default: the run's own."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in one forward pass.")] = 8,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a window. Default: the run's; of a model, up to 256.")
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(help="The field of --data's records that has their text. Default: the run's, or text.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness by name, separated by commas, instead of text.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of each task, so many questions.")] = None,
    include_path: Annotated[str | None, typer.Option(help="Directory with tasks of your own, as YAML.")] = None,
    device: DEVICE = "auto",
) -> None:
    """Loss and perplexity on validation text, under torchrun each process on a part of it; or scores of tasks."""
    if tasks is not None:
        _show_scores(
            run, tasks, data=data, limit=limit, include_path=include_path, batch_size=batch_size, device=device
        )
        return
    if text_field is not None and data is None:
        raise UserError("--text-field is for --data")
    if limit is not None or include_path is not None:
        raise UserError("--limit and --include-path are for --tasks")
    from poetx.runs.evaluate import evaluate_run

    quiet_transformers()
    with one_voice():
        result = evaluate_run(
            run, data=data, text_field=text_field, batch_size=batch_size, seq_len=seq_len, device=device
        )
        show_notes(result.notes)
        print(
            f"loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.2f} "
            f"({result.tokens:,} tokens of {result.source}, windows of {result.seq_len})"
        )


def _show_scores(run: str, tasks: str, *, data: str | None, device: str, **options: Any) -> None:
    from poetx.distributed.launch import started_ranks
    from poetx.runs.tasks import evaluate_tasks, score_lines

    if data is not None:
        raise UserError("--data and --tasks exclude each other")
    if started_ranks() > 1:
        raise UserError("--tasks is one process; start it without torchrun")
    quiet_transformers()
    for line in score_lines(evaluate_tasks(run, names_in("tasks", tasks), device=device, **options)):
        print(line)


def spectrum(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory.")],
    device: DEVICE = "auto",
    json_lines: Annotated[bool, typer.Option("--json", help="One JSON object a layer instead of a table.")] = False,
) -> None:
    """Singular values of every rotated layer now, against the start of the run."""
    from poetx.runs.evaluate import run_spectrum

    quiet_transformers()
    result = run_spectrum(Path(run), device=device)
    show_notes(result.notes)
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


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, drawn one over the other.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: RUN/report.html; of several runs report.html.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="The run that others are compared with. Default: the first.")
    ] = None,
) -> None:
    """Write one self-contained HTML page: loss, speed, memory, merges, spectrum, samples; several runs overlaid."""
    from poetx.runs.report import write_report

    default = runs[0] / "report.html" if len(runs) == 1 and baseline is None else Path("report.html")
    print(f"wrote {write_report(runs, output or default, baseline=baseline)}")


def show_notes(notes: list[str]) -> None:
    if started_ranks() > 1 and os.environ.get("RANK", "0") not in ("", "0"):
        return
    for note in notes:
        print(f"note: broken checkpoint passed over: {note}", file=sys.stderr)
