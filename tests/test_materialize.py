"""Models that never exist in full precision: built on meta, converted, then filled layer by layer."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, FalconMambaConfig, GPT2Config, LlamaConfig

from poetx import PoetConfig, UserError, convert_, materialize_, poet_layers, to_dense_
from poetx.memory.tracker import StorageTracker
from poetx.ops import quantize

XQ = {"block_size": 16, "mode": "mem", "group_size": 32}


def llama(**changes):
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    return LlamaConfig(**(sizes | {"num_attention_heads": 4, "num_key_value_heads": 2} | changes))


def on_meta(config, **settings):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    convert_(model, PoetConfig(**(XQ | settings)))
    return model


def logits(model):
    ids = torch.arange(20).remainder(300)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("weight_format", "residual"), [(None, False), ("int8", False), ("int8", True), ("nf4", False)]
)
def test_from_a_checkpoint_equals_converting_the_loaded_model(weight_format, residual, tied, tmp_path):
    config = llama(tie_word_embeddings=tied)
    torch.manual_seed(0)
    loaded = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    settings = {"weight_format": weight_format, "weight_extra_bits": residual}
    convert_(loaded, PoetConfig(**settings, **XQ))
    model = materialize_(on_meta(config, **settings), tmp_path)
    want = loaded.state_dict()
    assert model.state_dict().keys() == want.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, want[name]), name
    assert torch.equal(logits(model), logits(loaded))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_fresh_weights_depend_on_the_seed_alone_and_leave_the_generator():
    state = torch.get_rng_state()
    first, second, other = (
        materialize_(on_meta(llama(), weight_format="int8", init="normalized"), seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(logits(first), logits(second))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert logits(first).isfinite().all()
    assert not any(t.is_meta for t in [*first.parameters(), *first.buffers()])
    embedding = first.model.embed_tokens.weight
    assert embedding.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("from_checkpoint", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=32),
        FalconMambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, state_size=4),
    ],
    ids=["gpt2", "falcon_mamba"],
)
def test_models_that_write_to_their_layers_weights_to_initialize_themselves(config, from_checkpoint, tmp_path):
    model = on_meta(config, weight_format="int8", init="keep" if from_checkpoint else "normalized").eval()
    if from_checkpoint:
        dense = AutoModelForCausalLM.from_config(config).eval()
        dense.save_pretrained(tmp_path)
        materialize_(model, tmp_path)
        assert (logits(model) - logits(dense)).norm() < 0.05 * logits(dense).norm()
    else:
        assert materialize_(model, seed=3) is model
        assert logits(model).isfinite().all()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_building_takes_the_finished_model_and_one_layer(from_checkpoint, residual, tmp_path, monkeypatch):
    """Followed storage by storage: the peak over the finished model is a few copies of one layer, not of twelve."""
    monkeypatch.setitem(quantize._READ_SLICE, "cpu", 1 << 12)
    monkeypatch.setattr(quantize, "_SLICE", 1 << 12)  # a small part of a layer, as it is of a large one
    size, layers = 256, 12

    def linears():
        return nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers))).bfloat16()

    if from_checkpoint:
        save_file(linears().state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = linears()
    convert_(model, PoetConfig(**XQ, weight_format="int8", weight_extra_bits=residual))
    tracker = StorageTracker()
    with tracker:
        tracker.enter_phase("build")
        materialize_(model, tmp_path if from_checkpoint else None)
    stored = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    peak = sum(tracker.split("build").values())
    one = 4 * size * size  # a layer in float32
    assert stored < peak < stored + 4 * one
    assert layers * one > 2 * (peak - stored)


def test_a_converted_model_releases_each_old_weight_before_the_next():
    size, layers = 256, 12
    tracker = StorageTracker()
    with tracker:
        tracker.enter_phase("convert")
        model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers)))
        dense = tracker.current
        convert_(model, PoetConfig(**XQ, weight_format="int8"))
        peak = sum(tracker.split("convert").values())
        stored = tracker.current
        assert stored < 0.5 * dense
        assert peak < dense + 6 * 4 * size * size
        tracker.enter_phase("dense")
        to_dense_(model)
        assert sum(tracker.split("dense").values()) < dense + 6 * 4 * size * size


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors.index.json", lambda _: b"[]", "holds list"),
        ("model.safetensors.index.json", lambda _: b'{"weight_map": {"a": 3}}', "has no weight_map"),
        ("model.safetensors.index.json", lambda _: b"{}", "has no weight_map"),
        ("model-00002-of-", lambda content: content[:-7], r"model-00002\S+: cannot be read \("),
        ("model-00001-of-", lambda _: b"no tensors", r"model-00001\S+: cannot be read \("),
        ("model-00001-of-", None, r"model-00001\S+: cannot be read \("),
    ],
)
def test_damaged_files_are_one_line(name, damage, message, tmp_path):
    AutoModelForCausalLM.from_config(llama()).save_pretrained(tmp_path, max_shard_size="100KB")
    (file,) = tmp_path.glob(f"{name}*")
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        materialize_(on_meta(llama()), tmp_path)
    assert "\n" not in str(error.value)


def test_mistakes_are_named(tmp_path):
    config = llama()
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="init='normalized' would discard"):
        materialize_(on_meta(config, init="normalized"), tmp_path)
    with pytest.raises(UserError, match="no safetensors files there"):
        materialize_(on_meta(config), tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"layers\.2\.\S+ \(9 are missing\).*load it with from_pretrained"):
        materialize_(on_meta(llama(num_hidden_layers=3)), tmp_path)
    with pytest.raises(UserError, match=r"mlp\.gate_proj\.weight is \(160, 64\), the model's is \(192, 64\)"):
        materialize_(on_meta(llama(intermediate_size=192)), tmp_path)
    with pytest.raises(UserError, match="no PoetLinear"):
        materialize_(nn.Linear(3, 3, device="meta"))


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.register_buffer("mask", torch.ones(8))


def test_a_buffer_that_nobody_writes_is_an_error(tmp_path):
    def meta():
        with torch.device("meta"):
            model = nn.Sequential(Masked(), nn.BatchNorm1d(16))
        convert_(model, PoetConfig(block_size=8))
        return model

    state = nn.Sequential(Masked(), nn.BatchNorm1d(16)).state_dict()
    del state["1.running_mean"]  # which its module resets
    save_file(state, tmp_path / "model.safetensors")
    model = materialize_(meta(), tmp_path)
    assert torch.equal(model[0].mask, torch.ones(8))
    assert torch.equal(model[1].running_mean, torch.zeros(16))
    del state["0.mask"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"has no tensor 0\.mask, and Masked has no reset_parameters"):
        materialize_(meta(), tmp_path)
    own = meta()
    own[0].mask = torch.arange(8.0)  # made with a device of its own: it has its values
    assert torch.equal(materialize_(own, tmp_path)[0].mask, torch.arange(8.0))


def test_tensors_that_are_not_the_models_are_reported(tmp_path, caplog):
    AutoModelForCausalLM.from_config(llama(), dtype=torch.bfloat16).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"stray": torch.zeros(3)}, file, metadata={"format": "pt"})
    with caplog.at_level("WARNING", logger="poetx.materialize"):
        model = materialize_(on_meta(llama(), weight_format="fp8"), tmp_path)
    assert "1 tensors are not the model's, stray among them" in caplog.text
    assert len(list(poet_layers(model))) == 14
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 64
