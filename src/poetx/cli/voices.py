"""One voice for many processes: what ``torchrun`` starts as several ranks says everything once."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import typer

from poetx.distributed.launch import LostRankError, joined, started_ranks
from poetx.errors import AgreedError

T = TypeVar("T")


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Join the group of ranks for a command in the ``with`` block, of which only the first rank is heard.

    But for an error that is a rank's own: those that all of them raise are told once.
    """
    if started_ranks() == 1:
        yield
        return
    heard = True
    try:
        with joined():
            from poetx.distributed.ranks import rank

            heard = rank() == 0
            with contextlib.nullcontext() if heard else _muted():
                yield
    except AgreedError:
        if heard:
            raise
        raise typer.Exit(2) from None
    except LostRankError as error:
        if heard:  # of the first rank's own end torchrun tells
            print(f"error: {error}; what was saved is whole: continue with --resume", file=sys.stderr)
        end(1)


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def on_every_rank(action: Callable[[], T]) -> T:
    """The result of ``action``, which fails on all ranks where it fails on one."""
    if started_ranks() == 1:
        return action()
    from poetx.distributed.agreement import agreed

    return agreed(action)


def end(code: int) -> int:
    """``code``, for a lone process to end with; a rank ends at once, for others may be waiting for it."""
    if started_ranks() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
