"""What must not rotate stays ordinary, is the first thing the report says, and is found by what it is, not by name."""

import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import nn

from builders import llama, mlp
from poetx import POETX, PoetConfig, UserError, convert_, materialize_
from poetx.layers.merge_reminder import MergeReminder
from poetx.layers.walk import converted_layers

METHODS = ("poet-x", "single-step")
SHAPE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA = transformers.LlamaConfig(**SHAPE, num_attention_heads=2, num_labels=3, pad_token_id=0)


def config(**settings):
    return PoetConfig(block_size=8, **settings)


def left(report):
    """Names left dense for cause, without ``.weight``; they are in the report's first lines."""
    names = [item.name.removesuffix(".weight") for item in report.skipped if item.for_cause]
    if names:
        assert str(report).splitlines()[0] == "left dense, trained as usual:"
    return names


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [0.0, 1e-5])
def test_a_matrix_of_zeros_or_next_to_nothing_stays_dense(method, scale):
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(scale)
    report = convert_(model, config(method=method))
    assert left(report) == ["2"]
    assert "zero" in str(report)
    assert type(model[2]) is nn.Linear
    assert model[2].weight.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_weight_replaces_zeros_and_small_models_are_no_zeros(method):
    model = mlp()
    with torch.no_grad():
        model[2].weight.zero_()
    assert left(convert_(model, config(method=method, init="normalized"))) == []
    small = mlp()
    with torch.no_grad():
        for p in small.parameters():
            p.mul_(1e-9)
    assert left(convert_(small, config(method=method))) == []


def test_a_model_of_zeros_is_refused_with_the_reason():
    model = nn.Sequential(nn.Linear(4, 4))
    nn.init.zeros_(model[0].weight)
    with pytest.raises(UserError, match="0 is its weight is zero"):
        convert_(model)


@pytest.mark.parametrize("weight_format", [None, "int8"])
def test_zeros_that_a_checkpoint_brings_are_found_when_they_are_loaded(weight_format, tmp_path, caplog):
    source = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    nn.init.zeros_(source[1].weight)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    report = convert_(model, config(mode="mem", weight_format=weight_format))
    materialize_(model, tmp_path)
    assert [name for name, _ in converted_layers(model)] == ["0", "2"]
    assert type(model[1]) is nn.Linear
    assert torch.equal(model[1].weight, source[1].weight)
    assert model[1].weight.requires_grad
    assert torch.equal(model[1].bias, source[1].bias)
    assert "1: left dense" in caplog.text
    report = report.with_dense(model, "zero")
    assert left(report) == ["1"]
    assert report.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


NEOX = transformers.GPTNeoXConfig(**SHAPE, num_attention_heads=2)


class Reward(nn.Module):
    """A wrapper with a head of its own name beside a model of transformers."""

    def __init__(self):
        super().__init__()
        self.inner = transformers.LlamaModel(LLAMA)
        self.judge = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1))


class OwnGPT(nn.Module):
    """No model of transformers; its output layer has a name of its own."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(97, 16)
        self.positions = nn.Embedding(64, 16)
        self.body = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.to_words = nn.Linear(16, 97)


BERT = transformers.BertConfig(**SHAPE, num_attention_heads=2, num_labels=3)
HEADS = {
    "score": (lambda: transformers.LlamaForSequenceClassification(LLAMA), ["score"]),
    "token classification": (lambda: transformers.LlamaForTokenClassification(LLAMA), ["score"]),
    "question answering": (lambda: transformers.LlamaForQuestionAnswering(LLAMA), ["qa_outputs"]),
    "regression": (lambda: transformers.BertForSequenceClassification(BERT), ["classifier"]),
    "two layers": (
        lambda: transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(**SHAPE, num_attention_heads=2, pad_token_id=1)
        ),
        ["classifier.dense", "classifier.out_proj"],
    ),
    "reward": (Reward, ["judge.0", "judge.2"]),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("method", METHODS)
def test_task_heads_stay_dense_by_where_they_are(kind, method):
    build, names = HEADS[kind]
    model = build()
    report = convert_(model, config(method=method))
    assert left(report) == names
    assert {item.reason for item in report.skipped if item.for_cause} == {
        "a task head: it lies outside the model's backbone and must grow; name it in target_modules to rotate it"
    }
    assert len(report.converted) >= 12
    explicit = build()
    convert_(explicit, config(method=method, target_modules=tuple(names)))
    assert [name for name, _ in converted_layers(explicit)] == names


@pytest.mark.parametrize(
    ("build", "head"),
    [
        (OwnGPT, "to_words"),
        (
            lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SHAPE, num_attention_heads=2)),
            "embed_out",
        ),
        (lambda: llama(tie_word_embeddings=False), "lm_head"),
    ],
)
def test_output_layers_stay_dense_under_any_name(build, head):
    model = build()
    if not hasattr(model, head):  # its name in newer transformers
        head = "lm_head"
    report = convert_(model, config(exclude_modules=()))
    assert {item.name: item.reason for item in report.skipped}[f"{head}.weight"] == "the output layer"
    assert len(report.converted) > 1


def test_a_decoder_outside_the_backbone_is_no_head():
    settings = {"image_size": 8, "patch_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    decoder = {"decoder_num_hidden_layers": 1, "decoder_hidden_size": 16, "decoder_num_attention_heads": 2}
    model = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(**settings, **decoder, intermediate_size=32, decoder_intermediate_size=32)
    )
    names = [layer.name for layer in convert_(model, config()).converted]
    assert any(name.startswith("decoder.") for name in names)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["lora", "ia3", "saved"])
def test_adapters_of_peft_are_left_alone(method, kind):
    peft = pytest.importorskip("peft")
    settings = {"target_modules": ["q_proj", "down_proj"]}
    if kind == "ia3":
        chosen = peft.IA3Config(**settings, feedforward_modules=["down_proj"])
    else:
        saved = {"modules_to_save": ["o_proj"]} if kind == "saved" else {}
        chosen = peft.LoraConfig(r=2, **settings, **saved)
    model = peft.get_peft_model(llama(), chosen)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(UserError, match="every layer it matches must stay as it is.*PEFT"):
        convert_(model, config(method=method))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before
    model.base_model.model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    report = convert_(model, config(method=method))
    assert [layer.name for layer in report.converted] == ["base_model.model.model.layers.0.mlp.up_proj"]


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.called, self.read, self.asked = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.read.weight.data.mul_(2)

    def forward(self, x):
        if x.shape[0] > 1000:  # in parts
            x = F.linear(x[:500], self.asked.weight)
        if isinstance(self.asked.weight, torch.Tensor) and self.asked.weight.dtype == x.dtype:
            x = self.asked(x)
        return self.mix(self.called(x))

    def mix(self, x):
        if hasattr(self, "quantized"):
            return self.read(x)
        else:  # noqa: RET505
            return F.linear(x, self.read.weight.to(x.dtype), self.read.bias)


class Inherits(Reads):
    pass


class Tied(nn.Module):
    """A decoder by the encoder's weight, in code that has another name for itself."""

    def __init__(this):
        super().__init__()
        this.encode, this.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(this, x):
        return F.linear(this.other(this.encode(x)), this.encode.weight.t())


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_the_model_multiplies_by_itself_stays_dense(method):
    model = nn.ModuleList([Reads(), Inherits(), Tied()])
    report = convert_(model, config(method=method))
    assert left(report) == ["0.read", "1.read", "2.encode"]
    assert "Reads multiplies by its weight itself" in str(report)
    assert [layer.name for layer in report.converted] == ["0.called", "0.asked", "1.called", "1.asked", "2.other"]


def test_an_ordinary_model_may_read_its_weights_since_their_full_gradient_is_there():
    optimizer = POETX(nn.ModuleList([Reads()]), 1e-3, block_size=4)
    assert sum(len(group["params"]) for group in optimizer.param_groups if group["rotate"]) == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "single-step", "neumann_order": 7}, "neumann_order=7 is without effect"),
        ({"update": "rotation"}, "update=.rotation. is without effect"),
        ({"weight_extra_bits": True}, "weight_extra_bits=True is without effect"),
        ({"group_size": 32}, "group_size=32 is without effect"),
        ({"residual_modules": ("2",)}, "residual_modules=.* is without effect"),
        ({"exclude_modules": ("lm_haed",)}, "exclude_modules: 'lm_haed' matches no module$"),
        ({"target_modules": ("0", "up_porj")}, "target_modules: 'up_porj' matches no module$"),
    ],
)
def test_settings_without_effect_are_said_first(settings, words):
    report = convert_(mlp(), config(**settings))
    assert len(report.remarks) == 1
    assert re.search(words, str(report).splitlines()[0])
    assert not convert_(mlp(), config()).remarks
    assert not convert_(mlp().bfloat16(), config(weight_extra_bits=True)).remarks


def test_names_in_one_string_are_shown_as_a_list():
    """One string is a regular expression of the whole name, as PEFT has it."""
    model = llama()
    for key, extra in (("target_modules", {}), ("residual_modules", {"init": "normalized", "residual_scale": 0.5})):
        with pytest.raises(UserError, match=rf"write poet\.{key}=\[up_proj,o_proj\], or {key}=\['up_proj', 'o_proj'\]"):
            convert_(model, config(**{key: "up_proj, o_proj"}, **extra))
    report = convert_(model, config(exclude_modules="v_proj"))
    assert "'v_proj' matches no module; one string is a regular expression" in report.remarks[0]
    with pytest.raises(UserError) as caught:
        convert_(llama(), config(target_modules="model.*no_proj"))
    assert "poet.target_modules" not in str(caught.value)


@pytest.mark.parametrize("merged", [False, True])
def test_rotations_that_nobody_merges_are_spoken_of_once(merged, caplog):
    model = mlp()
    convert_(model, config())
    layer = next(layer for _, layer in converted_layers(model))
    (reminder,) = (h for h in layer._forward_pre_hooks.values() if isinstance(h, MergeReminder))
    x = torch.randn(2, 11)
    nn.init.normal_(layer.skew_in, std=0.2)
    for passes in range(600):
        if merged and passes == 100:
            layer.merge_()
            nn.init.normal_(layer.skew_in, std=0.2)
        reminder(layer, x)
    assert caplog.text.count("poetx.merge_every") == (0 if merged else 1)
    model.eval()
    model(x)
    assert reminder.passes <= 600


@pytest.mark.parametrize("stepped", [False, True])
def test_rotations_that_no_optimizer_moves_are_spoken_of_once(stepped, caplog):
    model = mlp()
    early = torch.optim.SGD(model.parameters(), lr=1e-2)  # holds the dense weights, which are gone then
    convert_(model, config())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2) if stepped else early
    for _ in range(130):
        model(torch.ones(2, 11)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert caplog.text.count("no optimizer holds them") == (not stepped)


@pytest.mark.parametrize("size", [1e-18, 1e-30, 1e-42])
@pytest.mark.parametrize("settings", [{}, {"method": "single-step"}, {"mode": "mem", "weight_format": "nf4"}])
def test_weights_whose_squares_vanish_count_as_zeros(settings, size):
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(size)
    report = convert_(model, PoetConfig(block_size=4, **settings))
    assert [layer.name for layer in report.converted] == ["0", "4"]
    with torch.no_grad():
        plain = mlp()
        for layer in plain[::2]:
            layer.weight.mul_(size)
    with pytest.raises(UserError, match="its weight is zero, or next to the others'"):
        POETX(plain)


@pytest.mark.parametrize("size", [1e19, 1e37])
def test_weights_whose_squares_overflow_are_refused(size):
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(size)
    with pytest.raises(UserError, match=r"^2: its norm is .* a row; its square may overflow"):
        convert_(model, PoetConfig(block_size=4))
    with pytest.raises(UserError, match=r"a row; its square may overflow"):
        POETX([{"params": [model[2].weight], "rotate": True}])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("part", [slice(None), slice(0, 6)], ids=["all of it", "its first rows"])
def test_weights_that_share_memory_alone_are_left_tied(method, part):
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, len(range(12)[part])), nn.Linear(12, 12))
    model[2].weight.data = model[0].weight.data[part]
    report = convert_(model, config(method=method))
    assert [layer.name for layer in report.converted] == ["3"]
    assert [item.name for item in report.skipped if "tied to" in item.reason] == ["0.weight", "2.weight"]
    model[0].weight.data.zero_()
    assert not model[2].weight.any()
