"""Where models come from, and that making one disturbs nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from builders import Tiny, gpt2, llama
from poetx.data.tokenizer import read_tokenizer, tokenizer_file
from poetx.errors import UserError
from poetx.methods.base import convert_model
from poetx.models import build_model, load_checkpoint, resolve_device, resolve_dtype
from poetx.recipe import Recipe
from poetx.runs.load import load_run

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


Change = Callable[[dict[str, torch.Tensor]], object]
UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
UP_BIAS, UP_OF_2 = UP.replace("weight", "bias"), UP.replace("1", "2")
MISFITS: dict[str, tuple[Change, str]] = {
    "no norm": (lambda tensors: tensors.pop(NORM), rf"has no {NORM}"),
    "no head": (lambda tensors: tensors.pop("lm_head.weight"), r"has no lm_head\.weight"),
    "no layer": (lambda t: [t.pop(key) for key in list(t) if ".layers.0." in key], r"has no model\.layers\.0.* 6 more"),
    "shape": (lambda tensors: tensors.update({UP: torch.zeros(3, 48)}), rf"{UP} is \(3, 48\)"),
    "extra layer": (
        lambda t: t.update({UP.replace("1", "2"): torch.zeros(104, 48)}),
        r"the model has no model\.layers\.2",
    ),
    "bias": (lambda t: t.update({UP_BIAS: torch.zeros(104)}), rf"the model has no {UP_BIAS}"),
    "codes": (lambda tensors: tensors.update({UP: (9 * tensors[UP]).char()}), rf"{UP}.*codes of a quantized weight"),
    "infinity": (lambda tensors: tensors[UP][3].fill_(float("-inf")), rf"{UP}.*NaN or infinity"),
}


def change_tensors(directory: Path, change: Change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def build_pretrained(tiny: Tiny, path: Path, *settings: str, vocab_size: int = 97) -> torch.nn.Module:
    recipe = tiny("train.dtype=float32", "poet.init=keep", f"model.pretrained={path}", *settings)
    model = build_model(recipe, vocab_size=vocab_size, end_of_text_id=0, device=CPU)
    convert_model(model, recipe, CPU)
    return model


@pytest.mark.parametrize("damage", MISFITS)
def test_a_checkpoint_whose_tensors_are_not_the_models_is_refused_by_name(
    tiny: Tiny, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama().save_pretrained(tmp_path)
    change, message = MISFITS[damage]
    change_tensors(tmp_path, change)
    monkeypatch.setattr("poetx.runs.load.load_tokenizer", lambda path: None)
    for build_it in (
        lambda: build_pretrained(tiny, tmp_path),
        lambda: build_pretrained(tiny, tmp_path, "method=int8"),
        lambda: load_run(str(tmp_path), device="cpu"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            build_it()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [(), ("method=int8",)], ids=["", "int8"])
def test_tensors_that_are_no_weights_or_stored_once_are_no_fault(
    tiny: Tiny, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6), "steps": torch.tensor(3)}
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    change_tensors(tmp_path / "tied", lambda tensors: tensors.update(old))
    tied = build_pretrained(tiny, tmp_path / "tied", *settings)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    masks = {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    gpt2().transformer.save_pretrained(tmp_path / "gpt2")  # its head is its embedding
    change_tensors(tmp_path / "gpt2", lambda tensors: tensors.update(masks))
    build_pretrained(tiny, tmp_path / "gpt2", *settings)


def test_a_missing_expert_is_one_line(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.pop("model.layers.0.block_sparse_moe.experts.1.w1.weight"))
    with pytest.raises(UserError, match=r"pretrained=.*parts of tensors .*experts, say"):
        build_pretrained(tiny, tmp_path)


def test_a_vocabulary_that_is_too_small(tiny: Tiny, tmp_path: Path) -> None:
    build(tiny("train.dtype=float32")).config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="320 embeddings but the tokenizer 400 tokens.*data.vocab_size=320 or less"):
        build(tiny(*NO_SIZES, "train.dtype=float32", f"model.config={tmp_path}"), vocab_size=400)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("manifest.json recipe.yaml", "is a checkpoint; give .*/export, which poetx export"),
        ("export/config.json", "is a run; the model that it exported is .*/export"),
        ("adapter_config.json", "is an adapter alone; merge it into its model, and give what that saves"),
        (None, r"no such file or directory; for a model of the Hub, first: hf download org/model --local-dir DIR"),
    ],
)
def test_what_is_there_in_place_of_a_model_is_said(
    file: str | None, message: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in file.split() if file else ():
        (tmp_path / "org/model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "org/model" / name).write_text("{}")
    with pytest.raises(UserError, match=rf"model\.pretrained=.*{message}"):
        build(tiny(*NO_SIZES, "train.dtype=float32", "poet.init=keep", "model.pretrained=org/model"))
    (tmp_path / "org/model/spiece.model").parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "org/model/spiece.model").write_bytes(b"x")
    if file is None:
        with pytest.raises(
            UserError, match=r"^data\.tokenizer=.*: no tokenizer\.json there but spiece\.model; AutoTok"
        ):
            tokenizer_file("org/model")


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


def test_what_git_lfs_has_not_fetched_is_named(tiny: Tiny, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n")
    with pytest.raises(UserError, match=rf"^{tmp_path}/model\.safetensors: a pointer of Git LFS, .* \(git lfs pull\)$"):
        build(tiny(*NO_SIZES, "train.dtype=float32", "poet.init=keep", f"model.pretrained={tmp_path}"))
    with pytest.raises(UserError, match=rf"^{tmp_path}/tokenizer\.json: a pointer of Git LFS"):
        read_tokenizer(tokenizer_file(str(tmp_path)))


def test_a_checkpoint_of_pickles_says_how_to_save_it_anew(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(**{"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}).save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"^model\.pretrained=x: has pytorch_model\.bin and no safetensors; save it as"):
        load_checkpoint(tmp_path, torch.float32, "model.pretrained=x")
