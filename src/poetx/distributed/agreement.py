"""What all ranks of a group decide together, so that none waits for one that has given up.

Between them, the ranks of a run talk over two groups: the default one, which averages gradients and whose timeout
bounds a step, and a patient one over gloo, for what may take long on one rank while the others wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from poetx.distributed.ranks import rank, rank_count
from poetx.errors import AgreedError, UserError, one_line

T = TypeVar("T")

_patient: Any = None  # beside torch's default group, which is as global


def patient_group() -> Any:
    """The group whose operations may wait for long; None outside of :func:`poetx.distributed.launch.joined`."""
    return _patient


def set_patient_group(group: Any) -> None:
    """Make ``group`` the one that may wait for long; None: there is none any more."""
    global _patient
    _patient = group


def agreed(action: Callable[[], T]) -> T:
    """The result of ``action``, once it has ended on every rank; where it fails on one of them, all fail alike.

    Raises:
        AgreedError: what the first of the ranks that failed has to say; alone, what ``action`` raises.
    """
    if rank_count() == 1:
        return action()
    result: Any = None
    failure: Exception | None = None
    try:
        result = action()
    except (UserError, OSError) as error:
        failure = error
    if largest(int(failure is not None)):
        texts = gathered(None if failure is None else one_line(failure))
        failed = [index for index, text in enumerate(texts) if text is not None]
        who = "" if failed[0] == 0 else f"rank {failed[0]}: "
        raise AgreedError(f"{who}{texts[failed[0]]}") from failure
    return result


def largest(number: int) -> int:
    """The largest ``number`` over the ranks."""
    if rank_count() == 1:
        return number
    value = torch.tensor(number)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX, group=_patient)
    return int(value)


def gathered(value: T) -> list[T]:
    """``value`` of every rank, in their order; plain values only."""
    values: list[Any] = [value] * rank_count()
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value, group=_patient)
    return values


def on_first(action: Callable[[], T]) -> T | None:
    """Have the first rank do something, and get its result there; the others wait for it, and get None."""
    return agreed(lambda: action() if rank() == 0 else None)


def from_first(action: Callable[[], T]) -> T:
    """On every rank the result of ``action``, a plain value, which runs on the first alone."""
    return gathered(on_first(action))[0]  # pyright: ignore[reportReturnType]


def first_then_others(action: Callable[[], T]) -> T:
    """The result of ``action`` on every rank, which the others begin when the first has done it."""
    done = agreed(lambda: [action()] if rank() == 0 else [])
    return agreed(lambda: done[0] if done else action())


def check_equal(what: Mapping[str, Any]) -> None:
    """Compare plain values by their names with the first rank's.

    Raises:
        AgreedError: on every rank, naming the first rank that differs, and in what.
    """
    everyone = gathered(dict(what))
    for index, theirs in enumerate(everyone):
        for name in everyone[0] | theirs:
            here, there = everyone[0].get(name), theirs.get(name)
            if here != there:
                raise AgreedError(
                    f"rank {index} differs from rank 0: {name} is {there} there, and {here} on rank 0; start all ranks "
                    "with the same recipe, text and versions"
                )
