"""The chunked loss is the plain loss: value, every gradient, and none of the logits."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from helpers import TOLERANCE, relative_error
from poetx import UserError
from poetx.savings import chunk_loss_, chunked_cross_entropy


def problem(dtype, tokens=37, width=16, words=101, bias=True):
    generator = torch.Generator().manual_seed(1)
    x, W, b = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((tokens, width), (words, width), (words,))
    )
    labels = torch.randint(0, words, (tokens,), generator=generator)
    labels[::5] = -100
    leaves = [x.requires_grad_(), W.requires_grad_()] + ([b.requires_grad_()] if bias else [])
    return leaves, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_are_those_of_the_plain_loss(dtype, reduction, bias):
    leaves, labels = problem(dtype, bias=bias)
    logits = F.linear(*leaves)
    plain = F.cross_entropy(logits.float() if dtype == torch.bfloat16 else logits, labels, reduction=reduction)
    # 13 words a chunk: eight chunks, the last one short
    ours = chunked_cross_entropy(
        leaves[0], leaves[1], labels, bias=leaves[2] if bias else None, reduction=reduction, chunk_bytes=13 * 4 * 37
    )
    assert ours.shape == plain.shape
    assert relative_error(ours, plain) < min(TOLERANCE[dtype], 1e-5)
    weights = torch.linspace(0.5, 2, ours.numel()).to(ours.dtype).view(ours.shape)
    wanted = torch.autograd.grad((plain * weights).sum(), leaves)
    for got, want in zip(torch.autograd.grad((ours * weights).sum(), leaves), wanted, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, want) < TOLERANCE[dtype]


def test_nothing_as_large_as_the_logits_exists():
    (x, W, _), labels = problem(torch.float32, tokens=64, words=4096)

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    with Largest() as seen:
        chunked_cross_entropy(x, W, labels, chunk_bytes=64 * 4 * 300).backward()
    assert W.numel() <= seen.numel < 64 * 4096 / 3


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=301, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    return AutoModelForCausalLM.from_config(config).train()


def test_a_transformers_model_keeps_its_loss(model):
    ids = torch.randint(0, 301, (2, 17))
    labels = ids.masked_fill(ids % 7 == 0, -100)
    for extra in ({}, {"num_items_in_batch": 40}):
        plain = model(input_ids=ids, labels=labels, **extra).loss
        wanted = torch.autograd.grad(plain, list(model.parameters()))
        chunked = chunk_loss_(copy.deepcopy(model), chunk_bytes=1 << 14)
        out = chunked(input_ids=ids, labels=labels, **extra)
        assert out.logits is None
        assert relative_error(out.loss, plain) < 1e-6
        for got, want in zip(torch.autograd.grad(out.loss, list(chunked.parameters())), wanted, strict=True):
            assert relative_error(got, want) < 1e-5
    assert chunked(input_ids=ids).logits.shape == (2, 17, 301)


def test_autocast_is_taken_part_in(model):
    ids = torch.randint(0, 301, (2, 17))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(input_ids=ids, labels=ids).loss
        ours = chunk_loss_(model)(input_ids=ids, labels=ids).loss
    assert relative_error(ours, plain) < 1e-3
    ours.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_copies_and_pickles_call_themselves(model):
    ids = torch.randint(0, 301, (1, 9))
    chunk_loss_(chunk_loss_(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = model(input_ids=ids, labels=ids).loss
        with torch.no_grad():
            other.lm_head.weight.zero_()
        assert other(input_ids=ids, labels=ids).loss.item() == pytest.approx(5.7071, abs=1e-3)  # ln 301
        assert torch.equal(model(input_ids=ids, labels=ids).loss, before)


TINY = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("gemma2", {}, "after its head"),  # soft capping, which a fresh model hardly shows
        ("cohere", {}, "after its head"),
        ("granite", {"logits_scaling": 8.0}, "after its head"),
        ("bert", {"is_decoder": True}, "before its head"),
        ("roberta", {"is_decoder": True}, "not a plain|before its head|head"),
        ("llama", {}, None),
        ("qwen3", {}, None),
        ("gpt_neox", {}, None),
        ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 16}, None),
        ("mamba", {}, None),
    ],
)
def test_a_head_with_anything_before_or_behind_it_is_refused_whatever_the_model(kind, settings, words):
    config = AutoConfig.for_model(kind, **(TINY | {"pad_token_id": 0} | settings))
    model = AutoModelForCausalLM.from_config(config).train()
    if words is None:
        chunk_loss_(model)
        assert all(module.training for module in model.modules())
        assert not any(module._forward_hooks for module in model.modules())
    else:
        with pytest.raises(UserError, match=words):
            chunk_loss_(model)


def test_evaluation_has_its_logits(model):
    ids = torch.randint(0, 301, (2, 17))
    want = model.eval()(input_ids=ids, labels=ids)
    got = chunk_loss_(model)(input_ids=ids, labels=ids)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.loss, want.loss)
    assert model.train()(input_ids=ids, labels=ids).logits is None


def test_misuse_is_refused(model):
    with pytest.raises(UserError, match="not a transformers causal language model"):
        chunk_loss_(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="labels: shape"):
        chunked_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(UserError, match="reduction"):
        chunked_cross_entropy(torch.randn(2, 4), torch.randn(5, 4), torch.zeros(2, dtype=torch.long), reduction="avg")
    model.config.output_router_logits = True
    with pytest.raises(UserError, match="the routers' loss"):
        chunk_loss_(model)


@pytest.mark.parametrize("label", [-1, -99, 101, 4000])
def test_a_label_that_is_no_word_is_refused(label):
    (x, W, b), labels = problem(torch.float32)
    labels[3] = label
    with pytest.raises(UserError, match=r"^labels: .* must be 0 to 100 or -100"):
        chunked_cross_entropy(x, W, labels, bias=b)
    ignored = labels.masked_fill(labels == -100, label)
    assert chunked_cross_entropy(x, W, ignored, bias=b, ignore_index=label).isfinite()


def test_labels_that_are_shares_are_refused():
    (x, W, _), labels = problem(torch.float32)
    with pytest.raises(UserError, match=r"^labels: torch.float64, must be whole numbers"):
        chunked_cross_entropy(x, W, labels.double())


def replace_loss(model):
    model.loss_function = lambda logits, labels, vocab_size, **more: logits.sum()


def wrap_head(model):
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Identity())


AFTERWARDS = {
    "loss_function was replaced": replace_loss,
    "the head has hooks": lambda model: model.lm_head.register_forward_hook(lambda head, inputs, logits: 2 * logits),
    "not a plain nn.Linear": wrap_head,
}


@pytest.mark.parametrize("words", AFTERWARDS)
@pytest.mark.parametrize("late", [True, False])
def test_what_the_chunks_would_leave_out_is_refused_whenever_it_came(words, late, model):
    ids = torch.randint(0, 301, (2, 5))
    chunk_loss_(model) if late else None
    AFTERWARDS[words](model)
    with pytest.raises(UserError, match=words):
        chunk_loss_(model)(input_ids=ids, labels=ids)
    assert model.eval()(input_ids=ids).logits.shape == (2, 5, 301)


def test_other_outputs_settings_of_the_loss_and_tuples_are_as_without(model):
    ids = torch.randint(0, 301, (2, 5))
    calls = (
        {"output_hidden_states": True},
        {"ignore_index": int(ids[0, 2])},
        {"return_dict": False, "use_cache": False},
    )
    plain = [model(input_ids=ids, labels=ids, **call) for call in calls]
    chunk_loss_(model)
    ours = [model(input_ids=ids, labels=ids, **call) for call in calls]
    assert (
        list(inspect.signature(model.forward).parameters) == list(inspect.signature(type(model).forward).parameters)[1:]
    )
    assert all(map(torch.equal, plain[0].hidden_states, ours[0].hidden_states))
    torch.testing.assert_close(ours[1].loss, plain[1].loss)
    assert isinstance(ours[2], tuple)
    torch.testing.assert_close(ours[2][0], plain[2][0])
