"""Which layers read and hand on the same features: found by trying the module out, whatever its names are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.checkpoint import checkpoint

from poetx import PoetConfig, convert_
from poetx.find_shared import inner_features


class MLP(nn.Module):
    """Gate, up and down under names that no list would have, with ``between`` them."""

    def __init__(self, between=lambda a, b: nn.functional.silu(a) * b, **more):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)
        self.between = between
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.three(self.between(self.one(x), self.two(x)))


class Returns(MLP):
    """Something of the features between goes out as well."""

    def forward(self, x):
        a = self.one(x)
        return self.three(a * self.two(x)), a


class Residual(MLP):
    """Whose input is normalized inside."""

    def __init__(self):
        super().__init__(norm=nn.LayerNorm(6, elementwise_affine=False))

    def forward(self, x):
        return x + super().forward(self.norm(x))


class Norm(nn.Module):
    """Of ones, until it is trained."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10, dtype=torch.float64))

    def forward(self, x):
        return self.weight * x / x.square().mean(-1, keepdim=True).sqrt()


class Normed(MLP):
    def __init__(self):
        super().__init__(norm=Norm())

    def forward(self, x):
        return self.three(self.norm(self.one(x) * self.two(x)))


class Counts(MLP):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(10, dtype=torch.float64))

    def forward(self, x):
        h = self.one(x) * self.two(x)
        self.seen += h.detach().sum((0, 1))
        return self.three(h)


class Keeps(MLP):
    kept = None
    calls = 0

    def __init__(self, what):
        super().__init__()
        self.what, self.list = what, []

    def forward(self, x):
        h = self.one(x) * self.two(x)
        if self.what == "attribute":
            self.kept = h
        elif self.what == "layers":
            self.kept = self.kept or [self.one, self.two]
        elif self.what == "count":
            self.calls += 1
        else:
            self.list.append(h)
        return self.three(h)


class Branches(MLP):
    """On what conversion could overlook."""

    def __init__(self, on):
        super().__init__()
        self.on, self.scale = on, [1.0 + k for k in range(10)]

    def forward(self, x):
        h = self.one(x) * self.two(x)
        if {"training": self.training, "length": x.shape[-2] == 1, "sizes": x.ndim == 2}[self.on]:
            h = h * h.new_tensor(self.scale)
        return self.three(h)


class OneUnused(MLP):
    def forward(self, x):
        return self.three(self.one(x)) if x.shape[-1] == 6 else self.two(x)


class Optional(MLP):
    def forward(self, x, mask=None):
        h = self.one(x) * self.two(x)
        return self.three(h if mask is None else h * mask)


class Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * torch.arange(10, dtype=g.dtype)


class Checkpointed(MLP):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        return self.three(checkpoint(lambda x: self.one(x) * self.two(x), x, use_reentrant=self.reentrant))


class Anything(MLP):
    def forward(self, *given):
        return self.three(self.one(given[0]) * self.two(given[0]))


class Elsewhere(MLP):
    """Keeps statistics where state_dict does not see them."""

    seen: list = []  # noqa: RUF012

    def __init__(self, where):
        super().__init__()
        self.where, self.sums, self.lists = where, [torch.zeros(10, dtype=torch.float64)], {"h": []}

    def forward(self, x):
        h = self.one(x) * self.two(x)
        if self.where == "sums":
            self.sums[0] += h.detach().flatten(0, -2).sum(0)
        elif self.where == "global":
            Elsewhere.seen.append(h)
        else:
            self.lists["h"].append(h)
        return self.three(h)


def hooked():
    module = MLP(act=nn.ReLU())
    module.act.register_forward_hook(lambda *given: None)
    return module


def patched():
    module = MLP()
    module.forward = lambda x: module.three(module.one(x) * module.two(x))
    return module


class Exits(MLP):
    def forward(self, x):
        raise SystemExit


class Twice(MLP):
    def forward(self, x):
        return self.three(torch.relu(self.one(x) + self.one(x)) * self.two(x))


class TwoInputs(MLP):
    def forward(self, x, positions):
        return super().forward(x + positions)


class Scores(nn.Module):
    """An attention of two heads that takes one tensor."""

    def __init__(self, heads):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.heads = heads

    def forward(self, x):
        q, k, v = (one(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (self.q, self.k, self.v))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def found(module):
    children = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    before = [{**vars(m)} for m in module.modules()]
    state = {name: value.clone() for name, value in module.state_dict().items()}
    with unset_fake_temporarily():
        numbers = torch.get_rng_state()
    result = inner_features(module, children)
    assert [{**vars(m)} for m in module.modules()] == before
    assert not getattr(module, "list", [])
    assert all(module._modules[name] is child for name, child in children.items())
    real = {name: value for name, value in module.state_dict().items() if type(value) is torch.Tensor}
    assert all(torch.equal(value, state[name]) for name, value in real.items() if not value.is_meta)
    with unset_fake_temporarily():
        assert torch.equal(torch.get_rng_state(), numbers)
    return result


@pytest.mark.parametrize(
    "between",
    [
        lambda a, b: nn.functional.silu(a) * b,
        lambda a, b: torch.relu(a).square() + b,
        lambda a, b: a.softmax(-1) * b,  # not elementwise, but the order of features is all the same to it
        lambda a, b: nn.functional.dropout(a * b, 0.5, training=False),
        lambda a, b: a * b / (a * b).norm(dim=-1, keepdim=True),
    ],
)
def test_what_does_not_look_at_the_order_of_features_is_shared(between):
    assert found(MLP(between)) == (["three"], ["one", "two"])


@pytest.mark.parametrize(
    "module",
    [
        MLP(lambda a, b: a * b.flip(-1)),
        MLP(lambda a, b: a.cumsum(-1) * b),
        MLP(lambda a, b: a * b * torch.arange(10)),
        MLP(lambda a, b: a * b + nn.functional.conv1d(a, torch.ones(3, 3, 3, dtype=a.dtype), padding=1)),
        MLP(lambda a, b: a @ torch.eye(10).double().roll(1, 0) + b),
        Returns(),
        Residual(),
        Twice(),
        Normed(),
        Counts(),
        *(Keeps(what) for what in ("attribute", "layers", "count", "list")),
        *(Branches(on) for on in ("training", "length", "sizes")),
        OneUnused(),
        Optional(),
        MLP(lambda a, b: Masked.apply(a) * b),
        *(Checkpointed(reentrant) for reentrant in (True, False)),
        hooked(),
        patched(),
        Exits(),
        Anything(),
        *(Elsewhere(where) for where in ("sums", "global", "nested")),
        TwoInputs(),
        Scores(2),
        Scores(4),
        nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 6)),
        nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 6)),
    ],
)
def test_what_does_is_not(module):
    assert found(module) == ([], [])


def test_dropout_is_off_while_a_module_is_tried():
    class Dropped(MLP):
        def forward(self, x):
            return self.three(self.drop(self.one(x) * self.two(x)))

    module = Dropped(drop=nn.Dropout(0.5))
    assert found(module) == (["three"], ["one", "two"])


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_a_model_without_values_is_tried_all_the_same(where):
    context = torch.device("meta") if where == "meta" else FakeTensorMode()
    with context:
        module = MLP()
        assert found(module) == (["three"], ["one", "two"])
        model = nn.ModuleDict({"mlp": module})
        if where == "fake":
            return  # layers are built on the meta device first, and made fake then
        report = convert_(model, PoetConfig(block_size=2, permutation="shared", init="normalized"))
    notes = {layer.name: layer.note for layer in report.converted}
    assert "hands its features on to three permuted" in notes["mlp.one"]
    assert "takes the permuted features of one and two" in notes["mlp.three"]


def test_a_module_that_writes_to_the_residual_stream_gathers_its_own_input():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x, positions):
            raise AssertionError("takes two tensors")

    model = nn.ModuleDict({"attention": Attention()})
    report = convert_(model, PoetConfig(block_size=4, permutation="shared"))
    notes = {layer.name.rpartition(".")[2]: layer.note for layer in report.converted}
    assert notes["q_proj"] == "its input is gathered once for k_proj and v_proj, too"
    assert notes["o_proj"] == ""


def test_layers_of_another_permutation_and_of_several_parents_share_nothing():
    config = PoetConfig(block_size=2, permutation="shared", overrides={"three": {"permutation": "random"}})
    model = nn.ModuleDict({"mlp": MLP()})
    convert_(model, config)
    assert model["mlp"].one.shared_out is model["mlp"].three.shared_in is None
    assert model["mlp"].one.shared_in is model["mlp"].two.shared_in is not None
    model = nn.ModuleDict({"first": MLP(), "second": MLP()})
    model["second"].three = model["first"].three
    report = convert_(model, PoetConfig(block_size=2, permutation="shared"))
    assert all(getattr(model[name].one, "shared_out", None) is None for name in model)
    assert not any("permuted" in layer.note for layer in report.converted)


def test_nothing_to_share_is_said():
    model = nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 6))
    report = convert_(model, PoetConfig(block_size=2, permutation="shared"))
    assert report.remarks == (
        "permutation='shared' is as 'random' here: no two layers of a module read the same features",
    )
