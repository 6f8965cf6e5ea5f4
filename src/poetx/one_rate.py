"""A warning where one learning rate was written into every group, and so into the rotations', which had its own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

logger = logging.getLogger(__name__)


class OneRate:
    """Watches the rates of the rotated groups, which no usual schedule makes those of the others at a bound.

    ``for group in optimizer.param_groups: group["lr"] = lr`` does, and so do schedulers that set rates (``OneCycleLR``
    with one ``max_lr``). It speaks once, at the second step in a row (a schedule may end at one least rate for all),
    where that moved the rotations' rate by a factor of 2 or more.
    """

    def __init__(self, rotated: Iterable[Mapping[str, Any]], rest: Iterable[Mapping[str, Any]], what: str) -> None:
        rates, others = _rates(rotated), _rates(rest)
        self._watches = bool(rates and others) and not rates & others
        self._own, self._alike, self._what = max(rates, default=0.0), 0, what

    def check(self, rotated: Iterable[Mapping[str, Any]], rest: Iterable[Mapping[str, Any]]) -> None:
        """Call this before every step."""
        rates = _rates(rotated)
        rate = max(rates, default=0.0)
        if not self._watches or not rate:
            return
        if rates != _rates(rest):
            self._own, self._alike = rate, 0
            return
        self._alike += 1
        if self._alike == 2 and not self._own / 2 < rate < self._own * 2:
            self._watches = False
            logger.warning(
                "lr of %s was %.3g and is now %.3g, as in all other groups: one rate was written into every group; "
                "scale each by its own instead, group['lr'] = group['initial_lr'] * factor, as LambdaLR does, or give "
                "the scheduler a list, one rate for each of optimizer.param_groups",
                self._what,
                self._own,
                rate,
            )


def _rates(groups: Iterable[Mapping[str, Any]]) -> set[float]:
    """Not of tensors, which would have to be waited for."""
    return {group["lr"] for group in groups if isinstance(group.get("lr"), (int, float))}
