"""Features that layers permute alike: one gather or none, the same function whatever happens to one of the layers."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from builders import turn
from poetx import PoetConfig, convert_, merge_, poet_layers, to_dense_
from poetx.layers import shared_features
from poetx.layers.shared_features import SharedFeatures


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
    assert all(shared.in_force() for shared in groups(net))
    got, y = gradients(net, x), net(x)
    with monkeypatch.context() as patch:
        patch.setattr(SharedFeatures, "in_force", lambda self: False)
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
    shared, _ = groups(net)
    net(x)
    assert len(made) == 1
    assert shared._kept is None
    net.mlp.gate(x)
    assert shared._kept is not None  # up may come
    held = weakref.ref(shared._kept[2])
    made.clear()
    del x
    gc.collect()
    assert held() is None
    assert shared._kept is None


def test_another_x_or_the_same_one_written_is_gathered_anew():
    net, x = block(), inputs()
    want = net.mlp.up(x + 1)
    net.mlp.gate(x)
    torch.testing.assert_close(net.mlp.up(x + 1), want)
    net.mlp.gate(x)
    x += 1
    torch.testing.assert_close(net.mlp.up(x), want)
    with torch.no_grad():
        net.mlp.gate(x)
    assert net.mlp.up(x).requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant):
    net, x = block(), inputs()
    want = gradients(net, x)
    close(gradients(net, x, lambda x: checkpoint(net, x, use_reentrant=reentrant)), want)
    # The module's input is the very tensor that is recomputed from, and alive all the time.
    want = gradients(net, x, net.mlp)
    close(gradients(net, x, lambda x: checkpoint(net.mlp, x, use_reentrant=reentrant)), want)


def test_in_autocast_x_is_cast_and_gathered_once():
    net, x = block(dtype=torch.float32), inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = net.mlp.gate(x)
        _, (_, dtype, *_), made, _ = groups(net)[0]._kept
    assert y.dtype == dtype == made.dtype == torch.bfloat16
    assert net.mlp.up(x).dtype == torch.float32  # outside: not what was kept


@pytest.mark.parametrize("frozen", ["down", "gate"])
def test_where_one_layer_is_not_merged_each_gathers_by_itself(frozen):
    net, x = block(neumann_order="exact"), inputs()
    getattr(net.mlp, frozen).requires_grad_(False)
    y = net(x)
    merge_(net)
    assert [shared.in_force() for shared in groups(net)] == [frozen == "down", False]
    torch.testing.assert_close(net(x), y, rtol=1e-12, atol=1e-12)
    getattr(net.mlp, frozen).requires_grad_(True)
    merge_(net)  # gate has had one less
    assert not groups(net)[1].in_force()
    torch.testing.assert_close(net(x), y, rtol=1e-12, atol=1e-12)


def test_where_one_layer_becomes_dense_or_another_is_put_in_its_place():
    net, x = block(), inputs()
    y = net(x)
    assert groups(net)[1].in_force()
    to_dense_(net, ["mlp.down"])
    assert not net.mlp.gate.shared_out.in_force()
    assert net.mlp.gate.shared_in.in_force()
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
    assert not any(group.in_force() for group in groups(shared))
    torch.testing.assert_close(shared(x), y, rtol=1e-12, atol=1e-12)
    merge_(shared)
    assert all(group.in_force() for group in groups(shared))
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
    assert not groups(net)[1].in_force()
    torch.testing.assert_close(net(x), before(x), rtol=1e-12, atol=1e-12)


def test_copies_share_among_themselves():
    net, x = block(), inputs()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert groups(other)[1].parent is other.mlp
        assert all(group.in_force() for group in groups(other))
        merge_(other)
        assert all(group.in_force() for group in groups(other))
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
