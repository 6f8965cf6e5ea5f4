"""Saved models load with the weights that were trained: plain files, and plain weights beside the layers' state."""

from __future__ import annotations

import copy
import functools
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2ForTokenClassification, PreTrainedModel

import poetx
from builders import function, gpt2, llama, same, turn
from poetx import PoetConfig, UserError, convert_, poet_layers, to_dense_
from poetx.layers.walk import converted_layers
from poetx.plain_model import plain_state_dict

FORMS = {
    "fast": {},
    "bfloat16": {"mode": "mem"},
    "int8": {"mode": "mem", "weight_format": "int8", "group_size": 16},
    "single-step": {"method": "single-step"},
}


def turned(form="fast", *, model: Any = None) -> Any:
    """A converted model whose rotations are not the identity."""
    torch.manual_seed(0)
    model = model or llama()
    model.to(torch.bfloat16 if form == "bfloat16" else torch.float32)
    convert_(model, PoetConfig(block_size=16, **FORMS[form]))
    turn(model)
    return model


def logits(model):
    return function(model.eval(), torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_plain_files_are_those_of_to_dense_and_the_model_is_untouched(form, tmp_path):
    model = turned(form)
    before = copy.deepcopy(model.state_dict())
    poetx.save_pretrained(model, tmp_path / "plain")
    dense: Any = to_dense_(copy.deepcopy(model))
    dense.save_pretrained(tmp_path / "wanted")
    plain, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "wanted"))
    assert same(plain, wanted)
    assert same(model.state_dict(), before)
    assert all(layer.skew_in.grad is None for _, layer in poet_layers(model))


@pytest.mark.parametrize("form", FORMS)
def test_a_converted_model_saves_what_loads_as_plain_and_goes_on_to_the_bit(form, tmp_path):
    model = turned(form)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=model.dtype)
    assert same(plain.state_dict(), to_dense_(copy.deepcopy(model)).state_dict())
    other = turned(form, model=llama())
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("form", ["fast", "single-step"])
def test_conv1d_and_tied_embeddings(form, tmp_path):
    model = turned(form, model=gpt2())
    want = logits(model)
    for save, place in ((poetx.save_pretrained, "plain"), (lambda m, d: m.save_pretrained(d), "both")):
        save(model, tmp_path / place)
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / place)
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        assert torch.allclose(logits(loaded), want, atol=1e-5)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("older", [False, True], ids=["plain", "older"])
def test_a_single_step_conv1d_has_the_plain_state_and_takes_the_older_layout(older, assign):
    plain = gpt2()
    model = turned("single-step", model=copy.deepcopy(plain))
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    assert same(model.state_dict(), state)
    changed = {key: torch.randn_like(value) for key, value in state.items()}
    changed["lm_head.weight"] = changed["transformer.wte.weight"]
    layers = [f"{name}.weight" for name, layer in converted_layers(model) if layer.transposed]
    assert {changed[key].shape[0] == changed[key].shape[1] for key in layers} == {True, False}
    copied = copy.deepcopy(model)  # the older layout is known in copies, too
    copied.load_state_dict(
        changed | {key: changed[key].T.contiguous() for key in layers} if older else changed, assign=assign
    )
    assert same(copied.state_dict(), changed)
    assert all(layer.weight.is_contiguous() for _, layer in converted_layers(copied))


def test_square_conv1d_weights_alone_do_not_show_their_layout_and_it_is_said(caplog):
    plain = gpt2()
    model = copy.deepcopy(plain)
    convert_(model, PoetConfig(method="single-step", block_size=16, target_modules=("attn.c_proj",)))
    model.load_state_dict(model.state_dict())  # today's
    assert not caplog.records
    model.load_state_dict(plain.state_dict())
    (record,) = caplog.records
    assert re.search(r"h\.0\.attn\.c_proj\.weight: taken as Conv1D holds it, \[in, out\]", record.getMessage())
    assert same(model.state_dict(), plain.state_dict())


def test_copies_pickles_and_arguments_by_place(tmp_path):
    model = turned()
    want = logits(model)
    copies: list[Any] = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for number, one in enumerate(copies):
        nn.init.constant_(one.model.norm.weight, number)
        one.save_pretrained(tmp_path / str(number), True, one.state_dict())
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        assert torch.allclose(logits(loaded), number * want, atol=1e-4)  # its own weights, not another copy's


def one_part_converted():
    model = gpt2()
    convert_(model.transformer.h[1], PoetConfig(block_size=16))
    turn(model)
    return model


def grafted():
    model = GPT2ForTokenClassification(gpt2().config)
    model.transformer.h[0].mlp = turned(model=gpt2()).transformer.h[1].mlp
    return model


def unpickled_in_a_new_process():
    pickled = pickle.dumps(turned())
    PreTrainedModel.save_pretrained = PreTrainedModel.save_pretrained.__wrapped__
    return pickle.loads(pickled)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("make", [one_part_converted, grafted, unpickled_in_a_new_process])
def test_rotated_layers_are_saved_as_plain_from_wherever_they_are(make, given, tmp_path, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", PreTrainedModel.save_pretrained)
    model = make().eval()
    model.save_pretrained(tmp_path, **({"state_dict": model.state_dict()} if given else {}))
    loaded = type(model).from_pretrained(tmp_path).eval()
    tokens = torch.arange(12).view(2, 6)
    assert torch.allclose(loaded(tokens).logits, model(tokens).logits, atol=1e-5)


def test_a_model_without_rotated_layers_is_saved_as_ever(tmp_path, monkeypatch):
    turned()  # somewhere in the process
    monkeypatch.setattr("poetx.layers.plain_weights.plain_weights", None)
    llama().save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == llama().state_dict().keys()


def test_what_would_be_saved_without_plain_weights_is_refused(tmp_path):
    for save in (turned().save_pretrained, functools.partial(poetx.save_pretrained, turned())):
        with pytest.raises(UserError, match="distributed_checkpoint=True would write no plain weights"):
            save(tmp_path, distributed_checkpoint=True)


@pytest.mark.parametrize("form", ["fast", "int8"])
def test_a_given_state_dict_is_what_is_saved(form, tmp_path):
    model, averaged = turned(form, model=gpt2()), turned(form, model=gpt2())
    turn(averaged, 0.6)
    before = copy.deepcopy(model.state_dict())
    tied_once = {key: value for key, value in averaged.state_dict().items() if key != "lm_head.weight"}
    for number, state in enumerate((averaged.state_dict(), tied_once, plain_state_dict(averaged))):
        model.save_pretrained(tmp_path / str(number), state_dict=state)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        assert same(loaded.state_dict(), to_dense_(copy.deepcopy(averaged)).state_dict())
        poetx.save_pretrained(model, tmp_path / f"plain {number}", state_dict=state)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / f"plain {number}")
        assert same(plain.state_dict(), loaded.state_dict())
    assert same(model.state_dict(), before)


def test_a_file_where_the_directory_should_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="file is a file; name a directory"):
        poetx.save_pretrained(turned("fast"), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(UserError, match="directory=None: name a directory"):
        poetx.save_pretrained(turned("fast"), None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="str was given for a model, .*; check the arguments' order"):
        poetx.save_pretrained("out", turned("fast"))  # type: ignore[arg-type]


def test_settings_of_generation_that_transformers_reads_but_does_not_write(tmp_path):
    model = turned("fast")
    model.generation_config.temperature = 0.6  # idle, as nothing is sampled: Llama 2 comes so
    poetx.save_pretrained(model, tmp_path)
    assert model.generation_config.temperature == 0.6
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


WRONG = {
    "another model's": (lambda state: {"0.weight": torch.ones(2, 2)}, "transformer.wte.weight is missing"),
    "prefix": (lambda state: {f"model.{key}": value for key, value in state.items()}, "is missing"),
    "no norm": (lambda state: state.pop("transformer.ln_f.bias"), "transformer.ln_f.bias is missing"),
    "no rotation": (lambda state: state.pop("transformer.h.1.attn.c_proj.skew_out"), "c_proj: .*skew_out"),
    "no layer": (
        lambda state: [state.pop(key) for key in list(state) if "h.0.mlp.c_fc." in key and "bias" not in key],
        "transformer.h.0.mlp.c_fc.weight is missing",
    ),
    "more": (lambda state: state.update({"head.weight": torch.ones(2)}), "head.weight is unknown"),
    "shape": (lambda state: state.update({"transformer.h.0.mlp.c_fc.perm_in": torch.arange(3)}), "c_fc: .*perm_in"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_state_dict_that_is_not_the_models_is_not_saved(wrong, tmp_path):
    model = turned(model=gpt2())
    state, (change, message) = model.state_dict(), WRONG[wrong]
    changed = change(state)
    with pytest.raises(UserError, match=f"state_dict is not this model's: .*{message}") as caught:
        model.save_pretrained(tmp_path, state_dict=changed if isinstance(changed, dict) else state)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("form", ["fast", "int8"])
def test_a_plain_state_is_taken_by_a_converted_model(form, strict):
    model = turned(form)
    plain = llama()
    model.load_state_dict(plain.state_dict(), strict=strict)
    convert_(plain, PoetConfig(block_size=16, **FORMS[form]))
    assert torch.equal(logits(model), logits(plain))
    assert all(not skew.any() for _, layer in poet_layers(model) for skew in layer.rotations)


def test_a_plain_state_of_another_shape_is_refused_as_torch_refuses():
    model, plain = turned(), llama().state_dict()
    before = copy.deepcopy(model.state_dict())
    name = next(name for name, _ in poet_layers(model)) + ".weight"
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        model.load_state_dict(plain | {name: plain[name][:-1]})
    prefix = name.removesuffix("weight")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key.startswith(prefix))


def test_one_tensor_for_a_layer_in_several_places():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(16, 16)})
    convert_(model, PoetConfig(block_size=4))
    plain = plain_state_dict(model)
    assert plain["a.weight"] is plain["b.weight"]
    assert plain.keys() == {f"{place}.{key}" for place in "abc" for key in ("weight", "bias")}


def test_what_cannot_be_saved_says_so(tmp_path):
    with pytest.raises(UserError, match="Sequential is no transformers model"):
        poetx.save_pretrained(nn.Sequential(nn.Linear(4, 4)), tmp_path)
    with torch.device("meta"):
        model = llama()
    convert_(model, PoetConfig(block_size=16))
    with pytest.raises(UserError, match="q_proj is on the meta device"):
        poetx.save_pretrained(model, tmp_path)


class Quantizer:
    """As ``transformers`` hangs one on a model that it loads quantized."""

    def remove_quantization_config(self, model):
        del model.hf_quantizer, model.config.quantization_config


def test_a_model_loaded_quantized_is_saved_as_plain_or_refused(tmp_path):
    model: Any = llama()
    model.hf_quantizer, model.config.quantization_config = Quantizer(), {"quant_method": "torchao"}
    convert_(model, PoetConfig(block_size=16))
    poetx.save_pretrained(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)

    model = llama()
    model.hf_quantizer, model.config.quantization_config = Quantizer(), {"quant_method": "awq"}
    model.lm_head.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    convert_(model, PoetConfig(block_size=16))
    for save in (poetx.save_pretrained, lambda m, directory: m.save_pretrained(directory)):
        with pytest.raises(UserError, match="LlamaForCausalLM are still in the format of another library"):
            save(model, tmp_path)


_YOUNGER_TRANSFORMERS = """
import sys, torch, poetx
part = torch.nn.Sequential(torch.nn.Linear(48, 104, bias=False))
poetx.convert_(part, poetx.PoetConfig(block_size=8))
assert "transformers" not in sys.modules
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=9, hidden_size=48, intermediate_size=104, num_hidden_layers=1, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
model.model.layers[0].mlp.up_proj = part[0]
ids = torch.arange(5)[None]
try:
    model.save_pretrained(sys.argv[1] + "/first")
    print("saved in silence")
except poetx.UserError as error:
    print("call it again" in str(error))
model.save_pretrained(sys.argv[1])
print(torch.allclose(model(ids).logits, AutoModelForCausalLM.from_pretrained(sys.argv[1])(ids).logits, atol=1e-5))
"""


def test_a_layer_older_than_transformers_is_saved_whole_or_the_save_is_refused(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", _YOUNGER_TRANSFORMERS, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "True"], run


@pytest.mark.parametrize("form", FORMS)
def test_accelerate_saves_plain_weights_too(form, tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare_model(turned(form, model=gpt2()), evaluation_mode=True)
    accelerator.save_model(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    plain = gpt2()
    plain.load_state_dict({key: value for key, value in saved.items() if key in plain.state_dict()}, strict=False)
    assert torch.allclose(logits(plain), logits(model).float(), atol=1e-2 if form == "bfloat16" else 1e-5)
    for layer in (layer for _, layer in converted_layers(model)):
        assert not layer._state_dict_hooks
    again = turned(form, model=gpt2())
    again.load_state_dict(saved, strict=False)
    assert torch.equal(logits(again), logits(model))
