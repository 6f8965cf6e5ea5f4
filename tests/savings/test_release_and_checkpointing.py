"""Released gradients and checkpointed layers change memory, not numbers; what they cannot do they refuse."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

import poetx
from poetx import UserError
from poetx.methods.base import large_parameters
from poetx.ops.library import transparent_operators
from poetx.optim import SMMF, AdamW, release_gradients
from poetx.savings import checkpoint_layers_


def llama(tie=False, **config):
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**(shape | {"num_attention_heads": 2, "tie_word_embeddings": tie} | config))
    )
    return model.train()


IDS = torch.arange(34).view(2, 17) % 97
OPTIMIZERS = [
    lambda groups: torch.optim.AdamW(groups),
    lambda groups: torch.optim.AdamW(groups, foreach=True),
    lambda groups: torch.optim.Adafactor(groups),
    lambda groups: AdamW(groups, state_dtype="int8"),
    lambda groups: SMMF(groups),
]


def train(model, make, *, release, steps=5):
    poetx.convert_(model, poetx.PoetConfig(block_size=16))
    optimizer = make(poetx.param_groups(model, lr=1e-2, poet_lr=1e-2))
    handle = poetx.merge_every(optimizer, model, steps=2)
    dense = large_parameters(model)
    if release:
        release_gradients(optimizer, dense)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all((p.grad is None) == release for p in dense)
        optimizer.step()
        optimizer.zero_grad()
    assert handle.merges == steps // 2
    return model.state_dict()


@pytest.mark.parametrize("make", OPTIMIZERS, ids=["adamw", "foreach", "adafactor", "int8", "smmf"])
@pytest.mark.parametrize("tie", [False, True])
def test_released_gradients_give_the_same_weights(make, tie):
    plain, released = (train(llama(tie), make, release=release) for release in (False, True))
    for name, value in plain.items():
        assert torch.equal(value, released[name]), name


def released(**settings):
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    return model, optimizer, release_gradients(optimizer, large_parameters(model), **settings)


def test_accumulation_is_refused_when_it_happens():
    model, optimizer, _ = released()
    model(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(UserError, match="without gradient accumulation"):
        model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()


def test_accumulation_and_a_norm_over_all_gradients_are_refused_beforehand():
    with pytest.raises(UserError, match="accumulation_steps=4"):
        released(accumulation_steps=4)
    with pytest.raises(UserError, match="max_grad_norm=1.0"):
        released(max_grad_norm=1.0)


def test_a_released_gradient_can_be_clipped_by_its_own_norm():
    weight = nn.Parameter(torch.zeros(3))
    release_gradients(torch.optim.SGD([weight], lr=1.0), [weight], max_norm=0.5)
    (weight * torch.tensor([3.0, 0, 4])).sum().backward()
    assert torch.allclose(weight.detach(), torch.tensor([-0.3, 0, -0.4]), atol=1e-5)


def test_removing_goes_back_to_ordinary_steps():
    model, _, handle = released()
    handle.remove()
    model(input_ids=IDS, labels=IDS).loss.backward()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


class Stacked(nn.Module):
    """Repeated layers that are nobody's but ours."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("recompute", ["fast", "mem", "auto"])
def test_checkpointing_changes_no_gradient(recompute):
    model = llama()
    poetx.convert_(model, poetx.PoetConfig(block_size=16, mode="mem"))
    for _, layer in poetx.poet_layers(model):
        nn.init.normal_(layer.skew_in, std=0.02)
        nn.init.normal_(layer.skew_out, std=0.02)
    other = checkpoint_layers_(copy.deepcopy(model), recompute=recompute)
    assert {layer.config.mode for _, layer in poetx.poet_layers(other)} == {"mem"}  # what the user set stays
    for each in (model, other):
        each(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if p.requires_grad:
            assert torch.allclose(p.grad, q.grad, atol=1e-6), name


def test_checkpointing_any_module():
    model = Stacked()
    other = checkpoint_layers_(copy.deepcopy(model))
    x = torch.randn(5, 16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        out = other(x)
    assert len(saved) <= 3 * 2
    out.sum().backward()
    model(x).sum().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    with pytest.raises(UserError, match=r"nn\.ModuleList"):
        checkpoint_layers_(nn.Linear(2, 2))
    with pytest.raises(UserError, match="recompute"):
        checkpoint_layers_(model, recompute="slow")


def test_the_big_product_runs_no_more_often_than_it_must():
    class Products(TorchDispatchMode):
        def __init__(self, weights):
            super().__init__()
            self.weights, self.count = weights, 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mm" in str(function):
                used = (a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor))
                self.count += any(pointer in self.weights for pointer in used)
            return function(*args, **(kwargs or {}))

    counts = {}
    # "auto" is fast up to in_features tokens, which are 32 and 48 here
    for recompute, ids in (("fast", IDS), ("mem", IDS), ("auto", IDS[:1]), ("auto", IDS.repeat(2, 1))):
        model = llama().bfloat16()  # float32 rotates the weight itself, which takes products, too
        poetx.convert_(model, poetx.PoetConfig(block_size=16, mode="mem"))
        checkpoint_layers_(model, recompute=recompute)
        weights = {layer.base_weight.untyped_storage().data_ptr() for _, layer in poetx.poet_layers(model)}
        with transparent_operators(), Products(weights) as seen:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        counts[recompute, ids.numel()] = seen.count / len(weights)
    # forward, recompute, (recompute,) gradient of the input
    assert counts == {("fast", 34): 3, ("mem", 34): 4, ("auto", 17): 3, ("auto", 68): 4}


def test_a_released_gradient_that_is_not_finite_counts_as_none_and_a_skipped_step_can_be_told():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    handle = release_gradients(optimizer, [parameter])
    (parameter * torch.tensor([1.0, float("inf"), 1.0])).sum().backward()
    assert torch.equal(parameter.detach(), torch.ones(3))
    with pytest.raises(UserError, match="a second backward"):
        parameter.sum().backward()
    handle.reset()
    optimizer.zero_grad()
    parameter.sum().backward()
    assert torch.equal(parameter.detach(), torch.zeros(3))
