"""A merge that is interrupted or fails leaves every layer as it was, or merged."""

import copy
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import poetx
from helpers import relative_error
from poetx import PoetConfig, convert_, merge_, param_groups, poet_layers

PACKAGE = str(Path(poetx.__file__).parent)
KINDS = {
    "dense": ({}, torch.float32, 1e-5),
    "bfloat16": ({}, torch.bfloat16, 2e-2),
    "extra bits": ({"weight_extra_bits": True}, torch.bfloat16, 2e-2),
    "int8": ({"mode": "mem", "weight_format": "int8", "group_size": 8}, torch.float32, 2e-2),
    "int8 with a residual": (
        {"mode": "mem", "weight_format": "int8", "group_size": 8, "weight_extra_bits": True},
        torch.float32,
        2e-2,
    ),
}


@pytest.fixture(autouse=True)
def short_merges(monkeypatch):
    """The angle's 16 power iterations, which change nothing, are most of a merge's calls."""
    monkeypatch.setattr("poetx.layers.poet.largest_angle", lambda side: side.packed.float().abs().max())


def trained(kind):
    settings, dtype, tolerance = KINDS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8)).to(dtype)
    convert_(model, PoetConfig(block_size=4, neumann_order="exact", init="keep", **settings))
    optimizer = torch.optim.Adam(param_groups(model, lr=1e-9, poet_lr=0.05))
    x = torch.randn(5, 12).to(dtype)
    for _ in range(2):
        model(x).float().square().sum().backward()
        optimizer.step()
    return model, optimizer, x, tolerance


class FailAt(TorchDispatchMode):
    """Raises at the n-th call of torch, before or after it is made."""

    def __init__(self, n, error, late):
        super().__init__()
        self.n, self.error, self.late, self.calls = n, error, late, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        if self.calls == self.n and not self.late:
            raise self.error
        result = function(*args, **(kwargs or {}))
        if self.calls == self.n:
            raise self.error
        return result


def check(model, optimizer, x, before, tolerance):
    """Every layer is one or the other, in all its parts; a second call merges all of them."""
    assert relative_error(model(x), before) < tolerance
    for _, layer in poet_layers(model):
        merged = int(layer.merge_count)
        assert sorted(layer.perm_in.tolist()) == list(range(layer.in_features))
        for skew in layer.rotations:
            assert bool(skew.any()) == (not merged)
            assert (skew.grad is None) == bool(merged)
            state = optimizer.state.get(skew)
            assert bool(state and state["exp_avg"].any()) == (not merged)
    counts = [int(layer.merge_count) for _, layer in poet_layers(model)]
    merge_(model, optimizer)
    assert relative_error(model(x), before) < tolerance
    assert [int(layer.merge_count) for _, layer in poet_layers(model)] == [count + 1 for count in counts]
    return tuple(counts)


def over_many_instants(kind, inject, stop, stride=5):
    """Inject at every ``stride``-th instant until the merge is through; which layers were merged then."""
    start = trained(kind)
    before, seen, n = start[0](start[2]).detach(), set(), 0
    while n < stop:
        n += stride
        model, optimizer, x, tolerance = copy.deepcopy(start)
        optimizer = torch.optim.Adam(param_groups(model, lr=1e-9, poet_lr=0.05))
        optimizer.load_state_dict(copy.deepcopy(start[1].state_dict()))
        for mine, theirs in zip(model.parameters(), start[0].parameters(), strict=True):
            mine.grad = None if theirs.grad is None else theirs.grad.clone()
        if not inject(n, model, optimizer):
            assert n > 20, n
            return seen
        seen.add(check(model, optimizer, x, before, tolerance))
    raise AssertionError("the merge never ended")


CTRL_C, NO_MEMORY = KeyboardInterrupt(), torch.OutOfMemoryError("no memory")
CASES = [(kind, CTRL_C, False) for kind in KINDS] + [
    ("dense", CTRL_C, True),
    ("int8 with a residual", NO_MEMORY, False),
]


@pytest.mark.parametrize(("kind", "error", "late"), CASES, ids=str)
def test_an_exception_at_any_call_of_torch(kind, error, late):
    def inject(n, model, optimizer):
        with FailAt(n, error, late) as mode:
            try:
                merge_(model, optimizer)
            except type(error):
                return True
        assert mode.calls < n
        return False

    assert {(0, 0), (1, 0), (1, 1)} >= over_many_instants(kind, inject, 2000) >= {(0, 0), (1, 0)}


@pytest.mark.parametrize("kind", ["extra bits"])
def test_a_real_signal_at_any_line(kind):
    """SIGINT raised from a trace function at every n-th line of the package that runs."""

    def inject(n, model, optimizer):
        lines = 0

        def trace(frame, event, arg):
            nonlocal lines
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            if event == "line":
                lines += 1
                if lines == n:
                    signal.raise_signal(signal.SIGINT)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            merge_(model, optimizer)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return lines >= n  # where a callback of the collector ran just then, Python lets the interrupt go

    assert over_many_instants(kind, inject, 4000, stride=13) >= {(0, 0), (1, 0)}
