"""The recipe: everything that defines a training run, as nested frozen dataclasses read from YAML.

A recipe is found by a built-in name, by the path of a YAML file, or by the directory of an earlier run.
Overrides are ``a.b=value`` strings whose values are read as YAML. Keys are strict: a misspelt key is an error that
names the nearest right one, and :func:`poetx.remarks.remarks` says which have no effect, so that no setting is
ever ignored in silence.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from poetx.config import PoetConfig, renamed
from poetx.errors import UserError, nearest
from poetx.method_names import put_method
from poetx.schema import (
    apply_override,
    build,
    check_keys,
    coerce,
    flatten,
    join,
    not_negative,
    one_line,
    plain,
    positive,
)

RECIPE_DIR = Path(__file__).resolve().parent / "recipes"
DEMOS = ("demo-single-step", "demo")  # the first is what `poetx train` runs

# A resumed run may differ from its checkpoint in these, and in nothing else: none of them changes a weight.
# The device is here because a checkpoint is portable; bitwise equality is only promised on one kind of device. Text may
# have moved: the fingerprint of its tokens is compared.
FREE_ON_RESUME = (
    "name",
    "run_dir",
    "data.train",
    "data.validation",
    "data.tokenizer",
    "data.cache_dir",
    "train.device",
    "train.eval_every",
    "train.spectrum_every",
    "train.eval_windows",
    "train.memory_every",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.max_bad_steps",
    "train.export",
)

_PATHS = ("data.train", "data.validation", "data.tokenizer", "data.cache_dir", "model.config", "model.pretrained")


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """Where the model comes from: a Llama shape (sizes below), a config file, or a pretrained checkpoint.

    ``config`` is a Hugging Face ``config.json`` or its directory; ``pretrained`` a checkpoint directory. With
    either of them the sizes are taken from there and must not be given here.
    """

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_key_value_heads: int | None = None  # None: as many as num_heads (no grouped-query attention)
    tie_embeddings: bool = False
    config: str | None = None
    pretrained: str | None = None
    gradient_checkpointing: bool = False  # keep only every decoder layer's input, and compute the layer again
    recompute: Literal["auto", "fast", "mem"] = "auto"  # of rotated layers then; poetx.savings.checkpoint_layers_

    def validate(self) -> None:
        """Raise :class:`UserError` unless exactly one source of the model is described, with sane sizes."""
        sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads")
        positive(self, "model", *sizes, "num_key_value_heads")
        given = [name for name in (*sizes, "num_key_value_heads") if getattr(self, name) is not None]
        if self.config and self.pretrained:
            raise UserError("model.config and model.pretrained are both set; give one of them")
        if self.config or self.pretrained:
            source = "model.config" if self.config else "model.pretrained"
            if given or self.tie_embeddings:
                extra = given[0] if given else "tie_embeddings"
                raise UserError(f"model.{extra} is set although {source} decides it; remove one of the two")
            return
        missing = [name for name in sizes if getattr(self, name) is None]
        if missing:
            raise UserError(
                f"model.{missing[0]} is missing; give {', '.join(sizes)}, or model.config, or model.pretrained"
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


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Text and tokenizer. ``train``: "builtin", a text file, a directory of text files, or JSONL with ``text``."""

    train: str | None = None
    validation: str | None = None  # same kinds as train; None: hold out validation_fraction of the documents
    validation_fraction: float = 0.01
    tokenizer: str | None = None  # existing tokenizer (directory or tokenizer.json); None: train one
    vocab_size: int = 32000  # of a tokenizer trained here
    end_of_text: str | None = None  # token between documents; None: "<|endoftext|>" or the tokenizer's own
    seq_len: int = 256
    cache_dir: str | None = None  # where tokenized data is kept; None: beside the run directory

    def validate(self) -> None:
        """Raise :class:`UserError` on missing or impossible values."""
        if not self.train:
            raise UserError(
                "data.train is missing; give it on the command line: data.train=PATH "
                '(a text file, a directory of text files, JSONL with a "text" field, or builtin)'
            )
        positive(self, "data", "seq_len", "vocab_size")
        if self.tokenizer is None and self.vocab_size < 300:
            raise UserError(f"data.vocab_size={self.vocab_size} is too small; bytes alone take 256, use 300 or more")
        if self.validation is None and not 0 < self.validation_fraction < 1:
            raise UserError(f"data.validation_fraction={self.validation_fraction} must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class PoetRecipe:
    """The fields of :class:`poetx.PoetConfig`, flat, and ``merge_every`` (steps; None: only at export).

    With ``method: single-step``, which folds at every step, ``merge_every`` is None.
    """

    merge_every: int | None = 200
    config: PoetConfig = field(default_factory=PoetConfig)

    def to_dict(self) -> dict[str, Any]:
        """As written in YAML: ``merge_every`` beside the config's own keys."""
        return {"merge_every": self.merge_every, **self.config.to_dict()}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, path: str) -> PoetRecipe:
        """Read the flat form; ``path`` is the dotted place for error messages."""
        hints = {"merge_every": int | None, **typing.get_type_hints(PoetConfig)}
        del hints["weight_residual"]  # the former name, mapped already
        values = renamed(values)
        check_keys(values, list(hints), path=path)
        settings = {key: coerce(value, hints[key], path=join(path, key)) for key, value in values.items()}
        single_step = settings.get("method") == "single-step"
        merge_every = settings.pop("merge_every", None if single_step else 200)
        if single_step and merge_every is not None:
            raise UserError(
                f"{path}.merge_every={merge_every}: {path}.method=single-step folds at every step; set null"
            )
        try:
            return cls(merge_every=merge_every, config=PoetConfig(**settings))
        except UserError as error:
            raise UserError(f"{path}.{error}") from None


@dataclass(frozen=True, kw_only=True)
class LoraRecipe:
    """Adapters by peft in place of ``poet``; the model itself stays as it is."""

    rank: int = 16
    alpha: float | None = None  # what the product of the two is scaled by, times the rank; None: twice the rank

    def validate(self) -> None:
        """Raise :class:`UserError` on values peft does not take."""
        positive(self, "lora", "rank", "alpha")


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """Optimizer, its learning rates and gradient clipping. Defaults: method.md section 6."""

    name: Literal["adamw", "sgd", "adafactor", "smmf", "hfac", "muon"] = "adamw"
    base: Literal["adamw", "sgd", "adafactor", "smmf", "hfac"] | None = None  # for all but rotations; None: name
    state_dtype: Literal["auto", "same", "float32", "bfloat16", "int8"] = "auto"  # AdamW's; optim.build_optimizer
    release_gradients: bool = False  # update embeddings and head inside backward; needs clip null and one micro-batch
    lr: float = 1e-3  # of everything that is not a rotation
    poet_lr: float = 2.5e-4  # of the rotations
    muon_lr: float | None = None  # of what Muon steps; None: lr
    angle: float = 0.012  # of the rotations with poet.method=single-step instead: radians a step
    norm_growth: float = 0.0  # of single-step: ‖W‖² grows by so many times its first value over all train.steps
    weight_decay: float = 0.0  # never applied to rotations
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    poet_betas: tuple[float, float] = (0.9, 0.999)
    poet_eps: float = 1e-6
    momentum: float = 0.0  # sgd only
    clip: float | None = 0.1  # global gradient norm; null or 0: off
    clip_ramp_start: float = 0.1  # after a merge the clip value climbs from this fraction of itself ...
    clip_ramp_steps: int = 10  # ... to itself in this many steps; 0: no ramp
    clip_ramp_until: int = 2000  # ... for merges within the first so many steps
    warmup_steps: int = 0
    min_lr_ratio: float = 0.01  # the cosine ends at this fraction of the peak

    def validate(self) -> None:
        """Raise :class:`UserError` on values no optimizer accepts."""
        positive(self, "optimizer", "lr", "poet_lr", "muon_lr", "eps", "poet_eps")
        not_negative(
            self,
            "optimizer",
            "weight_decay",
            "momentum",
            "clip",
            "clip_ramp_steps",
            "clip_ramp_until",
            "warmup_steps",
        )
        if self.state_dtype != "auto" and not {"adamw", "muon"} & {self.name, self.base}:
            raise UserError(
                f"optimizer.state_dtype={self.state_dtype} is AdamW's; with optimizer.name={self.name} leave it out"
            )
        if not 0 < self.angle < 0.5:
            raise UserError(f"optimizer.angle={self.angle}: radians a step, between 0 and 0.5 (0.012 is usual)")
        if self.release_gradients and self.clip:
            raise UserError(
                f"optimizer.release_gradients with optimizer.clip={self.clip:g}: the norm over all gradients is not "
                "known while some are released during backward; set optimizer.clip=null"
            )
        for name in ("betas", "poet_betas"):
            if not all(0 <= beta < 1 for beta in getattr(self, name)):
                raise UserError(f"optimizer.{name}={list(getattr(self, name))} must lie in [0, 1)")
        for name in ("min_lr_ratio", "clip_ramp_start"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """Length, batch, precision and cadence of the run."""

    steps: int = 1000
    batch_size: int = 32  # sequences in one optimizer step
    micro_batch_size: int | None = None  # sequences in one forward; None: batch_size
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on cuda, else float32
    autocast: bool = False  # compute in bfloat16 while weights and optimizer state stay in dtype (auto: float32)
    compile: bool = False
    chunked_loss: bool = False  # cross entropy a piece of the vocabulary at a time: the logits never exist
    deterministic: bool = False  # refuse operations that are not (slower on a GPU; the CPU always is)
    eval_every: int = 200
    eval_windows: int = 64  # validation windows, spread evenly over the set
    spectrum_every: int | None = None  # steps between measurements of every rotated layer's singular values
    memory_every: int | None = None  # steps between measurements of memory by phase; slow on the CPU, first step too
    log_every: int = 10  # steps between lines of plain progress; metrics.jsonl has every step
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    max_bad_steps: int = 5  # this many non-finite steps in a row stop the run
    export: bool = True  # write run_dir/export at the end

    @property
    def micro_batch(self) -> int:
        """Sequences in one forward pass."""
        return self.micro_batch_size or self.batch_size

    def validate(self) -> None:
        """Raise :class:`UserError` on impossible lengths and unsupported precisions."""
        positive(
            self,
            "train",
            *("steps", "batch_size", "micro_batch_size", "eval_every", "eval_windows", "log_every"),
            *("checkpoint_every", "keep_checkpoints", "max_bad_steps", "spectrum_every", "memory_every"),
        )
        not_negative(self, "train", "seed")
        if self.batch_size % self.micro_batch:
            raise UserError(
                f"train.micro_batch_size={self.micro_batch} does not divide train.batch_size={self.batch_size}"
            )
        if self.seed >= 1 << 63:
            raise UserError(f"train.seed={self.seed}: must be below 2**63")
        if self.autocast and self.dtype == "bfloat16":
            raise UserError("train.autocast with train.dtype=bfloat16 has no effect; leave one of them out")
        if self.dtype == "float16":
            raise UserError("train.dtype=float16 needs loss scaling, which poetx does not do; use bfloat16")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. ``poet: null`` trains the plain dense model with the same optimizer: the baseline."""

    name: str = "run"
    run_dir: str | None = None  # None: runs/<name>
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    poet: PoetRecipe | None = field(default_factory=PoetRecipe)
    lora: LoraRecipe | None = None
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)

    @property
    def directory(self) -> Path:
        """Where this run is written."""
        return Path(self.run_dir) if self.run_dir else Path("runs") / self.name

    @property
    def cache_dir(self) -> Path:
        """Where tokenized data is kept: shared by the runs that lie beside each other."""
        return Path(self.data.cache_dir) if self.data.cache_dir else self.directory.parent

    def validate(self) -> None:
        """Raise :class:`UserError` for values that cannot work, before anything is written or computed."""
        if not self.name.strip():
            raise UserError("name is empty")
        for section in (self.model, self.data, self.optimizer, self.train):
            section.validate()
        if not 0 <= (growth := self.optimizer.norm_growth) < self.train.steps:
            raise UserError(f"optimizer.norm_growth={growth:g}: from 0 to less than train.steps={self.train.steps}")
        if self.poet is not None and self.poet.merge_every is not None and self.poet.merge_every <= 0:
            raise UserError(f"poet.merge_every={self.poet.merge_every} must be positive, or null for never")
        if self.lora is not None:
            self.lora.validate()
            if self.poet is not None:
                raise UserError("lora and poet are both set; set one of them to null")
        if self.optimizer.name == "muon" and (self.poet is not None or self.lora is not None):
            raise UserError("optimizer.name=muon trains dense matrices; use it with poet=null and lora=null")
        if self.poet is None and self.optimizer.base is not None:
            raise UserError(
                f"optimizer.base={self.optimizer.base} is for what rotations leave, and poet=null has none; use "
                f"optimizer.name={self.optimizer.base}"
            )
        if self.model.pretrained and self.poet is not None and (config := self.poet.config).init != "keep":
            also = "".join(f" poet.{s}=1" for s in ("init_scale", "residual_scale") if getattr(config, s) != 1)
            raise UserError(
                f"poet.init={config.init} would destroy the weights of model.pretrained={self.model.pretrained}; "
                f"use poet.init=keep{also}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts and lists, as written to ``recipe.yaml``."""
        sections = {
            key: plain(dataclasses.asdict(getattr(self, key))) for key in ("model", "data", "optimizer", "train")
        }
        poet = None if self.poet is None else plain(self.poet.to_dict())
        return {
            "name": self.name,
            "run_dir": self.run_dir,
            "model": sections["model"],
            "data": sections["data"],
            "poet": poet,
            "lora": None if self.lora is None else dataclasses.asdict(self.lora),
            "optimizer": sections["optimizer"],
            "train": sections["train"],
        }

    def to_yaml(self) -> str:
        """The recipe as YAML that :func:`load_recipe` reads back to an equal recipe."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Build a recipe from nested dicts. Raises :class:`UserError` on unknown keys and wrong types."""
        return build(cls, values, path="")


def builtin_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPE_DIR.glob("*.yaml"))


def load_recipe(source: str | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe ``source`` (built-in name, path, or run directory), apply ``key=value`` overrides, check.

    Raises:
        UserError: on anything wrong, with the full dotted path of the key.
    """
    import yaml

    path = recipe_path(source or DEMOS[0])
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values")
    values.setdefault("name", path.stem)
    if source is not None and Path(source).is_dir() and source not in builtin_recipes():
        values["run_dir"] = source  # where the run is now, not where it was when it started
    if "method" in values:
        put_method(values, values.pop("method"))
    for override in overrides:
        if override.partition("=")[0].strip() == "method":
            put_method(values, override.partition("=")[2].strip())
    for override in overrides:
        if override.partition("=")[0].strip() != "method":
            apply_override(values, override)
    _make_absolute(values)
    _share_seed(values)
    recipe = Recipe.from_dict(values)
    recipe.validate()
    return recipe


def with_method(recipe: Recipe, name: str) -> Recipe:
    """``recipe`` trained by the method ``name`` of :data:`poetx.method_names.METHODS`, all else as it was.

    Keys that the method does not have are dropped. Raises :class:`UserError` where there is no such method.
    """
    values = recipe.to_dict()
    put_method(values, name)
    changed = Recipe.from_dict(values)
    changed.validate()
    return changed


def recipe_path(source: str) -> Path:
    """The YAML file meant by a built-in name, a path, or a run directory."""
    if source in builtin_recipes():
        return RECIPE_DIR / f"{source}.yaml"
    path = Path(source)
    if path.is_dir():
        path = path / "recipe.yaml"
        if not path.is_file():
            raise UserError(f"{source}: a directory without recipe.yaml is not a run")
        return path
    if not path.is_file():
        known = ", ".join(builtin_recipes())
        raise UserError(f"{source}: no such recipe{nearest(source, builtin_recipes())} (built in: {known}; or a path)")
    return path


def differing_keys(old: Recipe, new: Recipe) -> list[str]:
    """Dotted keys in which two recipes train differently, cadence and places (:data:`FREE_ON_RESUME`) left out."""
    old_flat, new_flat = flatten(old.to_dict()), flatten(new.to_dict())
    keys = [*old_flat, *(key for key in new_flat if key not in old_flat)]
    return [key for key in keys if key not in FREE_ON_RESUME and old_flat.get(key) != new_flat.get(key)]


def _make_absolute(values: dict[str, Any]) -> None:
    """Paths as they are meant here and now, so that a run can be resumed from another directory."""
    if isinstance(values.get("run_dir"), str):
        values["run_dir"] = os.path.expanduser(values["run_dir"])  # noqa: PTH111
    for key in _PATHS:
        section, _, name = key.partition(".")
        part = values.get(section)
        if isinstance(part, dict) and isinstance(part.get(name), str) and part[name] != "builtin":
            # os.path leaves a "~nobody" as it is, where pathlib raises RuntimeError.
            part[name] = os.path.abspath(os.path.expanduser(part[name]))  # noqa: PTH100, PTH111


def _share_seed(values: dict[str, Any]) -> None:
    """``train.seed`` is also the seed of permutations and fresh converted weights, unless ``poet.seed`` is given."""
    train, poet = values.get("train"), values.setdefault("poet", {})
    if isinstance(train, dict) and "seed" in train and isinstance(poet, dict):
        poet.setdefault("seed", train["seed"])
