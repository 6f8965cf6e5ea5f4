"""The command line. ``main`` is what the ``poetx`` script calls."""

from poetx.cli.commands import main

__all__ = ["main"]
