"""Where models come from, and that making one disturbs nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from poetx.errors import UserError
from poetx.models import build_model, resolve_device, resolve_dtype
from poetx.recipe import Recipe

Tiny = Callable[..., Recipe]
CPU = torch.device("cpu")
NO_SIZES = [f"model.{key}=null" for key in ("hidden_size", "intermediate_size", "num_layers", "num_heads")]


def build(recipe: Recipe, vocab_size: int = 320) -> torch.nn.Module:
    return build_model(recipe, vocab_size=vocab_size, end_of_text_id=0, device=CPU)


def test_fresh_weights_depend_on_the_seed_alone_and_the_global_generator_is_left_alone(tiny: Tiny) -> None:
    recipe = tiny("train.dtype=float32")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build(recipe)
    assert torch.equal(torch.rand(3), expected)
    second, other = build(recipe), build(tiny("train.dtype=float32", "train.seed=1"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_the_shape_is_the_recipes(tiny: Tiny) -> None:
    model = build(tiny("train.dtype=bfloat16", "model.num_key_value_heads=1", "model.num_layers=2"))
    assert len(model.model.layers) == 2
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (16, 32)
    assert model.lm_head.weight.shape == (320, 32)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    tied = build(tiny("train.dtype=float32", "model.tie_embeddings=true"))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_from_a_config_and_from_a_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    model = build(tiny("train.dtype=float32"))
    model.save_pretrained(tmp_path / "pretrained")
    from_config = build(tiny(*NO_SIZES, "train.dtype=float32", f"model.config={tmp_path / 'pretrained'}"))
    assert from_config.lm_head.weight.shape == (320, 32)
    loaded = build(
        tiny(*NO_SIZES, "train.dtype=float32", "poet.init=keep", f"model.pretrained={tmp_path / 'pretrained'}")
    )
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_vocabulary_that_is_too_small(tiny: Tiny, tmp_path: Path) -> None:
    build(tiny("train.dtype=float32")).config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="320 embeddings but the tokenizer 400 tokens.*data.vocab_size=320 or less"):
        build(tiny(*NO_SIZES, "train.dtype=float32", f"model.config={tmp_path}"), vocab_size=400)


def test_bad_configs_and_checkpoints(tiny: Tiny, tmp_path: Path) -> None:
    config = tmp_path / "config.json"

    def error(source: str) -> str:
        with pytest.raises(UserError) as caught:
            build(tiny(*NO_SIZES, "train.dtype=float32", "poet.init=keep", f"{source}={tmp_path}"))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no config.json there" in error("model.config")
    assert "not a checkpoint directory" in error("model.pretrained")
    config.write_text("{}")
    assert 'no "model_type"' in error("model.config")
    config.write_text("{")
    assert "model.config=" in error("model.config")
    config.write_text(json.dumps({"model_type": "no-such-model"}))
    assert "no-such-model" in error("model.config")
    config.write_text(json.dumps({"model_type": "llama"}))
    assert "model.pretrained=" in error("model.pretrained")  # no weights in it


def test_devices_and_dtypes() -> None:
    assert resolve_dtype("auto", CPU) == "float32"
    assert resolve_dtype("auto", torch.device("cuda")) == "bfloat16"
    assert resolve_dtype("float32", torch.device("cuda")) == "float32"
    with pytest.raises(UserError, match=r"train\.device=gpu"):
        resolve_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="sees no CUDA device"):
            resolve_device("cuda")


def test_a_config_takes_over_the_tokenizers_special_tokens(tiny: Tiny, tmp_path: Path) -> None:
    config = build(tiny("train.dtype=float32")).config
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 7, 8, 0
    config.save_pretrained(tmp_path)
    model = build(tiny(*NO_SIZES, "train.dtype=float32", f"model.config={tmp_path}"))
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (0, 0, None)
    assert (model.get_input_embeddings().weight[0] != 0).any()


def test_infinity_in_a_config_as_transformers_writes_it(tiny: Tiny, tmp_path: Path) -> None:
    values = build(tiny("train.dtype=float32")).config.to_dict()
    values["rope_parameters"] |= {"some_limit": {"__float__": "-Infinity"}, "other": {"__float__": "NaN"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = build(tiny("train.dtype=float32", f"model.config={tmp_path}"))
    assert model.config.rope_parameters["some_limit"] == float("-inf")


@pytest.mark.parametrize("key", ["config", "pretrained"])
def test_a_name_on_the_hub_says_how_to_download_it(
    key: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="hf download some-org/some-model --local-dir DIR"):
        build(tiny("train.dtype=float32", "poet.init=keep", f"model.{key}=some-org/some-model"))


@pytest.mark.parametrize("method", ["aqlm", "awq", "hqq"])
def test_a_missing_library_of_a_quantized_checkpoint_is_one_line(method: str, tiny: Tiny, tmp_path: Path) -> None:
    build(tiny("train.dtype=float32")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"^model\.pretrained=") as caught:
        build(tiny("train.dtype=float32", "poet.init=keep", f"model.pretrained={tmp_path}"))
    assert "\n" not in str(caught.value)


def test_on_the_meta_device_no_weight_is_made_or_read(tiny: Tiny, tmp_path: Path) -> None:
    model = build(tiny("train.dtype=float32"))
    model.config.save_pretrained(tmp_path)  # and no weights
    recipe = tiny("train.dtype=bfloat16", "poet.init=keep", f"model.pretrained={tmp_path}")
    planned = build_model(recipe, vocab_size=320, end_of_text_id=0, device=torch.device("meta"))
    assert {p.device.type for p in planned.parameters()} == {"meta"}
    assert {n: p.shape for n, p in planned.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
