"""``poetx data``: tokenize a text once, for many runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from poetx.cli.quiet import quiet_transformers
from poetx.cli.recipes import CommandWithSettings, complete_setting

_EPILOG = (
    "Examples: poetx data corpus.jsonl tokens data.vocab_size=32000 | "
    "poetx data chat.jsonl tokens data.tokenizer=MODEL data.seq_len=2048 | poetx train llama-60m data.train=tokens"
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(epilog=_EPILOG, cls=CommandWithSettings)(data)


def data(
    source: Annotated[str, typer.Argument(metavar="SRC", help="As data.train in a recipe: a file, a directory, …")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the tokens go.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="The data section's settings.", autocompletion=complete_setting),
    ] = None,
) -> None:
    """Tokenize a text into a directory, which data.train then names. Stopped, the same command goes on."""
    from poetx.recipe.loading import load_data

    settings = load_data([f"data.train={source}", *(overrides or ())])

    from rich.console import Console

    from poetx.data.prepared import prepare_directory, samples

    quiet_transformers()
    progress = Console(stderr=True)
    meta = prepare_directory(
        settings, directory, lambda text: progress.print(text, markup=False, highlight=False, soft_wrap=True)
    )
    size = sum(file.stat().st_size for file in directory.glob("*.bin")) / 1e6
    rows = [
        ("training", f"{meta.train_tokens:,} tokens"),
        ("validation", f"{meta.validation_tokens:,} tokens"),
        ("vocabulary", f"{meta.vocab_size:,}, {meta.dtype}, {size:,.1f} MB"),
    ]
    if meta.packed:
        rows.append(("packed", f"into windows of {meta.packed} tokens (data.seq_len={meta.packed})"))
    rows += [(f"sample, {name}", repr(text)) for name, text in samples(directory, meta)]
    for name, text in rows:
        print(f"{name:20}{text}")
    print(f"\ntry next\n  poetx train RECIPE data.train={directory}")
