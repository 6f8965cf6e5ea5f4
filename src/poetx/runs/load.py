"""From a run or an exported directory to a dense model, or to the model that a run started with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from poetx.data.tokenizer import load_tokenizer
from poetx.errors import UserError
from poetx.files import read_json
from poetx.methods.base import convert_model, method_of
from poetx.models import build_model, load_checkpoint, resolve_device, settled
from poetx.recipe import Recipe, differing_keys, load_recipe, settled_as
from poetx.train.checkpoint import checkpoints, find_checkpoint, load_model, read_state, tensor_shapes
from poetx.train.export import (
    TEXT_SUM,
    TOKENIZER_DIR,
    TOKENIZER_SUM,
    check_start,
    recorded,
    stop_at_,
    tokenizer_sum,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

T = TypeVar("T")
#: Checkpoints of a run that is training that are tried.
_TRIES = 5


@dataclass(frozen=True)
class LoadedModel:
    """A dense model in eval mode with its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any
    device: torch.device
    recipe: Recipe | None  # None for an exported directory
    notes: list[str]  # one line about every broken checkpoint that was passed over
    text: str | None = None  # fingerprint of a run's text

    @property
    def end_of_text_id(self) -> int:
        """The token between documents. Raises :class:`UserError` when the tokenizer names none."""
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"{self.tokenizer.name_or_path}: its tokenizer names no end-of-text token; "
                "give tokenizer_config.json there an eos_token"
            )
        return self.tokenizer.eos_token_id

    def check_ids(self, largest: int) -> None:
        """Raise :class:`UserError` when the model has no embedding for the largest token of a text."""
        rows = cast(Any, self.model.get_input_embeddings()).weight.shape[0]
        if largest >= rows:
            where = self.tokenizer.name_or_path
            raise UserError(f"{where}: its tokenizer is another model's: token {largest}, but {rows} embeddings")


def load_run(run: str, *, device: str = "auto") -> LoadedModel:
    """The dense model of a run directory (newest whole checkpoint) or of an exported directory.

    Raises:
        UserError: the directory is neither, or has no whole checkpoint.
    """
    path, target = Path(run), resolve_device(device, "--device")
    if (path / "recipe.yaml").is_file():
        return while_it_trains(path, lambda: _load_checkpoint(path, target))
    if (path / "config.json").is_file():
        return _load_exported(path, target)
    what = "neither a run (recipe.yaml) nor an exported model (config.json)" if path.is_dir() else "no such directory"
    raise UserError(f"{run}: {what}")


def while_it_trains(run_dir: Path, read: Callable[[], T]) -> T:
    """What ``read`` makes of the newest checkpoint; again where the run, which goes on, has removed that meanwhile.

    Raises:
        UserError: the run removed each of several.
    """
    for _ in range(_TRIES):
        newest = checkpoints(run_dir)[-1:]
        try:
            return read()
        except Exception:  # by where the files vanish, safetensors' errors, ours or the system's
            if not newest or newest[0].exists():
                raise
    raise UserError(
        f"{run_dir}: it is training, and removed each of {_TRIES} checkpoints before they were read; have it keep more "
        "of them (train.keep_checkpoints), save less often, or stop it first"
    )


@dataclass(frozen=True)
class RebuiltRun:
    """The model a run started with, converted, and the checkpoint whose state would bring it to where the run is."""

    model: PreTrainedModel
    tokenizer: Any
    recipe: Recipe
    checkpoint: Path
    notes: list[str]


def rebuild_run(run_dir: Path, device: torch.device, *, same_start: bool = False) -> RebuiltRun:
    """Build a run's model as its first step found it: the same, because it depends on the recipe alone.

    Raises:
        UserError: not a run directory, or there is no whole checkpoint; with ``same_start`` a pretrained model that has
            changed.
    """
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"{run_dir}: not a run directory (no recipe.yaml in it)")
    checkpoint, notes = find_checkpoint(run_dir)
    recipe = load_recipe(str(checkpoint))
    if other := differing_keys(settled_as(recipe, load_recipe(str(run_dir))), recipe):
        key, (own, its) = next(iter(other.items()))
        raise UserError(
            f"{checkpoint}: is another run's, trained with {key}={its}, and {run_dir}/recipe.yaml says {own}; "
            "bring this run's own checkpoint back"
        )
    text = recorded(run_dir, TEXT_SUM)
    if text is not None and read_state(checkpoint).data_fingerprint != text:
        raise UserError(f"{checkpoint}: is another run's, of other text; bring this run's own checkpoint back")
    on_the_host = {"model.offload": None, "model.offload_dir": None} if device.type == "cpu" else {}
    recipe = recipe.with_keys({"run_dir": str(run_dir), "train.cuda_graphs": False} | on_the_host)
    tokenizer = _run_tokenizer(run_dir)
    model = build_model(
        settled(recipe, device),
        vocab_size=_vocab_size(checkpoint, recipe),
        end_of_text_id=tokenizer.eos_token_id,
        device=device,
    )
    if same_start and recipe.model.pretrained:
        check_start(model, recipe.model.pretrained, run_dir)
    convert_model(model, recipe, device)
    return RebuiltRun(model, tokenizer, recipe, checkpoint, notes)


def _vocab_size(checkpoint: Path, recipe: Recipe) -> int:
    """Embeddings of a Llama shape as it was trained. A config or pretrained model has its own number: 0 asks for none.

    The saved tokenizer need not say it: transformers' classes may add tokens to what its file has.
    """
    if recipe.model.config or recipe.model.pretrained:
        return 0
    name, shapes = "model.embed_tokens.weight", tensor_shapes(checkpoint)
    rows = next(iter(shapes.get(read_state(checkpoint).aliases.get(name, name), ())), 0)
    if not rows:
        raise UserError(f"{checkpoint}: does not fit the model of this recipe: no {name} with rows")
    return rows


def _load_checkpoint(run_dir: Path, device: torch.device) -> LoadedModel:
    run = rebuild_run(run_dir, device)
    load_model(run.checkpoint, run.model)
    method_of(run.recipe).to_dense_(run.model)
    stop_at_(run.model, run.tokenizer.eos_token_id)
    text = read_state(run.checkpoint).data_fingerprint
    return LoadedModel(run.model.eval(), run.tokenizer, device, run.recipe, run.notes, text)


def _load_exported(path: Path, device: torch.device) -> LoadedModel:
    for name in ("config.json", "generation_config.json"):
        if (path / name).exists():
            read_json(path / name)
    model = load_checkpoint(path, "auto", str(path))  # before the tokenizer, which reads config.json, too
    ends = getattr(model.generation_config, "eos_token_id", None)
    if not all(type(end) is int for end in (ends if isinstance(ends, list) else [ends]) if end is not None):
        raise UserError(f"{path / 'generation_config.json'}: eos_token_id={ends!r} must be a token id, or several")
    return LoadedModel(cast(Any, model).to(device).eval(), load_tokenizer(path), device, None, [])


def _run_tokenizer(run_dir: Path) -> Any:
    """The tokenizer that the run was trained with: text of another one means other tokens to its model."""
    remedy = f"; poetx train {run_dir} --resume writes it again"
    known = recorded(run_dir, TOKENIZER_SUM)
    tokenizer = load_tokenizer(run_dir / TOKENIZER_DIR, remedy)
    if known is not None and tokenizer_sum(run_dir) != known:
        raise UserError(f"{run_dir / TOKENIZER_DIR}: not the tokenizer that the run was trained with{remedy}")
    return tokenizer
