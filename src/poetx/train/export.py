"""From a run to a plain Hugging Face model, and back from either to a model that generates."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from poetx.data.tokenizer import fast_tokenizer
from poetx.errors import UserError, one_line
from poetx.methods.base import convert_model, method_of
from poetx.models import build_model, resolve_device, settled
from poetx.recipe import Recipe, load_recipe
from poetx.train.checkpoint import find_checkpoint, load_model, read_state

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TOKENIZER_DIR = "tokenizer"


@dataclass(frozen=True)
class LoadedModel:
    """A dense model in eval mode with its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any
    device: torch.device
    recipe: Recipe | None  # None for an exported directory
    notes: list[str]  # one line about every broken checkpoint that was passed over

    @property
    def end_of_text_id(self) -> int:
        """The token between documents. Raises :class:`UserError` when the tokenizer names none."""
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"{self.tokenizer.name_or_path}: its tokenizer names no end-of-text token; "
                "give tokenizer_config.json there an eos_token"
            )
        return self.tokenizer.eos_token_id


def save_tokenizer(file: Path, end_of_text: str, source: str | None, directory: Path) -> None:
    """Write the tokenizer as transformers reads it, with the token that ended the documents in training.

    Args:
        file: its ``tokenizer.json``.
        source: where the user's own tokenizer came from; a directory there is copied with all its other settings.
    """
    from transformers import AutoTokenizer

    if source is not None and Path(source).expanduser().is_dir():
        tokenizer = AutoTokenizer.from_pretrained(Path(source).expanduser(), local_files_only=True)
        if tokenizer.bos_token in (None, tokenizer.eos_token):  # a token of its own for beginnings stays
            tokenizer.bos_token = end_of_text
        tokenizer.eos_token = end_of_text
    else:
        tokenizer = fast_tokenizer(file, end_of_text)
    tokenizer.save_pretrained(directory)


def export_model(model: PreTrainedModel, tokenizer_dir: Path, directory: Path) -> None:
    """Fold ``model`` to plain linears **in place** and write it with its tokenizer to ``directory``.

    The directory is replaced as a whole: written beside itself, then renamed.

    Raises:
        UserError: the disk is full or not writable; nothing half-written is left.
    """
    from safetensors import SafetensorError

    from poetx.convert import to_dense_

    to_dense_(model)
    model.config.use_cache = True
    temporary = directory.parent / f".{directory.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        for file in tokenizer_dir.iterdir():
            shutil.copyfile(file, temporary / file.name)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.replace(directory)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError | SafetensorError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise UserError(
            f"{directory}: the model could not be written ({reason}); the run's checkpoints are untouched: "
            "free some space, then write it with poetx export RUN DIR"
        ) from None


def load_run(run: str, *, device: str = "auto") -> LoadedModel:
    """The dense model of a run directory (newest whole checkpoint) or of an exported directory.

    Raises:
        UserError: the directory is neither, or has no whole checkpoint.
    """
    path, target = Path(run), resolve_device(device)
    if (path / "recipe.yaml").is_file():
        return _load_checkpoint(path, target)
    if (path / "config.json").is_file():
        return _load_exported(path, target)
    what = "neither a run (recipe.yaml) nor an exported model (config.json)" if path.is_dir() else "no such directory"
    raise UserError(f"{run}: {what}")


@dataclass(frozen=True)
class RebuiltRun:
    """The model a run started with, converted, and the checkpoint whose state would bring it to where the run is."""

    model: PreTrainedModel
    tokenizer: Any
    recipe: Recipe
    checkpoint: Path
    notes: list[str]


def rebuild_run(run_dir: Path, device: torch.device) -> RebuiltRun:
    """Build a run's model as its first step found it: the same, because it depends on the recipe alone.

    Raises:
        UserError: there is no whole checkpoint.
    """
    from transformers import AutoTokenizer

    checkpoint, notes = find_checkpoint(run_dir)
    recipe = load_recipe(str(checkpoint)).with_keys({"run_dir": str(run_dir)})
    tokenizer = AutoTokenizer.from_pretrained(run_dir / TOKENIZER_DIR, local_files_only=True)
    model = build_model(
        settled(recipe, device),
        vocab_size=_vocab_size(checkpoint, recipe),
        end_of_text_id=tokenizer.eos_token_id,
        device=device,
    )
    convert_model(model, recipe, device)
    return RebuiltRun(model, tokenizer, recipe, checkpoint, notes)


def _vocab_size(checkpoint: Path, recipe: Recipe) -> int:
    """Embeddings of a Llama shape as it was trained. A config or pretrained model has its own number: 0 asks for none.

    The saved tokenizer need not say it: transformers' classes may add tokens to what its file has.
    """
    from safetensors import safe_open

    if recipe.model.config or recipe.model.pretrained:
        return 0
    name = "model.embed_tokens.weight"
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        return file.get_slice(read_state(checkpoint).aliases.get(name, name)).get_shape()[0]


def _load_checkpoint(run_dir: Path, device: torch.device) -> LoadedModel:
    run = rebuild_run(run_dir, device)
    load_model(run.checkpoint, run.model)
    method_of(run.recipe).to_dense_(run.model)
    return LoadedModel(run.model.eval(), run.tokenizer, device, run.recipe, run.notes)


def _load_exported(path: Path, device: torch.device) -> LoadedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"{path}: {one_line(error)}") from None
    return LoadedModel(cast(Any, model).to(device).eval(), tokenizer, device, None, [])


def generate_text(
    loaded: LoadedModel,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """The continuation of ``prompt``, without it. ``temperature=0`` takes the likeliest token each time.

    Raises:
        UserError: the model's output is not finite.
    """
    import torch
    from transformers import LogitsProcessorList

    inputs = loaded.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    if inputs.numel() == 0:
        inputs = torch.tensor([[loaded.end_of_text_id]])
    positions = getattr(loaded.model.config, "max_position_embeddings", None)
    if positions is not None:  # the end of the prompt, and no more new tokens than there is room for
        inputs = inputs[:, -max(1, positions - max_new_tokens) :]
        max_new_tokens = max(1, min(max_new_tokens, positions - inputs.shape[1]))
    inputs = inputs.to(device=loaded.device, dtype=torch.long)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": 1.0}
    with (
        torch.random.fork_rng(devices=[loaded.device] if loaded.device.type == "cuda" else []),
        torch.no_grad(),
    ):
        torch.manual_seed(seed)
        output = cast(Any, loaded.model).generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            pad_token_id=loaded.tokenizer.eos_token_id,
            use_cache=True,
            logits_processor=LogitsProcessorList([cast(Any, _check_finite)]),
            **sampling,
        )
    return loaded.tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)


def _check_finite(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Between a model and its sampling, which would end in an assertion on the device."""
    if not (logits < float("inf")).all():  # -inf, as a mask leaves it, is a probability of 0
        raise UserError(
            "the model's output is not finite, so there is nothing to generate; it has diverged in training"
        )
    return logits
