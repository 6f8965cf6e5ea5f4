"""convert_ and to_dense_: the function stays, and everything left out is named."""

import copy
import dataclasses
import math

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
)

import poetx
from builders import MODELS, function, gpt2, llama, mlp, turn
from helpers import TOLERANCE, relative_error
from poetx import PoetConfig, PoetLinear, UserError, convert_, poet_layers, to_dense_
from poetx.layers.walk import converted_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["fast", "mem"])
@pytest.mark.parametrize("build", MODELS)
def test_keep_preserves_the_function(build, mode, dtype):
    model = build().to(dtype)
    before = function(model, dtype)
    report = convert_(model, PoetConfig(block_size=16, mode=mode))
    assert relative_error(function(model, dtype), before) < TOLERANCE[dtype]
    assert len(report.converted) == len(list(poet_layers(model))) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("build", MODELS)
def test_to_dense_preserves_the_turned_function_and_the_layer_types(build, dtype):
    model = build().to(dtype)
    kinds = {name: type(module) for name, module in model.named_modules()}
    keys = set(model.state_dict())
    convert_(model, PoetConfig(block_size=16))
    start = function(model, dtype)
    turn(model)
    turned = function(model, dtype)
    assert relative_error(turned, start) > 1e-2, "the rotations did nothing"
    assert to_dense_(model) is model
    assert relative_error(function(model, dtype), turned) < TOLERANCE[dtype]
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert set(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["poet-x", "single-step"])
def test_to_dense_keeps_hooks_and_says_which_name_it_does_not_know(method):
    model = mlp()
    convert_(model, PoetConfig(method=method, block_size=16))
    names = [name for name, _ in converted_layers(model)]
    with pytest.raises(UserError, match=r"names='layer': no converted layer has this name"):
        to_dense_(model, ["layer", names[0]])
    seen, layer = [], model.get_submodule(names[0])
    handles = [
        layer.register_forward_hook(lambda *_, **options: seen.append(sorted(options)), with_kwargs=False),
        layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True),
        layer.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    to_dense_(model, names[0])
    assert [name for name, _ in converted_layers(model)] == names[1:]
    to_dense_(model)
    model(torch.randn(3, 11)).sum().backward()
    assert seen == [{}, [], "backward"]
    for handle in handles:
        handle.remove()
    model(torch.randn(3, 11)).sum().backward()
    assert len(seen) == 3


@pytest.mark.parametrize("build", [llama, gpt2])
def test_exported_model_loads_in_transformers(build, tmp_path):
    model = build()
    convert_(model, PoetConfig(block_size=16))
    turn(model)
    want = function(model, torch.float32)
    to_dense_(model).save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert relative_error(function(loaded.eval(), torch.float32), want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("block_size", "millions"),
    [(256, 366.64), (512, 570.06)],
)
def test_published_trainable_parameter_counts_of_llama_3b(block_size, millions):
    with torch.device("meta"):
        model = llama(
            vocab_size=32000,
            hidden_size=2560,
            intermediate_size=7168,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
        )
    report = convert_(model, PoetConfig(block_size=block_size))
    assert round(report.total_parameters / 1e6, 2) == 2764.47
    assert round(report.trainable_parameters / 1e6, 2) == millions
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == report.trainable_parameters
    assert all(p.is_meta for p in model.parameters())


def test_sizes_that_the_block_does_not_divide_are_converted_and_counted():
    model = nn.Sequential(nn.Linear(2736, 31, bias=False))
    report = convert_(model, PoetConfig(block_size=256))
    (layer,) = report.converted
    assert (layer.block_size_in, layer.block_size_out) == (256, 31)
    assert layer.rotation_parameters == 10 * (256 * 255 // 2) + 176 * 175 // 2 + 31 * 30 // 2
    assert "b=31 out, 256 in" in str(report)


def test_tied_embeddings_stay_tied_and_are_named():
    model = llama(tie_word_embeddings=True)
    report = convert_(model, PoetConfig(block_size=16))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    reasons = {item.name: item.reason for item in report.skipped}
    assert reasons == {
        "model.embed_tokens.weight": "an embedding",
        "lm_head.weight": "the output layer",
    }
    assert report.total_parameters == llama(tie_word_embeddings=True).num_parameters()


def test_linears_tied_to_each_other_are_left_tied():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    report = convert_(model, PoetConfig(block_size=2))
    assert [layer.name for layer in report.converted] == ["c"]
    assert model["b"].weight is model["a"].weight
    assert {item.reason for item in report.skipped} == {"its weight is tied to another layer's"}


def test_a_layer_used_in_two_places_is_converted_once_and_stays_shared():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    x = torch.randn(3, 4)
    before = model(x)
    assert len(convert_(model, PoetConfig(block_size=2)).converted) == 1
    assert model[0] is model[2]
    torch.testing.assert_close(model(x), before)
    to_dense_(model)
    assert model[0] is model[2]
    assert type(model[0]) is nn.Linear


def test_everything_left_out_is_named_with_its_reason():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(3, 4, 8))
            self.router = nn.Parameter(torch.zeros(3, 4))

    frozen = nn.Linear(4, 4).requires_grad_(False)
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    wrapped = nn.Linear(4, 4)
    wrapped.forward = lambda x: 3 * x
    pre_hooked = nn.Linear(4, 4)
    pre_hooked.register_full_backward_pre_hook(lambda *_: None)
    model = nn.ModuleDict(
        {
            "wrapped": wrapped,
            "pre_hooked": pre_hooked,
            "experts": Experts(),
            "attention": nn.MultiheadAttention(4, 2),
            "convolution": nn.Conv1d(4, 4, 3),
            "frozen": frozen,
            "hooked": hooked,
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "qkv_proj": nn.Linear(4, 12),
            "excluded": nn.Linear(4, 4),
        }
    )
    report = convert_(model, PoetConfig(block_size=2, exclude_modules=("excluded",)))
    assert [layer.name for layer in report.converted] == ["qkv_proj"]
    assert "mix" in report.converted[0].note
    reasons = {item.name: item.reason for item in report.skipped}
    for name, words in {
        "experts.gate_up_proj": "3-D stack",
        "experts.router": "not a linear layer",
        "attention.in_proj_weight": "not a linear layer",
        "attention.out_proj.weight": "subclass of nn.Linear",
        "convolution.weight": "a convolution",
        "frozen.weight": "frozen",
        "hooked.weight": "hooks",
        "pre_hooked.weight": "hooks",
        "wrapped.weight": "forward has been replaced",
        "excluded.weight": "in exclude_modules",
    }.items():
        assert words in reasons.pop(name), name
    assert all(name.startswith("normed.") for name in reasons)
    for name in ("experts.gate_up_proj", "3-D stack", "qkv_proj"):
        assert name in str(report)


@pytest.mark.parametrize(
    ("target", "count"),
    [
        (("q_proj", "v_proj"), 4),
        (("mlp.up_proj",), 2),
        (r".*layers\.0\..*_proj", 7),
        (r"model\.layers\.1\.mlp\.down_proj", 1),
    ],
)
def test_target_modules_as_in_peft(target, count):
    assert len(convert_(llama(), PoetConfig(block_size=16, target_modules=target)).converted) == count


def test_names_match_whole_components_only():
    with pytest.raises(UserError, match=r"matches no linear layer.*did you mean '._proj'.*end in .*down_proj"):
        convert_(llama(), PoetConfig(target_modules=("_proj",)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ("qproj",)}, "did you mean 'q_proj'"),
        ({"target_modules": "q_proj"}, "matches no linear layer"),
        ({"target_modules": "(("}, "not a regular expression"),
        ({"target_modules": ("lm_head",)}, "must stay as it is.*in exclude_modules|matches no linear layer"),
    ],
)
def test_patterns_that_match_nothing_leave_the_model_unchanged(config, message):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        convert_(model, PoetConfig(**config))
    assert list(before) == list(model.state_dict())


def test_refusals():
    with pytest.raises(UserError, match="no nn.Linear"):
        convert_(nn.Sequential(nn.ReLU()))
    with pytest.raises(UserError, match=r"^0: float16 is not supported"):
        convert_(nn.Sequential(nn.Linear(4, 4).half()))
    with pytest.raises(UserError, match="inside a model"):
        convert_(nn.Linear(4, 4))
    model = mlp()
    convert_(model)
    with pytest.raises(UserError, match="already converted"):
        convert_(model)
    with pytest.raises(UserError, match="inside a model"):
        to_dense_(model[0])


def test_conversion_keeps_biases_as_the_same_parameters_and_the_training_flag():
    model = mlp().eval()
    bias = model[0].bias
    convert_(model, PoetConfig(block_size=4))
    assert model[0].bias is bias
    assert not model[0].training
    to_dense_(model)
    assert model[0].bias is bias


def test_fresh_weights_do_not_depend_on_what_was_there():
    config = PoetConfig(block_size=4, init="normalized", init_scale=2.0)
    first, second = mlp(), mlp()
    convert_(first, config)
    convert_(second, config)
    assert torch.equal(first[0].base_weight, second[0].base_weight)
    torch.testing.assert_close(first[0].dense_weight().norm(dim=1), torch.full((20,), 2.0))
    assert isinstance(first[0], PoetLinear)


@pytest.mark.parametrize("method", ["poet-x", "single-step"])
def test_what_writes_to_the_residual_stream_starts_smaller(method):
    config = PoetConfig(method=method, block_size=4, init="normalized", init_scale=2.0)
    models = plain, shrunk = llama(), llama()
    convert_(plain, config)
    report = convert_(shrunk, dataclasses.replace(config, residual_scale=0.25))
    ratios = {name: (b.weight.norm() / a.weight.norm()).item() for name, a, b in _pairs(*models)}
    writers = {name for name, ratio in ratios.items() if not math.isclose(ratio, 1)}
    assert {name.rpartition(".")[2] for name in writers} == {"o_proj", "down_proj"}
    assert all(math.isclose(ratios[name], 0.25, rel_tol=1e-5) for name in writers)
    assert str(report).count("starts 0.25 times as large") == 2  # o_proj of all layers, down_proj of all layers


def _pairs(first, second):
    for (name, a), (_, b) in zip(converted_layers(first), converted_layers(second), strict=True):
        yield name, a, b


@pytest.mark.parametrize(
    ("family", "writers"),
    [
        ("gpt2", {"attn.c_proj", "mlp.c_proj"}),
        ("neox", {"attention.dense", "mlp.dense_4h_to_h"}),
        ("opt", {"self_attn.out_proj", "fc2"}),
        ("phi", {"self_attn.dense", "mlp.fc2"}),
        ("bloom", {"self_attention.dense", "mlp.dense_4h_to_h"}),
        ("bert", {"attention.output.dense", "output.dense"}),
        ("gptj", {"attn.out_proj", "mlp.fc_out"}),
    ],
)
def test_residual_modules_know_the_usual_names(family, writers):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    configs = {
        "gpt2": lambda: transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=8),
        "neox": lambda: transformers.GPTNeoXConfig(**shape, intermediate_size=32),
        "opt": lambda: transformers.OPTConfig(**shape, ffn_dim=32, word_embed_proj_dim=16, pad_token_id=0),
        "phi": lambda: transformers.PhiConfig(**shape, intermediate_size=32),
        "bloom": lambda: transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=32),
        "bert": lambda: transformers.BertConfig(**shape, intermediate_size=32, is_decoder=True),
        "gptj": lambda: transformers.GPTJConfig(n_embd=16, n_layer=1, n_head=2, vocab_size=32, rotary_dim=4),
    }
    model = transformers.AutoModelForCausalLM.from_config(configs[family]())
    config = PoetConfig(block_size=4, init="normalized", residual_scale=0.5)
    convert_(model, config)
    found = {name.partition(".0.")[2] for name, _ in converted_layers(model) if config.writes_to_residual(name)}
    assert found == writers


def test_a_residual_scale_that_reaches_no_layer_is_refused():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"residual_scale=0.5: no layer to convert is in residual_modules.*end in 0, 2"):
        convert_(model, PoetConfig(block_size=4, init="normalized", residual_scale=0.5))
    assert list(before) == list(model.state_dict())
    named = PoetConfig(block_size=4, init="normalized", residual_scale=0.5, residual_modules=("2",))
    convert_(model, named)
    torch.testing.assert_close(model[2].dense_weight().norm(dim=1), torch.full((model[2].out_features,), 0.5))


@pytest.mark.parametrize(("block_size", "more"), [(8, True), (4, False)])
def test_blocks_larger_than_the_weight_are_pointed_out(block_size, more):
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False)})
    settings = {"method": "single-step", "update": "free"}
    report = convert_(model, PoetConfig(block_size=block_size, **settings))
    assert ("a smaller block_size saves memory" in str(report)) == more


@pytest.mark.parametrize(
    "call",
    [
        lambda model, optimizer: poetx.merge_every(model, optimizer),
        lambda model, optimizer: poetx.merge_(optimizer, model),
        lambda model, optimizer: poetx.check_training(optimizer, model),
        lambda model, optimizer: poetx.convert_(model.parameters()),
        lambda model, optimizer: poetx.to_dense_(model.state_dict()),
        lambda model, optimizer: poetx.param_groups(list(model.parameters()), lr=1e-3, poet_lr=1e-3),
        lambda model, optimizer: poetx.spectrum(optimizer),
    ],
)
def test_what_is_no_model_is_named(call):
    model = mlp()
    convert_(model, PoetConfig(block_size=4))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(UserError, match="was given for a model, which must be a torch.nn.Module"):
        call(model, optimizer)


def test_a_report_in_the_models_place_is_named():
    report = convert_(mlp(), PoetConfig(block_size=4))
    for call in (poetx.POETX, lambda model: poetx.param_groups(model, lr=1e-3, poet_lr=1e-3)):
        with pytest.raises(UserError, match="convert_ changes the model in place, and what it returns is a report"):
            call(report)
    for other in (None, 5, "gpt2"):
        with pytest.raises(UserError, match="was given for a model"):
            poetx.POETX(other)


def test_a_compiled_model_is_converted_as_the_plain_one():
    plain, compiled = mlp(), torch.compile(mlp(), backend="eager")
    x = torch.randn(3, 11)
    before = compiled(x)
    reports = [convert_(model, PoetConfig(block_size=4)) for model in (plain, compiled)]
    assert str(reports[0]) == str(reports[1])
    torch.testing.assert_close(compiled(x), before)
    state = {name.removeprefix("_orig_mod."): value for name, value in compiled.state_dict().items()}
    plain.load_state_dict(state)
    for model in (plain, compiled):
        poetx.merge_(model, None)
    assert torch.equal(plain(x), compiled(x))  # the same permutations were drawn


def test_what_conversion_would_do_wrong_or_cannot_read_is_one_line():
    with pytest.raises(UserError, match=r"config is a dict; give a PoetConfig"):
        convert_(mlp(), {"block_size": 4})
    with torch.inference_mode(), pytest.raises(UserError, match="convert_: inside torch.inference_mode"):
        convert_(mlp())
    with pytest.raises(UserError, match=r"^1: its size is not known yet"):
        convert_(nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(4)))
    with pytest.raises(UserError, match=r"^0: complex128 is not supported; exclude it$"):
        convert_(nn.Sequential(nn.Linear(3, 4, dtype=torch.complex128)))
    with pytest.raises(UserError, match=r"^0: float16 is not supported \(its range"):
        convert_(nn.Sequential(nn.Linear(3, 4, dtype=torch.float16)))


@pytest.mark.parametrize("init", ["normalized", "uniform", "keep"])
def test_the_report_says_what_decides_fresh_weights(init):
    """A study of several seeds that sets torch's alone would start all its runs alike."""
    report = str(convert_(mlp(), PoetConfig(block_size=4, init=init, seed=11)))
    assert ("a fresh weight, by seed=11 whatever torch's own is" in report) == (init != "keep")
