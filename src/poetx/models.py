"""The model of a recipe: a Llama shape, a Hugging Face config, or a pretrained checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from poetx.config import RESIDUAL_MODULES, name_matches
from poetx.distributed.launch import local_device, started_ranks
from poetx.errors import UserError, one_line
from poetx.files import check_fetched
from poetx.recipe import Recipe
from poetx.recipe.places import found_instead

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def resolve_device(device: str, key: str = "train.device") -> torch.device:
    """``"auto"`` is cuda where there is one, else the CPU; under ``torchrun`` the GPU of this process.

    Args:
        key: whose value it is, for messages.

    Raises:
        UserError: a device that is not there, or one GPU for several processes.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"{key}={device}: {one_line(error).split('. ')[0]}") from None
    if resolved.type not in ("cpu", "cuda"):
        raise UserError(f"{key}={device}: not supported; use cpu, cuda or auto")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key}={device}: this torch ({torch.__version__}) sees no CUDA device; use cpu or auto")
    if resolved.type == "cuda" and started_ranks() > 1:
        if resolved.index is not None:
            raise UserError(f"{key}={device}: one GPU for {started_ranks()} processes; use cuda, each has its own")
        return torch.device("cuda", local_device())
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{key}={device}: there are only {torch.cuda.device_count()} CUDA devices")
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """``"auto"`` is bfloat16 on cuda, else float32; anything else stays."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device.type == "cuda" else "float32"


def settled(recipe: Recipe, device: torch.device) -> Recipe:
    """``recipe`` with ``train.dtype: auto`` made what it is on ``device``; under autocast the weights are float32."""
    auto = "float32" if recipe.train.autocast else resolve_dtype("auto", device)
    dtype = auto if recipe.train.dtype == "auto" else recipe.train.dtype
    return recipe.with_keys({"train.dtype": dtype})


def build_model(recipe: Recipe, *, vocab_size: int, end_of_text_id: int, device: torch.device) -> PreTrainedModel:
    """The dense model of the recipe on ``device`` in the recipe's dtype (which must be resolved already).

    On the meta device where the recipe has a ``poet.weight_format``: :func:`poetx.methods.convert_model` then makes it
    layer by layer, so that the dense weights never exist together. On the CPU where it has ``model.offload``, or on the
    meta device, too, where they come from a checkpoint.
    With ``device`` meta no weight is made or read, of a checkpoint either: for plans.
    Fresh weights depend on ``train.seed`` only; the global random generators are left as they were.

    Args:
        vocab_size: tokens of the tokenizer. A Llama shape gets exactly this many; a config or checkpoint must
            have at least this many.

    Raises:
        UserError: a config or checkpoint that cannot be read or has too small a vocabulary.
    """
    import torch

    from poetx.ops.random import seeded

    dtype = getattr(torch, recipe.train.dtype)
    home = torch.device("cpu") if recipe.model.streams_weights and device.type != "meta" else device
    with seeded(recipe.train.seed, device):
        if recipe.model.pretrained and device.type != "meta":
            model = _pretrained(recipe, dtype)
        else:
            config = model_config(recipe, vocab_size=vocab_size, end_of_text_id=end_of_text_id)
            start = torch.device("meta") if _is_quantized(recipe) else home
            model = model_from_config(config, dtype, start, f"model.config={recipe.model.config}")
    if recipe.model.residual_scale != 1:
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) and name_matches(name, RESIDUAL_MODULES):
                    module.weight.mul_(recipe.model.residual_scale)
    check_fits(model, recipe, vocab_size)
    model.config.use_cache = False
    if next(model.parameters()).is_meta:
        return model
    return cast(Any, model).to(home)  # transformers' decorator hides nn.Module.to from the type checker


def check_fits(model: Any, recipe: Recipe, vocab_size: int) -> None:
    """Raise :class:`UserError` where the recipe has more tokens or positions than ``model``."""
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < vocab_size:
        raise UserError(
            f"the model has {rows} embeddings but the tokenizer {vocab_size} tokens; "
            + ("use its own tokenizer" if recipe.model.pretrained else "raise vocab_size in model.config")
            + f" or give data.vocab_size={rows} or less"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and recipe.data.seq_len > positions:
        raise UserError(f"data.seq_len={recipe.data.seq_len}: the model has {positions} positions; use at most that")


def model_config(recipe: Recipe, *, vocab_size: int, end_of_text_id: int = 0) -> PretrainedConfig:
    """The ``transformers`` config of the recipe's model, whichever way that is given.

    Raises:
        UserError: a config that is not there or cannot be read.
    """
    shape = recipe.model
    if shape.pretrained:
        return _read_config("model.pretrained", shape.pretrained)
    if shape.config:
        config = _read_config("model.config", shape.config)
        # Those in the file belong to another tokenizer.
        config.bos_token_id = config.eos_token_id = end_of_text_id
        config.pad_token_id = None
        return config
    from transformers import LlamaConfig

    assert shape.hidden_size and shape.intermediate_size and shape.num_layers and shape.num_heads  # noqa: PT018
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads or shape.num_heads,
        max_position_embeddings=recipe.data.seq_len,
        tie_word_embeddings=shape.tie_embeddings,
        bos_token_id=end_of_text_id,
        eos_token_id=end_of_text_id,
        pad_token_id=None,  # a padding id would zero that row of the embedding, and it is the end of text
    )


def model_from_config(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device, source: str
) -> PreTrainedModel:
    """A fresh causal language model; ``source`` is what a :class:`UserError` names where the config has none."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, ImportError) as error:
        raise UserError(f"{source}: {one_line(error)}") from None


def _read_config(key: str, source: str) -> Any:
    from transformers import AutoConfig

    path = Path(source).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{key}={source}: {found_instead(path, 'config.json')}")
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"), object_hook=_special_float)
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except KeyError:
        raise UserError(f'{key}={source}: no "model_type" in its config.json') from None
    except Exception as error:  # transformers and huggingface_hub have a class of their own for every mistake
        raise UserError(f"{key}={source}: {one_line(error)}") from None


def _special_float(values: dict[str, Any]) -> Any:
    """How ``transformers`` writes infinity into JSON, which has none: ``{"__float__": "Infinity"}``."""
    return float(values["__float__"]) if values.keys() == {"__float__"} else values


def _is_quantized(recipe: Recipe) -> bool:
    if recipe.poet is None:
        return False
    config = recipe.poet.config
    own = [settings.get("weight_format") for settings in (config.overrides or {}).values()]
    return any((config.weight_format, *own))


def _is_streamed(recipe: Recipe) -> bool:
    """Whether the weights go from the checkpoint's files to host memory, each by way of the device."""
    return recipe.model.streams_weights and recipe.poet is not None and recipe.poet.config.method != "single-step"


def _pretrained(recipe: Recipe, dtype: torch.dtype) -> PreTrainedModel:
    source = str(recipe.model.pretrained)
    path, name = Path(source).expanduser(), f"model.pretrained={source}"
    if not (path / "config.json").is_file():
        raise UserError(f"{name}: not a checkpoint directory ({found_instead(path, 'config.json')})")
    try:
        model = _on_meta(path, dtype) if _is_quantized(recipe) or _is_streamed(recipe) else None
    except Exception as error:  # as in load_checkpoint
        raise UserError(f"{name}: {one_line(error)}") from None
    return load_checkpoint(path, dtype, name) if model is None else model


def load_checkpoint(path: Path, dtype: torch.dtype | str, name: str) -> PreTrainedModel:
    """The causal language model in a directory, every weight of it from there; ``name`` begins each message.

    Raises:
        UserError: files that cannot be read, or tensors that are not those of the model in ``config.json``.
    """
    from transformers import AutoModelForCausalLM

    there = list(path.glob("*.safetensors"))
    for file in there:
        check_fetched(file)
    if not there and (pickled := sorted(path.glob("pytorch_model*.bin"))):
        raise UserError(
            f"{name}: has {pickled[0].name} and no safetensors; save it as such once, by transformers: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR)"
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
        )
    except Exception as error:  # by what is wrong in the files, transformers raises nearly any class
        text = f"transformers knows no {error}" if isinstance(error, KeyError) else one_line(error)
        if "automatic conversion" in text:
            text = "parts of tensors that are one in the model (experts, say) are missing, too many or of other shapes"
        raise UserError(f"{name}: {text}") from None
    model, found = loaded
    problems = [f"has no {_some(found['missing_keys'])}, random without it"] if found["missing_keys"] else []
    problems += [f"{key} is {tuple(got)}, not {tuple(want)}" for key, got, want in sorted(found["mismatched_keys"])[:3]]
    if not getattr(model, "is_quantized", False):  # packed weights have tensors and dtypes of their own
        extra = _weights_among(found["unexpected_keys"], path)
        problems += [f"the model has no {_some(extra)}"] if extra else []
        codes = _integers_among(dict(model.named_parameters()), path)
        problems += [f"{_some(codes)}: integers, codes of a quantized weight without their scales"] if codes else []
        broken = not_finite(model)
        problems += [f"{_some(broken)}: NaN or infinity in it"] if broken else []
    if problems:
        raise UserError(
            f"{name}: {'; '.join(problems)}; its config.json and weights are not of one whole causal language model: "
            "get both from the same place again"
        )
    return model


def not_finite(model: torch.nn.Module) -> list[str]:
    """Names of the parameters, and of the converted layers' buffers (scales, say), that have NaN or infinity.

    Of sharded ones on any rank, alike on all.
    """
    from poetx.distributed.ranks import on_any_rank
    from poetx.distributed.sharded import is_sharded, local
    from poetx.layers.walk import poet_layers

    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    for name, layer in poet_layers(model):
        tensors |= {f"{name}.{key}": buffer for key, buffer in layer.named_buffers()}
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    broken = [not local(tensor).isfinite().all() for tensor in floating.values()]
    if any(map(is_sharded, floating.values())):
        broken = on_any_rank(broken, next(iter(floating.values())).device)
    return [name for name, is_broken in zip(floating, broken, strict=True) if is_broken]


def _some(names: Collection[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def _weights_among(names: Collection[str], path: Path) -> list[str]:
    """Those that may be weights: masks, counters and constants, which old checkpoints hold as well, are not."""
    from poetx.materialize import SafetensorsCheckpoint

    if not names:
        return []
    source, weights = SafetensorsCheckpoint(path), []
    for name in names:
        stored = next((other for other in source.names if f".{name}".endswith(f".{other}")), None)
        tensor = None if stored is None else source.read(stored)
        if tensor is None or (tensor.ndim and tensor.is_floating_point()):
            weights.append(name)
    return weights


def _integers_among(names: Collection[str], path: Path) -> list[str]:
    """Those that the file holds as integers, under the model's own name or that of the model inside it."""
    from poetx.materialize import SafetensorsCheckpoint

    source = SafetensorsCheckpoint(path)
    stored = {name: source.names & {name, name.partition(".")[2]} for name in names}
    return [name for name, there in stored.items() if any(source.is_integer(one) for one in there)]


def _on_meta(path: Path, dtype: torch.dtype) -> PreTrainedModel | None:
    """The checkpoint's model without its weights, or None where its files name tensors otherwise than the model."""
    import torch
    from transformers import AutoConfig, GenerationConfig

    from poetx.materialize import SafetensorsCheckpoint

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    model = model_from_config(config, dtype, torch.device("meta"), f"model.pretrained={path}")
    source = SafetensorsCheckpoint(path)
    idle = re.compile("|".join([r"rotary_emb\.inv_freq$", *(model._keys_to_ignore_on_load_unexpected or ())]))
    extra = {name for name in source.names.difference(model.state_dict()) if not idle.search(name)}
    if source.missing(model) or _weights_among(extra, path):
        return None
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model
