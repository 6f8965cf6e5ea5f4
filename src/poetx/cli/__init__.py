"""The command line. ``main`` is what the ``poetx`` script calls."""

from __future__ import annotations

import sys

INTERRUPTED = 130  # 128 + SIGINT

__all__ = ["INTERRUPTED", "main"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code. What it imports takes a second, in which Ctrl-C may come as well."""
    try:
        from poetx.cli.app import run

        return run(argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
