"""The command line. ``main`` is what the ``poetx`` script calls."""

from poetx.cli.app import app, main

__all__ = ["app", "main"]
