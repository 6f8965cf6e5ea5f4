"""The one exception type for the user's mistakes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user asked for: one line that says what, where and what to do.

    A subclass of ``ValueError`` so that library users need not import it; the command line turns exactly
    this type (and ``OSError``) into a one-line message and a non-zero exit code, and nothing else.
    """


class AgreedError(UserError):
    """An error that every rank of a process group raises, so that one of them may tell it for all."""


def nearest(word: str, choices: Iterable[str], *, cutoff: float = 0.6) -> str:
    """``"; did you mean 'x'?"`` for the choice closest to ``word``; empty where none is as alike as ``cutoff``."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=cutoff)
    return f"; did you mean {match[0]!r}?" if match else ""


def out_of_memory(error: BaseException) -> str:
    """One line about memory that ran out, and what to do; empty for any other error."""
    names, text = ("MemoryError", "OutOfMemoryError"), one_line(error)
    if type(error).__name__ not in names and "can't allocate memory" not in text:
        return ""
    return (
        f"out of memory ({text[:160]}); use a smaller train.micro_batch_size, data.seq_len or --batch-size, "
        "model.gradient_checkpointing=true or train.chunked_loss=true (poetx memory RECIPE plans it)"
    )


def one_line(error: BaseException) -> str:
    """The text of an exception on one line; its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
