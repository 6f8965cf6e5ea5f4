"""The command line. ``main`` is what the ``poetx`` script calls."""

from poetx.cli.app import main

__all__ = ["main"]
