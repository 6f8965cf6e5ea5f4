"""Opaque by default, transparent for measuring."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import random_skew
from poetx.ops.cayley import cayley
from poetx.ops.library import transparent_operators


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


def names(q):
    with Names() as mode:
        G = cayley(q, size=8, block_size=4, order=3)
    return G, mode.seen


def test_a_dispatch_mode_sees_the_operator_or_its_inside():
    q = random_skew(8, 4)
    opaque, outside = names(q)
    with transparent_operators():
        seen_through, inside = names(q)
    assert "poetx.cayley.default" in outside
    assert "aten.bmm.default" not in outside
    assert "aten.bmm.default" in inside
    assert "poetx.cayley.default" not in inside
    assert torch.equal(opaque, seen_through)
    assert names(q)[1] == outside
