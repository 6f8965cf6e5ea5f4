"""``poetx`` on the command line. Heavy imports happen inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from poetx.cli import chat, data, env, recipes, runs, train
from poetx.cli.bench import app as bench_app
from poetx.cli.compare import register as register_compare
from poetx.cli.memory import register as register_memory
from poetx.distributed.launch import started_ranks
from poetx.errors import UserError, one_line, out_of_memory
from poetx.files import hint, reason, unwritten

SIGPIPE = 13  # Windows has none
_ON_RANKS = ("train", "eval")

app = typer.Typer(
    name="poetx",
    help="Pre-train and fully fine-tune language models in the memory people actually have, by POET-X.",
    epilog="Start with: poetx train    (a demo of a few minutes, no download)",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


for _group in (train, recipes, data, chat, runs, env):
    _group.register(app)
register_memory(app)
register_compare(app)
app.add_typer(bench_app)


def run(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code. A user's mistake is one line on stderr and exit code 2.

    Raises:
        KeyboardInterrupt: by Ctrl-C; what is under way has ended cleanly.
    """
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model's text may have any character, a terminal's encoding not
    try:
        try:
            app(args=argv)
        finally:
            _flush()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BrokenPipeError:  # `poetx ... | head`
        return 128 + SIGPIPE
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        readable = hint(error).replace("writable", "readable and writable for you")
        print(f"error: {place}{reason(error)}; {readable}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if not out_of_memory(error):
            raise
        print(f"error: {out_of_memory(error)}", file=sys.stderr)
        return 2
    return 0


def _flush() -> None:
    """Write what is left of standard output now, where a full disk can still be told of."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # else the interpreter tries again at its end
        raise unwritten("standard output", error) from None


def _open_closed_streams() -> None:
    """Open what the shell has closed (``>&-``) on nothing: the next file that is opened would get its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", "-V", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib import metadata

        print(f"poetx {metadata.version('poetx')}")
        raise typer.Exit
    if context.invoked_subcommand not in _ON_RANKS and started_ranks() > 1:
        raise UserError(
            f"poetx {context.invoked_subcommand} is one process, and this is one of {started_ranks()} (WORLD_SIZE); "
            f"start it without torchrun, which is for {' and '.join(_ON_RANKS)}"
        )
