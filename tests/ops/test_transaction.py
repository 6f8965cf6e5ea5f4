"""All of a swap or nothing of it, whatever interrupts."""

import signal
import sys
import threading

import pytest
import torch

from poetx.ops.transaction import swap_


def pairs():
    targets = [torch.zeros(3), torch.zeros(2, 2, dtype=torch.bfloat16), torch.zeros((), dtype=torch.int64)]
    return [(target, torch.ones_like(target)) for target in targets]


def states(changes, done):
    return {float(target.flatten()[0]) for target, _ in changes} | {float(bool(done))}


@pytest.mark.skipif(not hasattr(signal, "raise_signal"), reason="needs signals")
def test_a_signal_at_any_line_changes_all_or_nothing():
    """A real SIGINT, raised from a trace function at the n-th line that runs, for every n."""
    seen, n = set(), 0
    while n < 500:
        changes, done, lines = pairs(), [], 0

        def trace(frame, event, arg, at=n):
            nonlocal lines
            if "transaction" not in frame.f_code.co_filename:
                return None
            if event == "line":
                lines += 1
                if lines == at:
                    signal.raise_signal(signal.SIGINT)
            return trace

        n += 1
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            swap_(changes, lambda done=done: done.append(1))
            sys.settrace(before)
            if n > 1 and lines < n - 1:
                break
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        assert len(states(changes, done)) == 1, f"parted at line {n - 1}"
        seen |= states(changes, done)
    assert n > 20
    assert seen == {0.0, 1.0}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_step_that_fails_once_is_repeated_and_its_error_raised_at_the_end():
    changes, calls = pairs(), []

    def fails_once():
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("once")

    with pytest.raises(torch.OutOfMemoryError, match="once"):
        swap_(changes, fails_once, lambda: calls.append(2))
    assert calls == [1, 1, 2]
    assert states(changes, [1]) == {1.0}


def test_from_another_thread_and_without_tensors():
    changes, calls = pairs(), []
    thread = threading.Thread(target=lambda: swap_(changes, lambda: calls.append(1)))
    thread.start()
    thread.join()
    swap_([], lambda: calls.append(1))
    assert calls == [1, 1]
    assert states(changes, calls) == {1.0}
