"""Products that need not be kept: found where autograd keeps the factors, and nowhere else."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import poetx
from poetx.layers.poet import PoetLinear
from poetx.ops.rebuild import kept_factors


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def layer(mode="mem", **changes):
    made = PoetLinear(24, 16, config=poetx.PoetConfig(block_size=8, mode=mode, init="normalized"), name="a", **changes)
    for skew in made.rotations:
        nn.init.normal_(skew, std=0.05)
    return made


def test_factors_of_a_product_multiply_to_it_bitwise():
    for a, b in ((leaf(5, 24), leaf(5, 24)), (leaf(24), leaf(2, 5, 24)), (leaf(24, dtype=torch.bfloat16), leaf(5, 24))):
        x = a * b
        found = kept_factors(x)
        assert found is not None
        assert not any(t.requires_grad for t in found)
        assert torch.equal(found[0] * found[1], x)
        assert {t.data_ptr() for t in found} == {a.data_ptr(), b.data_ptr()}


def test_nothing_is_taken_that_would_be_wrong_or_is_not_kept():
    a, b = leaf(5, 24), leaf(5, 24)
    changed = a * b
    with torch.no_grad():
        changed.mul_(2)
    used = a * b
    used.sum().backward()
    for x in (a, a * 2, a * b.detach(), a + b, (a * b).bfloat16(), (a * b)[:, ::2], changed, used):
        assert kept_factors(x) is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert kept_factors(a * b) is None
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None, "the hooks can no longer be asked for"


@pytest.mark.parametrize("autocast", [False, True])
def test_mem_keeps_the_factors_and_gives_the_same_gradients(autocast):
    a, b, made = leaf(7, 24), leaf(24), layer()
    gradients = []
    for rebuilt in (True, False):
        x = a * b if rebuilt else (a * b) + 0
        kept = weakref.ref(x.untyped_storage())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = made(x)
        del x
        assert (kept() is None) == (rebuilt or autocast)  # autocast keeps a copy in its own dtype
        gradients.append(torch.autograd.grad(y.float().square().sum(), (a, b, *made.rotations)))
    for mine, plain in zip(*gradients, strict=True):
        assert torch.equal(mine, plain)


def test_a_factor_changed_before_backward_is_an_error():
    a, b = leaf(7, 24), leaf(7, 24)
    y = layer()(a * b)
    with torch.no_grad():
        a.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_activation_checkpointing(reentrant):
    a, b, made = leaf(7, 24), leaf(24), layer()
    plain = torch.autograd.grad(made(a * b).square().sum(), (a, b, made.skew_in))
    y = checkpoint(lambda a, b: made(a * b), a, b, use_reentrant=reentrant)
    y.square().sum().backward()
    for mine, other in zip((a.grad, b.grad, made.skew_in.grad), plain, strict=True):
        assert torch.equal(mine, other)


def test_a_llama_keeps_neither_its_norms_outputs_nor_its_gated_ones():
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config).train()
    poetx.convert_(model, poetx.PoetConfig(block_size=8, mode="mem"))
    inputs, hooks = [], []
    for name, module in model.named_modules():
        if isinstance(module, PoetLinear):
            keep = lambda m, args, name=name: inputs.append((name, weakref.ref(args[0].untyped_storage())))  # noqa: E731
            hooks.append(module.register_forward_pre_hook(keep))
    ids = torch.arange(12)[None]
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    alive = {name.rpartition(".")[2] for name, storage in inputs if storage() is not None}
    assert alive <= {"o_proj"}, "attention's output is kept by attention"
    assert len(inputs) == 14
    loss.backward()


def test_a_gpt2_keeps_its_factors_too():
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=24, n_head=2, vocab_size=50, n_positions=16))
    poetx.convert_(model.train(), poetx.PoetConfig(block_size=8, mode="mem"))
    seen = []
    model.transformer.h[0].mlp.c_proj.register_forward_pre_hook(lambda m, args: seen.append(kept_factors(args[0])))
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert seen[0] is not None
