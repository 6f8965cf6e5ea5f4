"""Several changes to tensors that no interruption can part."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_TRIES = 3


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Let signals that have a handler in Python, Ctrl-C above all, arrive when the block is left."""
    if threading.current_thread() is not threading.main_thread():  # no other thread is interrupted by a signal
        yield
        return
    arrived: list[tuple[int, Any]] = []
    numbers = sorted(signal.valid_signals(), key=lambda number: number == signal.SIGINT)  # put back last: it raises
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    deferring = True

    def handle(number: int, frame: Any) -> None:
        arrived.append((number, frame)) if deferring else handlers[number](number, frame)

    try:
        for number in handlers:
            signal.signal(number, handle)
        yield
    finally:
        try:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        finally:
            deferring = False  # should one arrive while handlers are put back, none is lost later
            for number, frame in arrived:
                handlers[number](number, frame)


def copy_at_once_(targets: Sequence[Tensor], values: Sequence[Tensor], *, wait: bool = True) -> None:
    """Copy every value into its target in one call, between whose tensors no signal arrives; it allocates nothing.

    Kinds and devices may differ: then it is a loop over ``copy_`` in C++, and waits for a device no more than that;
    without ``wait`` not at all, where the memory of the host is locked.
    """
    if targets:
        torch._foreach_copy_(list(targets), list(values), not wait)  # pyright: ignore[reportPrivateImportUsage]


def swap_(pairs: Sequence[tuple[Tensor, Tensor]], *also: Callable[[], object]) -> None:
    """Copy the second tensor of every pair into the first, in place, then call ``also``: all of it or nothing.

    The values have been computed beside what they replace, which costs their memory once: the copies allocate nothing,
    so that running out of memory belongs to the time before, when nothing has changed. Signals wait until all is done.
    An exception from a step that can be repeated (the copies, dropping an entry) is raised after all of them are done.

    Args:
        pairs: (target, value) of one shape, and best of one dtype and device.
        also: what belongs to the change beside tensors; each must do no harm when called twice.
    """
    with signals_deferred(), torch.no_grad():
        raised: BaseException | None = None
        for step in (lambda: copy_at_once_([pair[0] for pair in pairs], [pair[1] for pair in pairs]), *also):
            for attempt in range(_TRIES):
                try:
                    step()
                    break
                except BaseException as error:
                    raised = error
                    if attempt == _TRIES - 1:
                        raise
        if raised is not None:
            raise raised
