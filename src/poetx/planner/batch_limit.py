"""What fits: the largest batch on a card, found by asking the estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from poetx.errors import UserError
from poetx.planner.estimate import GIB, MemoryEstimate, estimate_memory, planned_recipe

#: Beyond this many sequences nobody looks for the limit.
_MOST = 1 << 16


@dataclass(frozen=True)
class BatchLimit:
    """The largest batch that fits, and what it takes.

    Attributes:
        batch_size: sequences in one backward pass; 0 where not even one fits.
        budget: bytes.
        at_limit: the estimate of the largest batch that fits, or of one sequence where none does.
        beyond: the estimate of one sequence more, or None where the search stopped at 65 536.
    """

    batch_size: int
    budget: int
    at_limit: MemoryEstimate
    beyond: MemoryEstimate | None


def largest_batch(
    source: Any,
    budget_gib: float,
    overrides: Sequence[str] = (),
    *,
    recipe: Any = None,
    device: str = "cuda",
    ranks: int = 1,
) -> BatchLimit:
    """Search the largest ``train.micro_batch_size`` whose predicted peak is at most ``budget_gib`` · 2³⁰ bytes.

    The arguments beside the budget are those of :func:`estimate_memory`. The peak grows with the batch in straight
    pieces, so a line through two points mostly hits at once.

    Raises:
        UserError: a budget that is not positive and finite, or what :func:`estimate_memory` raises.
    """
    if not 0 < budget_gib * GIB < math.inf:
        raise UserError(f"gpu={budget_gib}: must be a positive, finite number of GB")
    budget = int(budget_gib * GIB)
    own_model, plan = planned_recipe(source, overrides, recipe)
    share, micro_batch = plan.train.share(ranks)
    passes = min(2, share // micro_batch)
    seen: dict[int, MemoryEstimate] = {}

    def estimate(batch: int) -> MemoryEstimate:
        if batch not in seen:
            changed = plan.with_keys({"train.micro_batch_size": batch, "train.batch_size": batch * passes * ranks})
            asked, own = (changed, None) if own_model is None else (own_model, changed)
            seen[batch] = estimate_memory(asked, recipe=own, device=device, ranks=ranks)
        return seen[batch]

    size = search(lambda batch: estimate(batch).peak, budget)
    return BatchLimit(size, budget, estimate(max(1, size)), seen.get(size + 1))


def search(peak: Callable[[int], int], budget: int, most: int = _MOST) -> int:
    """The largest batch with ``peak(batch) <= budget``, 0 if none, for a peak that does not fall."""
    low, high = 0, most + 1
    points: dict[int, int] = {}
    guess = 1
    while high - low > 1:
        points[guess] = peak(guess)
        if points[guess] <= budget:
            low = guess
        else:
            high = guess
        guess = _next_guess(points, low, high, budget)
    return low


def _next_guess(points: dict[int, int], low: int, high: int, budget: int) -> int:
    if low == 0 or high - low <= 1:
        return max(1, low)
    if len(points) == 1:
        return min(low + 1, high - 1)
    if high in points and len(points) % 4 == 3:
        return (low + high) // 2  # a bend can hold a line on one side
    # Between what fits and what does not, where both are known; a limit hit exactly is confirmed by the step beyond it.
    a, b = (low, high) if high in points else sorted(points)[-2:]
    slope = (points[b] - points[a]) / (b - a)
    line = int(a + (budget - points[a]) / slope) if slope > 0 else high - 1
    # Not far beyond what fits: where another phase holds the peak, the line is flat and means nothing.
    return min(max(line, low + 1), 4 * low, high - 1)
