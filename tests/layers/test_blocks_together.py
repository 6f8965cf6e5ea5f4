"""Layers of one decoder layer make their blocks together: fewer and larger batches, the same numbers to the bit."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import poetx
from builders import turn
from poetx import PoetConfig, convert_, merge_, poet_layers, to_dense_
from poetx.layers import blocks_together
from poetx.ops import cayley


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
        if self.checkpointed == "mlp":
            x = x + checkpoint(self.mlp, x, use_reentrant=False)
        else:
            x = x + torch.cat([self.mlp(part) for part in x.chunk(self.chunks)])
        return x if self.skips == "last" else self.last(x)


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


def alone(net):
    """A copy whose layers make their own."""
    net = copy.deepcopy(net)
    for _, layer in poet_layers(net):
        layer.blocks_together = None
    return net


def inputs(dtype=torch.float32, seed=1):
    return torch.randn(8, 12, dtype=dtype, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def gradients(net, x=None):
    x = inputs(next(net.parameters()).dtype) if x is None else x
    net.zero_grad()
    x.grad = None
    out = net(x)
    out.square().sum().backward()
    return [out.detach(), x.grad] + [p.grad for p in net.parameters() if p.requires_grad]


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
    expected = gradients(alone(net))
    made.clear()
    found = gradients(net)
    assert_same(found, expected)
    # Forward, again where it is checkpointed, and in mem's backward.
    assert made == [ROWS] * 2 * (1 + bool(again) + (mode == "mem"))


@pytest.mark.parametrize("permutation", ["random", "shared", "contiguous"])
@pytest.mark.parametrize("settings", [{}, {"mode": "mem"}, {"mode": "mem", "weight_format": "int8", "group_size": 4}])
def test_with_any_permutation_and_weight(permutation, settings, made):
    net = model(permutation=permutation, **settings)
    expected = gradients(alone(net))
    made.clear()
    assert_same(gradients(net), expected)
    assert set(made) == {ROWS}


@pytest.mark.parametrize("mode", ["fast", "mem"])
def test_parts_that_are_checkpointed_by_themselves_or_run_again_have_the_same_bits(mode, made):
    net = model(mode=mode)
    for block in net.blocks:
        block.checkpointed = "mlp"
    assert_same(gradients(net), gradients(alone(net)))
    for block in net.blocks:
        block.checkpointed, block.chunks = "", 4
    expected = gradients(alone(net))
    made.clear()
    assert_same(gradients(net), expected)
    assert made.count(ROWS) >= 2
    assert all(getattr(layer.blocks_together._running, "now", None) is None for _, layer in poet_layers(net))


def test_layers_that_are_not_called_make_their_own_in_the_end_and_hold_nothing(made):
    net = model(blocks=1)
    block = net.blocks[0]
    block.skips = "last"
    x, batches = inputs(), []
    expected = gradients(alone(net), x)
    for _ in range(5):
        made.clear()
        assert_same(gradients(net, x), expected)
        batches.append(list(made))
    of_the_others = [ROWS - 3 - 3]
    assert batches == [[ROWS]] * 3 + [of_the_others] * 2
    assert getattr(block.first.blocks_together._running, "now", None) is None
    block.skips = ""
    for _ in range(2):
        assert_same(gradients(net), gradients(alone(net)))


def test_skipping_now_and_then_is_right_each_time():
    net = model()
    for skipped in ("first", "", "last", "first", "last", "last", "", "first"):
        for block in net.blocks:
            block.skips = skipped
        assert_same(gradients(net), gradients(alone(net)))


@pytest.mark.parametrize("mode", ["fast", "mem"])
@pytest.mark.parametrize("write", ["in place", ".data", "merge", "state"])
def test_what_is_written_after_a_forward_that_broke_off_is_seen(mode, write):
    net = model(mode=mode)
    block = net.blocks[0]
    other = model(mode=mode)
    turn(other, angle=0.4)

    def fail(*args):
        raise KeyboardInterrupt

    handle = block.mlp.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        net(inputs())
    handle.remove()
    block.skips = "first"  # so that layers are asked first that took nothing before
    if write == "merge":
        merge_(net)
    elif write == "state":
        net.load_state_dict(other.state_dict())
    else:
        with torch.no_grad():
            for _, layer in poet_layers(net):
                for skew in layer.rotations:
                    (skew.data if write == ".data" else skew).mul_(2)
    assert_same(gradients(net), gradients(alone(net)))


@pytest.mark.parametrize("mode", ["fast", "mem"])
def test_rotations_written_between_forward_and_backward_are_noticed(mode):
    net = model(mode=mode)
    loss = net(inputs()).sum()
    with torch.no_grad():
        net.blocks[0].mlp.up.skew_in.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", ["fast", "mem"])
def test_a_graph_that_is_kept_and_parts_of_it(mode):
    net, own = model(mode=mode), []
    for each in (net, alone(net)):
        each.zero_grad()
        loss = each(inputs()).square().sum()
        loss.backward(retain_graph=True)
        (one,) = torch.autograd.grad(loss, [each.blocks[0].mlp.up.skew_out], retain_graph=True)
        loss.backward()
        own.append([one, *(p.grad for p in each.parameters() if p.requires_grad)])
    assert_same(*own)
    assert torch.equal(2 * own[0][0], net.blocks[0].mlp.up.skew_out.grad)


def test_layers_of_other_settings_and_frozen_ones_make_their_own(made):
    overrides = {"*.first": {"neumann_order": 7}, "*.up": {"block_size": 5}, "*.last": {"mode": "mem"}}
    net = model(overrides=overrides)
    net.blocks[0].mlp.gate.skew_in.requires_grad_(False)
    for skew in net.blocks[1].mlp.gate.rotations:
        skew.requires_grad_(False)
    assert_same(gradients(net), gradients(alone(net)))
    assert net.blocks[0].mlp.gate.skew_in.grad is None


def test_blocks_of_several_sizes_ragged_and_of_several_types_in_one_call(made):
    """Blocks of 5 in 12 and 20 features: one side is whole, one is not."""
    torch.manual_seed(0)
    net = nn.Sequential(Block(), Block())
    convert_(net, PoetConfig(block_size=5, overrides={"*.up": {"block_size": 4}}))
    turn(net, angle=0.2)
    expected = gradients(alone(net))
    made.clear()
    assert_same(gradients(net), expected)
    assert len(made) < 2 * 10  # each side by itself


def test_scratch_bounds_a_batch(made, monkeypatch):
    net = model(blocks=1)
    expected = gradients(alone(net))
    monkeypatch.setattr(cayley, "_SCRATCH", 24 * 16 * 10)
    made.clear()
    assert_same(gradients(net), expected)
    assert len(made) > 2
    assert max(made) <= 10
    assert sum(made) == ROWS


def test_without_gradients_and_in_eval(made):
    net = model()
    want = alone(net)(inputs())
    for context in (torch.no_grad(), torch.inference_mode()):
        made.clear()
        with context:
            assert torch.equal(net(inputs()), want)
        assert made == [ROWS] * 2
    assert_same(gradients(net), gradients(alone(net)))


def test_autocast():
    net = model()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (gradients(each) for each in (net, alone(net)))
    assert_same(found, expected)


def test_shared_blocks_are_taken(made):
    net = model()
    expected = gradients(alone(net))
    with poetx.shared_blocks(net):
        made.clear()
        assert_same(gradients(net), expected)
        assert made == []


def test_copies_and_files(made):
    net = model()
    one = copy.deepcopy(net.blocks[0].mlp.up)
    assert one.blocks_together._parent() is None
    assert len(pickle.dumps(one)) < 3 * sum(t.numel() * t.element_size() for t in one.state_dict().values()) + 20000
    x = torch.randn(3, 12)
    assert torch.equal(one(x), net.blocks[0].mlp.up(x))
    copied = copy.deepcopy(net)
    assert copied.blocks[0].mlp.up.blocks_together is copied.blocks[0].first.blocks_together
    made.clear()
    assert_same(gradients(copied), gradients(alone(net)))
    assert made[:2] == [ROWS] * 2
    assert_same(gradients(pickle.loads(pickle.dumps(net))), gradients(alone(net)))


def test_a_layer_replaced_and_layers_made_dense():
    net = model()
    net.blocks[0].mlp.up = nn.Linear(12, 20)
    assert_same(gradients(net), gradients(alone(net)))
    to_dense_(net, "blocks.1.first")
    assert_same(gradients(net), gradients(alone(net)))


def test_a_forward_of_ones_own(made):
    net = model(blocks=1)
    block = net.blocks[0]
    expected = gradients(alone(net))
    block.forward = lambda x: Block.forward(block, x)
    made.clear()
    assert_same(gradients(net), expected)
    assert made == [ROWS]
    want = alone(net).blocks[0].mlp(inputs())
    made.clear()
    assert torch.equal(block.mlp(inputs()), want)  # from outside of the block's forward
    assert made == [8, 8, 8]


def test_threads_have_passes_of_their_own():
    net = model()
    expected = [net(inputs(seed=seed)) for seed in range(4)]
    found = {}

    def run(seed):
        for _ in range(5):
            found[seed] = net(inputs(seed=seed))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same([found[seed] for seed in range(4)], expected)


@pytest.mark.parametrize("mode", ["fast", "mem"])
def test_nothing_is_held_after_a_forward(mode):
    net = model(mode=mode)
    seen = []
    handle = net.blocks[0].mlp.register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    out = net(inputs())
    gc.collect()
    out.sum().backward()
    del out
    gc.collect()
    handle.remove()
    assert [ref() for ref in seen] == [None]


def test_what_torch_compiles_makes_its_own(made):
    net = model()
    expected = gradients(alone(net))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    found = gradients(compiled)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_who_is_gathered():
    net = nn.ModuleDict({"a": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "b": nn.Linear(8, 8)})
    net["list"] = nn.ModuleList([nn.Linear(8, 8), MLP()])
    convert_(net, PoetConfig(block_size=4, exclude_modules=()))
    groups = {name: layer.blocks_together for name, layer in poet_layers(net)}
    assert [name for name, group in groups.items() if group] == ["list.1.gate", "list.1.up", "list.1.down"]
    assert groups["list.1.up"].places == ("gate", "up", "down")
    assert blocks_together._MISSED > 1
