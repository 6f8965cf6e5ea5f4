"""Rotations whose weight was merged or loaded without their optimizer, which starts them anew at its next step."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

logger = logging.getLogger(__name__)

_waiting: Any = WeakIdKeyDictionary()  # rotation → its layer's name
_watches: list[Any] = []


def restart_at_next_step(label: str, rotations: Iterable[Tensor]) -> None:
    """Have whichever optimizer steps ``rotations`` next drop what it keeps of them: it is of another base.

    Their layer knows no optimizer, so from the first call on every ``step()`` in the process asks whether one waits.
    """
    _waiting.update(dict.fromkeys(rotations, label))
    if not _watches:
        _watches.append(register_optimizer_step_pre_hook(_restart))


def is_up_to_date(rotations: Iterable[Tensor]) -> None:
    """Take back :func:`restart_at_next_step`: their optimizer knows, or its state was saved with them."""
    for rotation in rotations:
        _waiting.pop(rotation, None)


def _restart(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _waiting:
        return
    held = [p for group in optimizer.param_groups for p in group["params"] if p in _waiting]
    names = [name for p in held if (name := _waiting.pop(p)) and optimizer.state.pop(p, None)]
    if names:
        more = f" and {len({*names}) - 1} more layers" if len({*names}) > 1 else ""
        logger.warning(
            "%s%s: merged, or given another weight, without the optimizer; what it keeps of the rotations, of those "
            "before, starts anew. Call poetx.merge_(model, optimizer)",
            names[0],
            more,
        )
