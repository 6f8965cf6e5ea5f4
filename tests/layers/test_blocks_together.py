"""Layers of one decoder layer make their blocks together: fewer and larger batches, the same numbers to the bit."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import poetx
from builders import turn
from poetx import PoetConfig, convert_, poet_layers, to_dense_
from poetx.layers.blocks_together import blocks_together, groups_of
from poetx.ops import cayley
from poetx.ops.together import Together


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(12, 20), nn.Linear(12, 20, False), nn.Linear(20, 12)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.mlp, self.last = nn.Linear(12, 12), MLP(), nn.Linear(12, 12)
        self.checkpointed, self.chunks, self.skips = "", 1, ""

    def forward(self, x):
        if self.skips != "first":
            x = x + self.first(x)
        if self.checkpointed:
            x = x + checkpoint(self.mlp, x, use_reentrant=False, **SELECTIVE.get(self.checkpointed, {}))
        else:
            x = x + torch.cat([self.mlp(part) for part in x.chunk(self.chunks)])
        return x if self.skips == "last" else self.last(x)


def save_all(context, operator, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE


SELECTIVE = {"selective": {"context_fn": partial(create_selective_checkpoint_contexts, save_all)}}


class Model(nn.Module):
    def __init__(self, blocks=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.checkpointed = ""

    def forward(self, x):
        for block in self.blocks:
            again = self.checkpointed
            x = checkpoint(block, x, use_reentrant=again == "reentrant") if again else block(x)
        return x


def model(blocks=2, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    net = Model(blocks).to(dtype)
    convert_(net, PoetConfig(block_size=4, **settings))
    turn(net, angle=0.2)
    return net


def inputs(dtype=torch.float32, seed=1):
    return torch.randn(8, 12, dtype=dtype, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def alone(net, x=None):
    """(outputs, gradient of x, those of the parameters), each layer by itself."""
    x = inputs(next(net.parameters()).dtype) if x is None else x
    net.zero_grad()
    x.grad = None
    out = net(x)
    out.square().sum().backward()
    return [out.detach(), x.grad] + [p.grad for p in net.parameters() if p.requires_grad]


def together(net, x=None, groups=None):
    with blocks_together(groups_of(net) if groups is None else groups):
        found = alone(net, x)
    assert all(layer.blocks_together is None for _, layer in poet_layers(net))
    return found


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.fixture
def made(monkeypatch):
    """How many rows of packed rotations went into each call that makes blocks."""
    calls = []
    make = cayley._cayley

    def counted(packed, *rest):
        calls.append(sum(map(len, packed)))
        return make(packed, *rest)

    monkeypatch.setattr(cayley, "_cayley", counted)
    return calls


ROWS = 3 + 3 + 2 * (3 + 5) + (5 + 3) + 3 + 3  # of one block's five layers


@pytest.mark.parametrize("mode", ["fast", "mem"])
@pytest.mark.parametrize("order", [3, 7, "exact"])
@pytest.mark.parametrize("again", ["", "reentrant", "not"])
def test_one_batch_for_all_layers_and_the_same_bits(mode, order, again, made):
    net = model(mode=mode, neumann_order=order)
    net.checkpointed = again
    expected = alone(net)
    made.clear()
    assert_same(together(net), expected)
    # Forward, again where it is checkpointed, and in mem's backward.
    assert made == [ROWS] * 2 * (1 + bool(again) + (mode == "mem"))


@pytest.mark.parametrize("permutation", ["random", "shared", "contiguous"])
@pytest.mark.parametrize("settings", [{}, {"mode": "mem"}, {"mode": "mem", "weight_format": "int8", "group_size": 4}])
def test_with_any_permutation_and_weight(permutation, settings, made):
    net = model(permutation=permutation, **settings)
    expected = alone(net)
    made.clear()
    assert_same(together(net), expected)
    assert set(made) == {ROWS}


@pytest.mark.parametrize("mode", ["fast", "mem"])
@pytest.mark.parametrize("part", ["mlp", "selective"])
def test_parts_that_are_checkpointed_by_themselves(mode, part):
    net = model(mode=mode)
    for block in net.blocks:
        block.checkpointed = part
    expected = alone(net)
    assert_same(together(net), expected)


@pytest.mark.parametrize("mode", ["fast", "mem"])
def test_layers_that_are_called_again(mode, made):
    net = model(mode=mode)
    for block in net.blocks:
        block.chunks = 4
    expected = alone(net)
    made.clear()
    assert_same(together(net), expected)
    assert made.count(ROWS) == 2 * (1 + (mode == "mem"))


def test_layers_that_are_not_called_are_left_out(made):
    net = model(blocks=1)
    groups, x, batches = groups_of(net), inputs(), []
    net.blocks[0].skips = "last"
    expected = alone(net, x)
    with blocks_together(groups):
        for _ in range(3):
            made.clear()
            assert_same(alone(net, x), expected)
            batches.append(list(made))
    assert batches == [[ROWS], [ROWS - 6], [ROWS - 6]]
    net.blocks[0].skips = ""
    expected = alone(net)
    assert_same(together(net, groups=groups), expected)


def test_skipping_now_and_then_is_right_each_time():
    net = model()
    groups = groups_of(net)
    with blocks_together(groups):
        for skipped in ("first", "", "last", "first", "last", "last", "", "first"):
            for block in net.blocks:
                block.skips = skipped
            for _ in range(2):
                found = alone(net)
                for _, layer in poet_layers(net):
                    layer.blocks_together = None
                assert_same(found, alone(net))
                for group in groups:
                    for layer in group.layers:
                        layer.blocks_together = group


@pytest.mark.parametrize("mode", ["fast", "mem"])
def test_rotations_written_between_forward_and_backward_are_noticed(mode):
    net = model(mode=mode)
    with blocks_together(groups_of(net)):
        loss = net(inputs()).sum()
        with torch.no_grad():
            net.blocks[0].mlp.up.skew_in.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_rotations_written_inside_a_pass_are_used_as_they_are():
    net = model()

    def write(*args):
        with torch.no_grad():
            net.blocks[0].last.skew_in.mul_(2)

    handle = net.blocks[0].mlp.register_forward_hook(write)
    with blocks_together(groups_of(net)):
        found = alone(net)
    handle.remove()
    assert_same(found, alone(net))


@pytest.mark.parametrize("mode", ["fast", "mem"])
def test_a_graph_that_is_kept_and_parts_of_it(mode):
    net, found = model(mode=mode), []
    up = net.blocks[0].mlp.up
    for groups in ([], groups_of(net)):
        net.zero_grad()
        with blocks_together(groups):
            loss = net(inputs()).square().sum()
            loss.backward(retain_graph=True)
            (one,) = torch.autograd.grad(loss, [up.skew_out], retain_graph=True)
            loss.backward()
        found.append([one, *(p.grad for p in net.parameters() if p.requires_grad)])
        assert torch.equal(2 * one, up.skew_out.grad)
    assert_same(*found)


def test_layers_of_other_settings_and_frozen_ones_make_their_own():
    overrides = {"*.first": {"neumann_order": 7}, "*.up": {"block_size": 5}, "*.last": {"mode": "mem"}}
    net = model(overrides=overrides)
    net.blocks[0].mlp.gate.skew_in.requires_grad_(False)
    for skew in net.blocks[1].mlp.gate.rotations:
        skew.requires_grad_(False)
    expected = alone(net)
    assert_same(together(net), expected)
    assert net.blocks[0].mlp.gate.skew_in.grad is None


def test_blocks_of_several_sizes_some_of_them_ragged(made):
    """Blocks of 5 in 12 and 20 features: one side is whole, one is not."""
    torch.manual_seed(0)
    net = nn.Sequential(Block(), Block())
    convert_(net, PoetConfig(block_size=5, overrides={"*.up": {"block_size": 4}}))
    turn(net, angle=0.2)
    expected = alone(net)
    made.clear()
    assert_same(together(net), expected)
    assert len(made) < 2 * 10  # each side by itself


def test_scratch_bounds_a_batch(made, monkeypatch):
    net = model(blocks=1)
    expected = alone(net)
    monkeypatch.setattr(cayley, "_SCRATCH", 24 * 16 * 10)
    made.clear()
    assert_same(together(net), expected)
    assert len(made) > 2
    assert max(made) <= 10
    assert sum(made) == ROWS


def test_without_gradients(made):
    net = model()
    want, groups = net(inputs()).detach(), groups_of(net)
    with blocks_together(groups):
        for context in (torch.no_grad(), torch.inference_mode()):
            made.clear()
            with context:
                assert torch.equal(net(inputs()), want)
            assert made == [ROWS] * 2
        found = alone(net)
    assert_same(found, alone(net))


def test_autocast():
    net = model()
    with torch.autocast("cpu", torch.bfloat16):
        expected = alone(net)
        assert_same(together(net), expected)


def test_blocks_that_are_there_are_taken(made):
    net = model(overrides={"*.up": {"mode": "mem"}})
    expected = alone(net)
    with poetx.shared_blocks(net):
        made.clear()
        assert_same(together(net), expected)
    assert made == [8, 8] * 2  # of mem's one layer a block, in forward and backward


def test_a_copy_made_inside_makes_its_own():
    net = model()
    with blocks_together(groups_of(net)):
        copied, read = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    for each in (copied, read):
        assert all(layer.blocks_together is None for _, layer in poet_layers(each))
        assert_same(alone(each), alone(net))


def test_what_breaks_off_leaves_nothing():
    net = model()
    groups = groups_of(net)

    def fail(*args):
        raise KeyboardInterrupt

    handle = net.blocks[0].mlp.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt), blocks_together(groups):
        net(inputs())
    handle.remove()
    assert all(group._now is None for group in groups)
    assert all(layer.blocks_together is None for _, layer in poet_layers(net))
    turn(net, angle=0.4)
    expected = alone(net)
    assert_same(together(net, groups=groups), expected)


def test_what_torch_compiles_makes_its_own():
    net = model()
    expected = alone(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with blocks_together(groups_of(net)):
        found = alone(compiled)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_who_is_together():
    net = nn.ModuleDict({"a": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "b": nn.Linear(8, 8)})
    experts = nn.ModuleDict({"router": nn.Linear(8, 8), "q": nn.Linear(8, 8)})
    experts["experts"] = nn.ModuleList([MLP(), MLP()])
    net["list"] = nn.ModuleList([nn.Linear(8, 8), MLP(), experts])
    convert_(net, PoetConfig(block_size=4, exclude_modules=()))
    names = [[layer.name for layer in group.layers] for group in groups_of(net)]
    mlp = ("gate", "up", "down")
    assert names == [
        [f"list.1.{name}" for name in mlp],
        ["list.2.router", "list.2.q"],
        *([f"list.2.experts.{expert}.{name}" for name in mlp] for expert in (0, 1)),
    ]


def test_layers_that_are_gone_are_not_held():
    net = model()
    groups = groups_of(net)
    together(net, groups=groups)
    gone = weakref.ref(net.blocks[0].mlp.up)
    expected = alone(to_dense_(copy.deepcopy(net), "blocks.0.mlp.up"))
    to_dense_(net, "blocks.0.mlp.up")
    gc.collect()
    assert gone() is None
    assert_same(together(net, groups=groups), expected)


def test_odd_blocks_are_the_same_but_for_where_they_lie_in_memory():
    net = model(overrides={"*": {"block_size": 3}})
    for a, b in zip(together(net), alone(net), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_what_another_thread_begins_is_not_taken_for_ones_own(monkeypatch):
    """As an evaluation beside a step, in the middle of a layer's taking its blocks."""
    net, x = model(), inputs(seed=2)
    expected, other = alone(net), net(x).detach()
    fits, seen = Together.fits, []

    def evaluate():
        with torch.no_grad():
            seen.append(net(x))

    def interrupted(self, number, both):
        fit = fits(self, number, both)
        if threading.current_thread() is threading.main_thread() and len(seen) < 6:
            thread = threading.Thread(target=evaluate)
            thread.start()
            thread.join()
        return fit

    monkeypatch.setattr(Together, "fits", interrupted)
    assert_same(together(net), expected)
    assert len(seen) == 6
    assert all(torch.equal(found, other) for found in seen)
