"""Checkpointed layers change memory, not numbers."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

import poetx
from poetx import UserError
from poetx.layers.walk import converted_layers
from poetx.ops.library import transparent_operators
from poetx.savings import checkpoint_layers_


def llama(**config):
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**(shape | {"num_attention_heads": 2} | config)))
    return model.train()


IDS = torch.arange(34).view(2, 17) % 97


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


def test_the_big_product_runs_no_more_often_than_it_must(monkeypatch):
    monkeypatch.setattr("poetx.ops.linear.weight_is_cheaper", lambda *sizes: False)  # which takes products, too

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
    # "auto" is fast up to in_features tokens, which are 32 and 48 here; single-step layers always are
    for method in ("poet-x", "single-step"):
        for recompute, ids in (("fast", IDS), ("mem", IDS), ("auto", IDS[:1]), ("auto", IDS.repeat(2, 1))):
            model = llama().bfloat16().train()
            poetx.convert_(model, poetx.PoetConfig(method=method, block_size=8, mode="mem"))
            checkpoint_layers_(model, recompute=recompute)
            optimizer = poetx.POETX(model) if method == "single-step" else None  # alive, or its layers feed none
            layers = [layer for _, layer in converted_layers(model)]
            weights = {layer.frozen_weight.stored.tensors[0].untyped_storage().data_ptr() for layer in layers}
            with transparent_operators(), Products(weights) as seen:
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            counts[method, recompute, ids.numel()] = seen.count / len(weights)
            del optimizer
    # forward, recompute, (recompute,) gradient of the input
    alike = {("fast", 34): 3, ("mem", 34): 4, ("auto", 17): 3}
    expected = {"poet-x": alike | {("auto", 68): 4}, "single-step": alike | {("auto", 68): 3}}
    assert counts == {(method, *case): n for method, cases in expected.items() for case, n in cases.items()}
