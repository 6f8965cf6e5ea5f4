"""Features that layers permute alike: one gather or none, the same function whatever happens to one of the layers."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from builders import turn
from poetx import PoetConfig, UserError, convert_, merge_, poet_layers, to_dense_
from poetx.layers import shared_features
from poetx.layers.shared_features import SharedFeatures
from poetx.ops import block_diagonal


class MLP(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.gate, self.up = nn.Linear(12, 20, bias), nn.Linear(12, 20, bias)
        self.down = nn.Linear(20, 12, bias)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(12), MLP()

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def block(permutation="shared", dtype=torch.float64, seed=0, **settings):
    torch.manual_seed(0)
    model = nn.ModuleDict({"block": Block()}).to(dtype)
    convert_(model, PoetConfig(block_size=5, seed=seed, permutation=permutation, **settings))
    turn(model, angle=0.1)
    return model["block"]


def inputs(dtype=torch.float64):
    return torch.randn(7, 12, dtype=dtype, generator=torch.Generator().manual_seed(1))


def groups(net):
    """(read by gate and up, between the layers)."""
    assert net.mlp.gate.shared_in is net.mlp.up.shared_in
    assert net.mlp.gate.shared_out is net.mlp.up.shared_out is net.mlp.down.shared_in
    return net.mlp.gate.shared_in, net.mlp.down.shared_in


def in_force(net, x=None, run=None):
    """Of both groups: whether it was in force in a forward pass."""
    found, running = {}, SharedFeatures.running

    def recorded(shared, *layer, **writes):
        now = running(shared, *layer, **writes)
        found.setdefault(shared, []).append(now is not None)
        return now

    with mock.patch.object(SharedFeatures, "running", recorded):
        (run or net)(inputs() if x is None else x)
    assert all(len(set(seen)) == 1 for seen in found.values())
    return [found.get(shared, [False])[0] for shared in groups(net)]


def gradients(net, x, run=None):
    x = x.clone().requires_grad_()
    net.zero_grad()
    (run or net)(x).square().sum().backward()
    return [x.grad, *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def close(got, want, tolerance=1e-12):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["fast", "mem", "weight"])
@pytest.mark.parametrize("by_weight", [False, True])
def test_function_and_gradients_are_those_of_layers_that_gather_by_themselves(mode, by_weight, monkeypatch):
    for module in ("poetx.ops.linear", "poetx.layers.shared_features"):
        monkeypatch.setattr(f"{module}.weight_is_cheaper", lambda *sizes: by_weight)
    net, x = block(mode=mode), inputs()
    assert in_force(net) == [True, True]
    got, y = gradients(net, x), net(x)
    with monkeypatch.context() as patch:
        patch.setattr(SharedFeatures, "_is_in_force", lambda self, parent: False)
        assert in_force(net) == [False, False]
        close(got, gradients(net, x))
        torch.testing.assert_close(y, net(x))
    dense = to_dense_(copy.deepcopy(net))
    torch.testing.assert_close(dense(x), y, rtol=1e-12, atol=1e-12)


def test_x_is_gathered_once_and_not_kept_beyond_its_readers(monkeypatch):
    made = []

    def counted(ctx, x, perm):
        made.append(perm)
        return forward(ctx, x, perm)

    forward = shared_features._Gather.forward
    monkeypatch.setattr(shared_features._Gather, "forward", counted)
    net, x = block(), inputs()
    net(x)
    assert len(made) == 1
    made.clear()
    with torch.no_grad():
        net(x)
    assert not made


def test_nothing_of_a_pass_is_kept_after_it_or_after_its_failure():
    net, x = block(), inputs().requires_grad_()
    normed = weakref.ref(net.norm(x))
    assert normed() is None
    net.mlp.register_forward_pre_hook(lambda module, given: seen.append(weakref.ref(given[0])))
    seen = []
    net(x).sum().backward()
    with mock.patch.object(type(net.mlp.down), "forward", side_effect=ValueError), pytest.raises(ValueError):
        net(x)
    gc.collect()
    assert [reference() for reference in seen] == [None, None]
    assert all(shared._open() is None for shared in groups(net))


class Pair(nn.Module):
    """Of two layers that could read the same x, which of them do is up to the caller."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 8)

    def forward(self, x, which="first second", between=lambda x: x):
        y = None
        for name in which.split():
            y = getattr(self, name)(x)
            x = between(x)
        return y


def pair():
    torch.manual_seed(0)
    model = nn.ModuleDict({"pair": Pair()}).double()
    convert_(model, PoetConfig(block_size=4, permutation="shared", neumann_order="exact"))
    turn(model, angle=0.1)
    return model["pair"]


def write_data(x):
    x.data.add_(1)
    return x


def write(x):
    with torch.no_grad():
        return x.add_(1)


@pytest.mark.parametrize("between", [write, lambda x: x + 1, lambda x: x.clone().add_(1), lambda x: x.requires_grad_()])
@pytest.mark.parametrize("which", ["first second", "first first second", "second first second"])
def test_what_is_no_longer_the_same_x_is_gathered_anew(between, which):
    net, x, like = pair(), inputs(), inputs()
    y = net(x, which, between)
    y.square().sum().backward()
    for _ in which.split()[1:]:
        like = between(like)
    layer = getattr(net, which.split()[-1])
    torch.testing.assert_close(y, like @ layer.dense_weight().T + layer.bias)
    assert (like.grad is None) or torch.equal(x.grad, like.grad)


def test_layers_called_one_at_a_time_hold_and_reuse_nothing():
    net, x = pair(), inputs()
    state = copy.deepcopy(net.state_dict())
    for change in (lambda: merge_(net), lambda: write_data(x), lambda: net.load_state_dict(state)):
        net(x, "first")
        change()
        torch.testing.assert_close(net(x, "first"), x @ net.first.dense_weight().T + net.first.bias)
        torch.testing.assert_close(net(x, "second"), x @ net.second.dense_weight().T + net.second.bias)


def test_threads_do_not_meet():
    net, results = block(), {}
    xs = [inputs() + k for k in range(4)]
    want = [net(x) for x in xs]

    def work(k):
        for _ in range(20):
            results[k] = net(xs[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(4):
        torch.testing.assert_close(results[k], want[k])


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant):
    net, x = block(), inputs()
    want = gradients(net, x)
    close(gradients(net, x, lambda x: checkpoint(net, x, use_reentrant=reentrant)), want)
    # The module's input is the very tensor that is recomputed from, and alive all the time.
    want = gradients(net, x, net.mlp)
    close(gradients(net, x, lambda x: checkpoint(net.mlp, x, use_reentrant=reentrant)), want)


SWITCH = {"to": ""}


class PartlyCheckpointed(MLP):
    """Where a switch says so, as in many models; conversion tries it without."""

    def forward(self, x):
        def inside(x):
            return nn.functional.silu(self.gate(x)) * self.up(x)

        switch = SWITCH["to"]
        if switch == "late":
            gate = self.gate(x)
            return self.down(checkpoint(lambda x: nn.functional.silu(gate) * self.up(x), x, use_reentrant=False))
        return self.down(checkpoint(inside, x, use_reentrant=switch == "reentrant") if switch else inside(x))


@pytest.mark.parametrize("switch", ["not reentrant", "reentrant", "late"])
def test_checkpointed_inside(switch, monkeypatch):
    torch.manual_seed(0)
    net = nn.ModuleDict({"mlp": PartlyCheckpointed()}).double()
    convert_(net, PoetConfig(block_size=5, permutation="shared"))
    turn(net, angle=0.1)
    x = inputs()
    want = gradients(net, x, net["mlp"])
    monkeypatch.setitem(SWITCH, "to", switch)
    if switch == "late":
        with pytest.raises(UserError, match=r"^mlp: a part of its forward runs by itself \(checkpointed"):
            net["mlp"](x)
    else:
        close(gradients(net, x, net["mlp"]), want)


def test_in_autocast_x_is_cast_and_gathered_once(monkeypatch):
    net, x = block(dtype=torch.float32), inputs(torch.float32)
    made, gather = [], block_diagonal.gather
    monkeypatch.setattr(block_diagonal, "gather", lambda x, *more, **out: made.append(x) or gather(x, *more, **out))
    with torch.autocast("cpu", torch.bfloat16):
        net(x)
    assert [x.dtype for x in made] == [torch.bfloat16] * 2  # the MLP's input, and what it writes


@pytest.mark.parametrize("frozen", ["down", "gate"])
def test_where_one_layer_is_not_merged_each_gathers_by_itself(frozen):
    net, x = block(neumann_order="exact"), inputs()
    getattr(net.mlp, frozen).requires_grad_(False)
    y = net(x)
    merge_(net)
    assert in_force(net) == [frozen == "down", False]
    torch.testing.assert_close(net(x), y, rtol=1e-12, atol=1e-12)
    getattr(net.mlp, frozen).requires_grad_(True)
    merge_(net)  # gate has had one less
    assert in_force(net) == [frozen == "down", False]
    torch.testing.assert_close(net(x), y, rtol=1e-12, atol=1e-12)


def test_where_one_layer_becomes_dense_or_another_is_put_in_its_place():
    net, x = block(), inputs()
    y = net(x)
    to_dense_(net, ["mlp.down"])
    assert len(net.mlp._forward_hooks) == 1  # of what gate and up read
    torch.testing.assert_close(net(x), y)
    net = block()
    plain = nn.Linear(20, 12, dtype=torch.float64)
    plain.weight.data, plain.bias.data = net.mlp.gate.dense_weight().detach().T, net.mlp.down.bias.data
    gate = net.mlp.gate.dense_weight().detach()
    net.mlp.down = plain
    want = nn.functional.silu(x @ gate.T + net.mlp.gate.bias) * (x @ net.mlp.up.dense_weight().T + net.mlp.up.bias)
    torch.testing.assert_close(net.mlp(x), want @ gate + plain.bias)


def test_states_of_random_permutations_are_taken_and_those_of_shared_ones_given():
    shared, other, x = block(neumann_order="exact"), block("random", seed=3, neumann_order="exact"), inputs()
    state = {key: value for key, value in other.state_dict().items() if "trained_with" not in key}
    y = other(x)
    shared.load_state_dict(state, strict=False)
    assert in_force(shared) == [False, False]
    torch.testing.assert_close(shared(x), y, rtol=1e-12, atol=1e-12)
    merge_(shared)
    assert in_force(shared) == [True, True]
    torch.testing.assert_close(shared(x), y, rtol=1e-12, atol=1e-12)
    state = {key: value for key, value in shared.state_dict().items() if "trained_with" not in key}
    other.load_state_dict(state, strict=False)
    torch.testing.assert_close(other(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["down", "up"])
def test_a_state_of_one_layer_alone_is_not_taken_for_permuted_alike(name):
    net, x = block(neumann_order="exact"), inputs()
    before = copy.deepcopy(net)
    merge_(net)
    other = getattr(before.mlp, name).state_dict()
    getattr(net.mlp, name).load_state_dict(other)
    assert in_force(net)[1] is False
    torch.testing.assert_close(net(x), before(x), rtol=1e-12, atol=1e-12)


def test_copies_share_among_themselves():
    net, x = block(), inputs()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert in_force(other) == [True, True]
        merge_(other)
        assert in_force(other) == [True, True]
        torch.testing.assert_close(other(x), net(x), rtol=1e-3, atol=1e-3)
    assert not torch.equal(other.mlp.down.perm_in, net.mlp.down.perm_in)


def test_one_graph_under_a_compiler_before_and_after_a_merge_and_a_replacement():
    net, x = block(dtype=torch.float32), inputs(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for change in (lambda: None, lambda: merge_(net), lambda: to_dense_(net, ["mlp.down"])):
        change()
        y = compiled(x)
        torch.testing.assert_close(y, net(x))
        y.sum().backward()


def test_permutations_are_drawn_alike_by_the_module_and_the_merge():
    net = block()
    drawn = []
    for _ in range(2):
        mlp = net.mlp
        assert torch.equal(mlp.gate.perm_in, mlp.up.perm_in)
        assert torch.equal(mlp.gate.perm_out, mlp.up.perm_out)
        assert torch.equal(mlp.gate.perm_out, mlp.down.perm_in)
        assert not torch.equal(mlp.down.perm_out, mlp.gate.perm_in)
        drawn.append([mlp.gate.perm_in, mlp.gate.perm_out, mlp.down.perm_out])
        drawn[-1] = [perm.clone() for perm in drawn[-1]]
        merge_(net)
    assert not any(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    assert len(list(poet_layers(net))) == 3


def test_outside_the_modules_own_forward_features_are_as_ever():
    net, x = block(), inputs()
    gate, up, down = net.mlp.gate, net.mlp.up, net.mlp.down
    torch.testing.assert_close(gate(x), x @ gate.dense_weight().T + gate.bias)
    h = torch.randn(3, 20, dtype=torch.float64)
    torch.testing.assert_close(down(h), h @ down.dense_weight().T + down.bias)
    torch.testing.assert_close(net.mlp.forward(x), net.mlp(x))
    alone = copy.deepcopy(up)
    assert alone.shared_out._parent() is None
    torch.testing.assert_close(alone(x), up(x))
    sequence = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12)).double()
    model = nn.ModuleDict({"sequence": sequence})
    convert_(model, PoetConfig(block_size=5, permutation="shared"))
    assert sequence[0].shared_out is sequence[2].shared_in is not None
    dense = to_dense_(copy.deepcopy(model))["sequence"]
    torch.testing.assert_close(sequence(x), dense(x))
    torch.testing.assert_close(sequence[:2](x), dense[:2](x))


class Named(nn.Module):
    """An activation that is a module, so that something else can be put in its place."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


def named():
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": Named()}).double()
    convert_(model, PoetConfig(block_size=5, permutation="shared"))
    turn(model, angle=0.1)
    assert model["mlp"].down.shared_in is not None
    return model["mlp"], to_dense_(copy.deepcopy(model))["mlp"]


MASK = torch.arange(20, dtype=torch.float64) / 10


def replace(net):
    net.act = nn.Threshold(0.5, 0.0)
    net.act.forward = lambda h: h * MASK


def patch_forward(net):
    forward = net.down.forward
    net.down.forward = lambda h: forward(h * MASK)


def patch_parent(net):
    net.forward = lambda x: net.down(net.up(x) * MASK)


@pytest.mark.parametrize(
    "change",
    [
        replace,
        patch_forward,
        patch_parent,
        lambda net: net.down.register_forward_pre_hook(lambda module, given: (given[0] * MASK,)),
        lambda net: net.act.register_forward_hook(lambda module, given, out: out * MASK),
        lambda net: net.up.register_forward_hook(lambda module, given, out: out * MASK),
        lambda net: net.up.register_full_backward_hook(lambda module, grads, out: None),
    ],
)
def test_whoever_looks_at_what_lies_between_sees_it_as_ever(change):
    net, dense = named()
    x = inputs()
    net(x)
    change(net)
    change(dense)
    torch.testing.assert_close(net(x), dense(x))


def other_function(net):
    net.act = nn.Sequential(nn.ReLU())
    net.act.append(nn.PReLU(20).double())
    nn.init.uniform_(net.act[1].weight, generator=torch.Generator().manual_seed(0))


def test_what_conversion_tried_is_no_longer_what_is_there():
    net, dense = named()
    for module in (net, dense):
        other_function(module)
    torch.testing.assert_close(net(inputs()), dense(inputs()))


def test_global_hooks_and_those_of_the_module_see_features_as_ever():
    net, dense = named()
    x, seen = inputs(), []

    def scale(module, given, out):
        return out * MASK if isinstance(module, nn.ReLU) else None

    handle = nn.modules.module.register_module_forward_hook(scale)
    try:
        torch.testing.assert_close(net(x), dense(x))
    finally:
        handle.remove()
    net.register_forward_pre_hook(lambda module, given: seen.append(module.up(given[0])))
    net.register_forward_hook(lambda module, given, out: seen.append(module.up(given[0])), prepend=True)
    torch.testing.assert_close(net(x), dense(x))
    for features in seen:
        torch.testing.assert_close(features, dense.up(x))


def test_a_pass_that_was_interrupted_is_over(monkeypatch):
    net, dense = named()
    x = inputs()

    def interrupted(h):
        raise KeyboardInterrupt

    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(net.down.__class__, "forward", lambda self, h: interrupted(h))
            net.down.shared_in._made_of = None
            with pytest.raises(KeyboardInterrupt):
                net(x)
        net.down.shared_in._made_of = None
        torch.testing.assert_close(net.up(x), dense.up(x))
    assert net.up.shared_out._open() is None
    torch.testing.assert_close(net(x), dense(x))


class Early(Named):
    def forward(self, x):
        h = self.act(self.up(x))
        return h if SWITCH["to"] == "early" else self.down(h)


def test_features_that_leave_the_module_otherwise_than_tried_are_refused(monkeypatch):
    model = nn.ModuleDict({"mlp": Early()}).double()
    convert_(model, PoetConfig(block_size=5, permutation="shared"))
    model["mlp"](inputs())
    monkeypatch.setitem(SWITCH, "to", "early")
    with pytest.raises(
        UserError, match="^mlp: its forward handed on the permuted features of up without giving them to"
    ):
        model["mlp"](inputs())


class Threaded(Named):
    def forward(self, x):
        made = []
        if SWITCH["to"] != "thread":
            return self.down(self.act(self.up(x)))
        thread = threading.Thread(target=lambda: made.append(self.up(x)))
        thread.start()
        thread.join()
        return self.down(self.act(made[0]))


def test_what_another_thread_writes_is_read_as_ever(monkeypatch):
    model = nn.ModuleDict({"mlp": Threaded()}).double()
    convert_(model, PoetConfig(block_size=5, permutation="shared"))
    want = model["mlp"](inputs())
    monkeypatch.setitem(SWITCH, "to", "thread")
    torch.testing.assert_close(model["mlp"](inputs()), want)


def test_one_layer_compiled_alone():
    net, dense = named()
    net.down.compile(backend="eager")
    torch.testing.assert_close(net(inputs()), dense(inputs()))


def test_read_from_a_file_and_made_dense_at_once_it_has_no_hooks():
    net, _ = named()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    model = nn.ModuleDict({"mlp": torch.load(file, weights_only=False)})
    to_dense_(model)
    assert not model["mlp"]._forward_hooks
    convert_(model, PoetConfig(block_size=5, permutation="shared"))
    assert model["mlp"].down.shared_in is not None


def test_a_hook_that_takes_itself_away_sees_one_pass_as_ever():
    net, dense = named()
    seen = []

    def once(module, given, out):
        seen.append(out)
        handle.remove()

    for module in (net, dense):
        handle = module.up.register_forward_hook(once)
        seen.append(module(inputs()))
    torch.testing.assert_close(seen[0], seen[2])
    torch.testing.assert_close(seen[1], seen[3])


@pytest.mark.parametrize("line", range(4))
def test_an_interruption_while_permutations_are_compared_leaves_nothing_in_force(line, monkeypatch):
    net, x = block(neumann_order="exact"), inputs()
    y, calls, equal = net(x), [], shared_features._equal

    def interrupted(*perms):
        calls.append(perms)
        if len(calls) == line + 1:
            raise KeyboardInterrupt
        return equal(*perms)

    with monkeypatch.context() as patch:
        patch.setattr(shared_features, "_equal", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge_(net)
    torch.testing.assert_close(net(x), y, rtol=1e-12, atol=1e-12)
    merge_(net)
    torch.testing.assert_close(net(x), y, rtol=1e-12, atol=1e-12)
    assert in_force(net)[1] is (len({int(layer.merge_count) for _, layer in poet_layers(net)}) == 1)


def test_a_compiler_sees_what_a_weight_that_is_loaded_draws():
    net, x = block(dtype=torch.float32), inputs(torch.float32)
    torch._dynamo.reset()
    merge_(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    compiled(x)
    net.mlp.down.load_dense_(net.mlp.down.dense_weight().detach())
    torch.testing.assert_close(compiled(x), net(x))


def test_all_made_dense_leaves_no_hook():
    net = block()
    assert len(net.mlp._forward_hooks) == 2
    to_dense_(net)
    assert not net.mlp._forward_hooks
    assert not net.mlp._forward_pre_hooks
    assert not net.mlp._forward_hooks_always_called


def test_transforms_are_refused_in_one_line():
    net = block()
    with pytest.raises(UserError, match="torch.func"):
        torch.func.grad(lambda x: net(x).sum())(inputs())
