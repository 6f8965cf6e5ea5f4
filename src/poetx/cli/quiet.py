"""What every command that loads a model does first."""

from __future__ import annotations


def quiet_transformers() -> None:
    """No progress bars and warnings of transformers between our own lines."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
