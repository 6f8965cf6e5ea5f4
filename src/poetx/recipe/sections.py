"""The sections of a recipe as frozen pydantic models, one type per method and per optimizer.

A section's type is put together from what the recipe chose (:func:`section_types`), so that a key without effect
cannot be written: ``optimizer.momentum`` exists only with SGD. Numbers may be written as YAML 1.1 reads them: ``1e-3``
is text there.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, create_model, model_validator

from poetx.config import METHODS_OF, PoetConfig, Recompute
from poetx.errors import UserError
from poetx.optim.settings import LOW_RANK, MATRIX_OPTIMIZERS, OPTIMIZERS, WITH_ENDS
from poetx.recipe.values import (
    Amount,
    Beta,
    Betas,
    Count,
    Flag,
    MaybeAmount,
    MaybeCount,
    MaybeFlag,
    MaybeRate,
    Names,
    Nested,
    Rate,
    Real,
    Share,
    Size,
    Sources,
    Text,
    Whole,
    must,
    real,
)

Dense: Any = Literal[OPTIMIZERS]
DenseOrMatrix: Any = Literal[(*OPTIMIZERS, *MATRIX_OPTIMIZERS)]


class Section(BaseModel):
    """Keys and values, strict and frozen. ``belongs`` says in a few words whose the keys of this type are."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    belongs: ClassVar[str] = ""


class ModelRecipe(Section):
    """Where the model comes from: a Llama shape (sizes below), a config file, or a pretrained checkpoint.

    ``config`` is a Hugging Face ``config.json`` or its directory; ``pretrained`` a checkpoint directory. With
    either of them the sizes are taken from there and must not be given here. ``model.shape``, a name of
    :data:`poetx.recipe.shorthands.SHAPES`, is read as the sizes that it stands for.
    """

    hidden_size: MaybeCount = None
    intermediate_size: MaybeCount = None
    num_layers: MaybeCount = None
    num_heads: MaybeCount = None
    num_key_value_heads: MaybeCount = None  # None: as many as num_heads (no grouped-query attention)
    tie_embeddings: Flag = False
    residual_scale: Real = 1.0  # on fresh weights that write to the residual stream and stay dense
    config: Text | None = None
    pretrained: Text | None = None
    gradient_checkpointing: Flag = False  # keep only every decoder layer's input, and compute the layer again
    recompute: Recompute = "auto"  # of rotated layers then
    #: In host memory: the weights that rotations turn (frozen), what decoder layers keep for backward (activations).
    offload: Literal["frozen", "activations", "both"] | None = None
    offload_dir: Text | None = None  # on a disk: the weights that rotations turn are in files there, not in memory

    @model_validator(mode="after")
    def _one_source(self) -> ModelRecipe:
        if self.recompute != "auto" and not self.gradient_checkpointing:
            raise UserError(
                f"model.recompute={self.recompute}: is for model.gradient_checkpointing=true; leave it out or set that"
            )
        if self.offloads_activations and not self.gradient_checkpointing:
            raise UserError(
                f"model.offload={self.offload}: is for decoder layers that keep their input only; set "
                "model.gradient_checkpointing=true, or use model.offload=frozen"
            )
        if self.offload_dir and not self.streams_weights:
            raise UserError("model.offload_dir: is for model.offload=frozen or both; set that, or leave it out")
        if self.config and self.pretrained:
            raise UserError("model.config and model.pretrained are both set; give one of them")
        given = [name for name in SIZES if getattr(self, name) is not None]
        if self.config or self.pretrained:
            source = "model.config" if self.config else "model.pretrained"
            if given or self.tie_embeddings:
                extra = given[0] if given else "tie_embeddings"
                raise UserError(f"model.{extra} is set although {source} decides it; remove one of the two")
            return self
        missing = [name for name in SIZES[:4] if getattr(self, name) is None]
        if missing:
            raise UserError(
                f"model.{missing[0]} is missing; give {', '.join(SIZES[:4])}, or model.shape, model.config or "
                "model.pretrained"
            )
        assert self.hidden_size is not None
        assert self.num_heads is not None
        if self.hidden_size % self.num_heads:
            raise UserError(f"model.num_heads={self.num_heads} does not divide model.hidden_size={self.hidden_size}")
        if self.hidden_size // self.num_heads % 2:
            raise UserError(
                f"model.hidden_size / model.num_heads = {self.hidden_size // self.num_heads} is odd; "
                "rotary position embeddings need an even head size"
            )
        if self.num_key_value_heads and self.num_heads % self.num_key_value_heads:
            raise UserError(
                f"model.num_key_value_heads={self.num_key_value_heads} does not divide model.num_heads={self.num_heads}"
            )
        return self

    @property
    def streams_weights(self) -> bool:
        """Whether the weights that rotations turn are in host memory."""
        return self.offload in ("frozen", "both")

    @property
    def offload_path(self) -> Path | None:
        """:attr:`offload_dir` as a path."""
        return Path(self.offload_dir) if self.offload_dir else None

    @property
    def offloads_activations(self) -> bool:
        """Whether what checkpointed decoder layers keep is in host memory."""
        return self.offload in ("activations", "both")


#: A Llama's sizes; the first four have no default.
SIZES = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_key_value_heads")


class DataRecipe(Section):
    """Text and tokenizer. ``train``: "builtin", a file, directory or pattern, a name on the Hub, a list of these, or a
    mixture of them with weights (docs/data.md).
    """

    train: Sources = None
    validation: Sources = None  # same kinds as train; None: hold out validation_fraction of the documents
    text_field: Text = "text"  # of records (JSONL, CSV, Parquet, Arrow): the one with the text
    format: Literal["auto", "text", "messages", "sharegpt", "prompt", "alpaca"] = "auto"  # of records; auto: by fields
    chat_template: Text | None = None  # Jinja file for conversations; None: the tokenizer's own, or a plain one
    pack: MaybeFlag = None  # documents side by side in a window, none sees another; None: conversations
    validation_fraction: Real = 0.01
    tokenizer: Text | None = None  # existing tokenizer (directory or tokenizer.json); None: train one
    vocab_size: Count = 32000  # of a tokenizer trained here
    end_of_text: Text | None = None  # token between documents; None: "<|endoftext|>" or the tokenizer's own
    seq_len: Count = 256
    cache_dir: Text | None = None  # where tokenized data is kept; None: beside the run directory

    @model_validator(mode="after")
    def _ranges(self) -> DataRecipe:
        if self.tokenizer is None and self.vocab_size < 300:
            raise UserError(f"data.vocab_size={self.vocab_size} is too small; bytes alone take 256, use 300 or more")
        if isinstance(self.validation, dict):
            raise UserError("data.validation: has weights, which are for data.train; give a list of paths")
        if self.validation is None and not 0 < self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction={self.validation_fraction} must be between 0 and 1")
        return self


class PoetRecipe(Section):
    """Fields of :class:`poetx.PoetConfig`, those that the chosen ``method`` has."""

    belongs: ClassVar[str] = "poet"
    method: Literal["poet-x", "single-step", "oft"] = "poet-x"

    @functools.cached_property
    def config(self) -> PoetConfig:
        """The settings of :func:`poetx.convert_`."""
        own = type(self).model_fields.keys() - MergedRecipe.__annotations__.keys()
        return PoetConfig(**{name: getattr(self, name) for name in own})

    @model_validator(mode="after")
    def _as_a_config(self) -> PoetRecipe:
        try:
            _ = self.config
        except UserError as error:
            raise UserError(f"poet.{error}") from None
        return self


class MergedRecipe(PoetRecipe):
    """The paper's form, whose rotations live between merges."""

    merge_every: MaybeCount = 200  # steps; None: only at export
    merge_angle: MaybeRate = None  # radians; earlier where a rotation has turned by more. Needs merge_every

    @model_validator(mode="after")
    def _within_the_series(self) -> MergedRecipe:
        if self.merge_angle is not None and self.merge_angle >= (100 if self.config.neumann_order == "exact" else 1):
            raise UserError(
                f"poet.merge_angle={self.merge_angle:g}: the series that trains rotations ends below 1; 0.3 is usual"
            )
        return self


class LoraRecipe(Section):
    """Adapters by peft in place of ``poet``; the model itself stays as it is."""

    rank: Count = 16
    alpha: MaybeRate = None  # the product of the two thin matrices is scaled by alpha / rank; None: twice the rank


class OptimizerRecipe(Section):
    """What every optimizer has. ``lr`` is that of all that is not a rotation. Defaults: docs/method.md, at its end."""

    name: DenseOrMatrix = "adamw"  # pyright: ignore[reportInvalidTypeForm]
    lr: Rate = 1e-3
    weight_decay: Amount = 0.0  # never applied to rotations
    clip: MaybeAmount = 0.1  # global gradient norm; null or 0: off
    release_gradients: Flag = False  # update large matrices inside backward; clip must be null
    warmup_steps: Size = 0
    min_lr_ratio: Share = 0.01  # the cosine ends at this fraction of the peak

    @model_validator(mode="after")
    def _no_norm_of_released_gradients(self) -> OptimizerRecipe:
        if self.release_gradients and self.clip:
            raise UserError(
                f"optimizer.release_gradients with optimizer.clip={self.clip:g}: the norm over all gradients is not "
                "known while some are released during backward; set optimizer.clip=null"
            )
        return self


class AdamWKeys(Section):
    belongs: ClassVar[str] = "AdamW's"
    betas: Betas = (0.9, 0.999)
    eps: Rate = 1e-8
    state_dtype: Literal["auto", "same", "float32", "bfloat16", "int8"] = "auto"  # see poetx.optim.build_optimizer


class SgdKeys(Section):
    belongs: ClassVar[str] = "SGD's"
    momentum: Beta = 0.0


class MatrixKeys(Section):
    belongs: ClassVar[str] = "for dense matrices (poet=null, lora=null)"
    matrix_lr: MaybeRate = None  # of those between embedding and head; None: the rule's usual one, else lr


class LowRankKeys(Section):
    belongs: ClassVar[str] = f"for {', '.join(LOW_RANK)}"
    rank: MaybeCount = None  # of the subspace; None: a quarter of each matrix's smaller side
    subspace_gap: Count = 200  # steps that it stays


class EndKeys(Section):
    belongs: ClassVar[str] = f"for {', '.join(WITH_ENDS)}"
    end_lr: MaybeRate = None  # of embedding and head where the rule steps them, too; None: that of the matrices


class PoetXKeys(Section):
    belongs: ClassVar[str] = "for poet.method=poet-x"
    dense_optimizer: Dense | None = None  # pyright: ignore[reportInvalidTypeForm]  # for all but rotations; None: name
    poet_lr: Rate = 2.5e-4  # of the rotations
    clip_ramp_start: Share = 0.1  # after a merge the clip value climbs from this fraction of itself ...
    clip_ramp_steps: Size = 10  # ... to itself in this many steps; 0: no ramp
    clip_ramp_until: Size = 2000  # ... for merges within the first so many steps


class RotationAdamWKeys(Section):
    belongs: ClassVar[str] = "for rotations by AdamW (poet.method=poet-x, optimizer.name=adamw)"
    poet_betas: Betas = (0.9, 0.999)
    poet_eps: Rate = 1e-6
    poet_eps_mode: Literal["corrected", "uncorrected"] = "corrected"  # uncorrected: as the papers add it


class SingleStepKeys(Section):
    belongs: ClassVar[str] = "for poet.method=single-step"
    angle: Annotated[
        float,
        BeforeValidator(real),
        must(lambda value: 0 < value < 0.5, "radians a step, between 0 and 0.5 (0.012 is usual)"),
    ] = 0.012
    norm_growth: Amount = 0.0  # ‖W‖² grows by so many times its first value over all train.steps
    poet_momentum: Beta = 0.95  # of the rotations
    nesterov: Flag = True  # look ahead by the last gradient; false: two thirds of the momentum's bytes


_OPTIMIZER_KEYS = (AdamWKeys, SgdKeys, MatrixKeys, LowRankKeys, EndKeys, PoetXKeys, RotationAdamWKeys, SingleStepKeys)


class TrainRecipe(Section):
    """Length, batch, precision and cadence of the run."""

    steps: Count = 1000
    batch_size: Count = 32  # sequences in one optimizer step, of all processes together
    micro_batch_size: MaybeCount = None  # sequences in one forward; None: batch_size
    seed: Size = 0
    device: Text = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on cuda, else float32
    autocast: Flag = False  # compute in bfloat16 while weights and optimizer state stay in dtype (auto: float32)
    compile: Flag = False
    cuda_graphs: Flag = False  # forward and backward captured once, then replayed: for steps that wait for the host
    chunked_loss: Flag = False  # cross entropy a piece of the vocabulary at a time: the logits never exist
    deterministic: Flag = False  # refuse operations that are not (slower on a GPU; the CPU always is)
    eval_every: Count = 200
    eval_windows: Count = 64  # validation windows, spread evenly over the set
    sample_tokens: Size = 0  # that the model writes after each of two prompts, at every evaluation
    report_to: Names | None = (
        None  # tensorboard, wandb, trackio, mlflow, module:Class, or several; metrics.jsonl always
    )
    spectrum_every: MaybeCount = None  # steps between measurements of every rotated layer's singular values
    memory_every: MaybeCount = None  # steps between measurements of memory by phase; slow on the CPU, first step too
    log_every: Count = 10  # steps between lines of plain progress; metrics.jsonl has every step
    checkpoint_every: Count = 500
    keep_checkpoints: Count = 2
    max_bad_steps: Count = 5  # this many non-finite steps in a row stop the run
    export: Flag = True  # write run_dir/export at the end

    @property
    def micro_batch(self) -> int:
        """Sequences in one forward pass of a lone process."""
        return self.micro_batch_size or self.batch_size

    def share(self, ranks: int) -> tuple[int, int]:
        """Sequences of a batch that each of so many ranks takes, and of those in one forward pass.

        Raises:
            UserError: they cannot be parted evenly.
        """
        own, rest = divmod(self.batch_size, ranks)
        micro = min(self.micro_batch, own)
        if rest or own % micro:
            what = f" with train.micro_batch_size={micro}" if micro < own else ""
            raise UserError(
                f"train.batch_size={self.batch_size}{what}: cannot be parted evenly over {ranks} processes; use a "
                f"multiple of {ranks * (micro if micro < own else 1)}"
            )
        return own, micro

    @model_validator(mode="after")
    def _fits(self) -> TrainRecipe:
        if self.batch_size % self.micro_batch:
            raise UserError(
                f"train.micro_batch_size={self.micro_batch} does not divide train.batch_size={self.batch_size}"
            )
        if self.autocast and self.dtype == "bfloat16":
            raise UserError("train.autocast with train.dtype=bfloat16 has no effect; leave one of them out")
        if self.dtype == "float16":
            raise UserError("train.dtype=float16 needs loss scaling, which poetx does not do; use bfloat16")
        return self


# -- one type per method and per optimizer ----------------------------------------------------------------------------

#: The methods that a key of ``poet`` belongs to, where not to all of them.
_METHODS_OF = METHODS_OF | {"merge_every": ("poet-x",), "merge_angle": ("poet-x",)}
_OF_FORMATS = ("group_size",)
_PLAIN: dict[Any, Any] = {int: Whole, float: Real, bool: Flag, bool | None: MaybeFlag, str: Text}


@functools.cache
def _config_fields() -> dict[str, tuple[Any, Any]]:
    hints = typing.get_type_hints(PoetConfig)
    hints |= {"target_modules": Names, "exclude_modules": Names, "residual_modules": Names, "overrides": Nested}
    fields = {field.name: field.default for field in dataclasses.fields(PoetConfig)}
    return {
        name: (_PLAIN.get(hints[name], hints[name]), default) for name, default in fields.items() if name != "method"
    }


@functools.cache
def poet_type(method: str, quantized: bool) -> type[PoetRecipe]:
    """The type of the ``poet`` section of a method; ``group_size`` is there with a ``weight_format`` only."""
    away = {key for key, methods in _METHODS_OF.items() if method not in methods}
    away |= set() if quantized and "weight_format" not in away else {*_OF_FORMATS}
    fields: dict[str, Any] = {name: field for name, field in _config_fields().items() if name not in away}
    base = MergedRecipe if method == "poet-x" else PoetRecipe
    return create_model(f"{method.title().replace('-', '')}Recipe", __base__=base, **fields)


@functools.cache
def optimizer_type(method: str | None, names: frozenset[str], rotations_by_adamw: bool) -> type[OptimizerRecipe]:
    """The type of the ``optimizer`` section: what every one has, and what these optimizers and this method have."""
    parts: list[type[Section]] = []
    if names & {"adamw", *MATRIX_OPTIMIZERS}:
        parts.append(AdamWKeys)
    kinds = ((("sgd",), SgdKeys), (LOW_RANK, LowRankKeys), (WITH_ENDS, EndKeys))
    parts += [keys for kind, keys in kinds if names.intersection(kind)]
    if method is None:
        parts.append(MatrixKeys)
    elif method == "poet-x":
        parts += [PoetXKeys, *([RotationAdamWKeys] if rotations_by_adamw else [])]
    elif method == "single-step":
        parts.append(SingleStepKeys)
    bases: Any = (*reversed(parts), OptimizerRecipe)
    kind: Any = create_model("OptimizerRecipe", __base__=bases)
    return kind


def section_types(values: Mapping[str, Any]) -> dict[str, type[Section]]:
    """The types of all sections that the raw recipe ``values`` choose, by name."""
    lora = isinstance(values.get("lora"), Mapping)
    poet = values.get("poet", None if lora else {})
    poet = poet if isinstance(poet, Mapping) else None
    optimizer = values.get("optimizer")
    optimizer = optimizer if isinstance(optimizer, Mapping) else {}
    method = ("lora" if lora else None) if poet is None else poet.get("method")
    if poet is not None and method not in ("single-step", "oft"):
        method = "poet-x"
    name = optimizer.get("name", "adamw")
    names = {str(name)}
    if method == "poet-x" and optimizer.get("dense_optimizer") is not None:
        names.add(str(optimizer["dense_optimizer"]))
    types: dict[str, type[Section]] = {
        "model": ModelRecipe,
        "data": DataRecipe,
        "optimizer": optimizer_type(method, frozenset(names & _KNOWN), name == "adamw"),
        "train": TrainRecipe,
        "lora": LoraRecipe,
    }
    if method is not None and poet is not None:
        types["poet"] = poet_type(method, poet.get("weight_format") is not None)
    return types


_KNOWN = frozenset(typing.get_args(OptimizerRecipe.model_fields["name"].annotation))


def belongs(section: str, key: str) -> str:
    """Whose a key of ``optimizer`` or ``poet`` is, in a few words; empty for a key that no type has."""
    if section == "optimizer":
        return next((part.belongs for part in _OPTIMIZER_KEYS if key in part.model_fields), "")
    if section == "poet":
        if key in _OF_FORMATS:
            return "for poet.weight_format"
        return f"for poet.method={' or '.join(_METHODS_OF[key])}" if key in _METHODS_OF else ""
    return ""


def default_of(section: str, key: str) -> Any:
    """The default of a section's key, whatever type it belongs to; None for a key that no type has."""
    for types in _all_types(section):
        if key in types.model_fields:
            return types.model_fields[key].default
    return None


def _all_types(section: str) -> Iterator[type[Section]]:
    if section == "poet":
        yield from (poet_type("poet-x", True), poet_type("single-step", False))
    elif section == "optimizer":
        yield from (OptimizerRecipe, *_OPTIMIZER_KEYS)
    else:
        plain = {"model": [ModelRecipe], "data": [DataRecipe], "train": [TrainRecipe], "lora": [LoraRecipe]}
        yield from plain.get(section, [])


def every_key() -> dict[str, list[str]]:
    """All keys of every section, whatever is chosen: for *did you mean*."""
    sections = ("model", "data", "poet", "lora", "optimizer", "train")
    keys = {s: list({k: None for t in _all_types(s) for k in t.model_fields}) for s in sections}
    keys["model"].insert(0, "shape")  # read as the sizes that it stands for
    return keys
