"""The recipe: everything that defines a training run, read from YAML into frozen, strict sections.

A recipe is found by a built-in name, by the path of a YAML file, or by the directory of an earlier run.
Overrides are ``a.b=value`` strings whose values are read as YAML. A misspelt key is an error that names the nearest
right one, and so is a key that nothing in this run would read: no setting is ever ignored in silence.
"""

from __future__ import annotations

import logging
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, model_validator

from poetx.errors import UserError, nearest, one_line
from poetx.optim.settings import MATRIX_OPTIMIZERS
from poetx.recipe.former import drop_without_effect, modern_override, modernize, without_effect
from poetx.recipe.idle import idle
from poetx.recipe.places import PATHS, builtin_recipes, kept_recipe, make_absolute, recipe_path
from poetx.recipe.sections import (
    SIZES,
    DataRecipe,
    LoraRecipe,
    MergedRecipe,
    ModelRecipe,
    OptimizerRecipe,
    PoetRecipe,
    Section,
    SingleStepKeys,
    Text,
    TrainRecipe,
    belongs,
    every_key,
    section_types,
)
from poetx.recipe.shorthands import SIZED_RECIPES, check_method, put_method, put_shape, settings_of
from poetx.recipe.values import finite, shown

logger = logging.getLogger(__name__)

DEMOS = ("demo-single-step", "demo")  # the first is what `poetx train` runs

_SECTIONS = ("model", "data", "poet", "lora", "optimizer", "train")
_OF_THE_HOST = (*("train.compile", "train.memory_every", "model.offload", "optimizer.release_gradients", "data.pack"),)
# All of them only in what to_yaml() wrote, of any version.
_WRITTEN_OUT = {"run_dir", "model", "data", "poet", "optimizer", "train"}
_WRITTEN_OUT_TRAIN = {"seed", "steps", "batch_size", "device", "dtype", "log_every", "eval_every", "eval_windows"}


class Recipe(Section):
    """One training run. ``poet`` and ``lora`` both null: the plain dense model, a baseline.

    ``method`` at the top level of a file, or as an override, is one word for what a method sets
    (:data:`poetx.recipe.shorthands.METHODS`).
    """

    name: Text = "run"
    run_dir: Text | None = None  # None: runs/<name>
    #: What torchrun's processes hold beside their part of each batch: the whole model (ddp), or a part of it (fsdp).
    parallel: Literal["ddp", "fsdp"] = "ddp"
    model: ModelRecipe
    data: DataRecipe
    poet: PoetRecipe | None = None
    lora: LoraRecipe | None = None
    optimizer: OptimizerRecipe
    train: TrainRecipe

    @property
    def directory(self) -> Path:
        """Where this run is written."""
        return Path(self.run_dir) if self.run_dir else Path("runs") / self.name

    @property
    def cache_dir(self) -> Path:
        """Where tokenized data is kept: shared by the runs that lie beside each other."""
        return Path(self.data.cache_dir) if self.data.cache_dir else self.directory.parent

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if not self.name.strip():
            raise UserError("name is empty")
        if self.lora is not None and self.poet is not None:
            raise UserError("lora and poet are both set; set one of them to null")
        name = self.optimizer.name
        ends = name == "scale" and self.poet is not None and self.poet.method == "single-step"
        if name in MATRIX_OPTIMIZERS and (self.poet is not None or self.lora is not None) and not ends:
            raise UserError(f"optimizer.name={name} trains dense matrices; use it with poet=null and lora=null")
        if self.poet is None and self.model.recompute != "auto":
            raise UserError(f"model.recompute={self.model.recompute}: is for rotated layers; leave it out")
        kept = self.poet is None or self.poet.config.init == "keep"
        if self.model.residual_scale != 1 and (self.model.pretrained or not kept):
            raise UserError(
                f"model.residual_scale={self.model.residual_scale:g}: is for fresh weights that stay as they are made; "
                + ("leave it out" if self.model.pretrained else "use poet.residual_scale")
            )
        if self.model.streams_weights and self.poet is None:
            raise UserError(
                f"model.offload={self.model.offload}: is for rotated layers; leave it out, or use activations"
            )
        if self.model.offload_dir and self.poet is not None and self.poet.config.method == "single-step":
            raise UserError(
                f"model.offload_dir={self.model.offload_dir}: every step of method=single-step would write all of its "
                "weights there; leave it out, or use method=mem"
            )
        if self.model.offloads_activations and self.train.compile:
            raise UserError(f"model.offload={self.model.offload}: not with train.compile=true; leave one of them out")
        if self.train.cuda_graphs and (unfit := self._needs_the_host()):
            raise UserError(f"train.cuda_graphs: not with {unfit}, which needs the host; leave one of them out")
        growth = self.optimizer.norm_growth if isinstance(self.optimizer, SingleStepKeys) else 0
        if growth >= self.train.steps:
            raise UserError(f"optimizer.norm_growth={growth:g}: must be less than train.steps={self.train.steps}")
        if self.model.pretrained and self.poet is not None and (config := self.poet.config).init != "keep":
            also = "".join(f" poet.{s}=1" for s in ("init_scale", "residual_scale") if getattr(config, s) != 1)
            raise UserError(
                f"poet.init={config.init} would destroy the weights of model.pretrained={self.model.pretrained}; "
                f"use poet.init=keep{also}"
            )
        return self

    def _needs_the_host(self) -> str:
        """The first setting for which the host acts inside forward or backward; empty: none."""
        values = dict(flat(self.to_dict()))
        if self.poet is not None and self.poet.config.rounds_momenta:
            return "poet.rotation_dtype=bfloat16 of method=single-step"
        return next((f"{key}={str(values[key]).lower()}" for key in _OF_THE_HOST if values[key]), "")

    @property
    def merge_every(self) -> int | None:
        """Steps between merges; None: only at export, or a method that does not merge."""
        return self.poet.merge_every if isinstance(self.poet, MergedRecipe) else None

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts and lists, as written to ``recipe.yaml``."""
        sections = {name: getattr(self, name) for name in _SECTIONS}
        written = {name: None if part is None else _plain(part.model_dump()) for name, part in sections.items()}
        return {"name": self.name, "run_dir": self.run_dir, "parallel": self.parallel} | written

    def to_yaml(self) -> str:
        """The recipe as YAML that :func:`load_recipe` reads back to an equal recipe."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Build a recipe from nested dicts. Raises :class:`UserError` on unknown keys and wrong types."""
        return _build(values)

    def with_keys(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with these dotted keys changed, checked like any recipe: ``{"train.dtype": "float32"}``."""
        values = self.to_dict()
        for key, value in changes.items():
            _set(values, key, value)
        return _build(values)


def load_recipe(source: str | None = None, overrides: Sequence[str] = (), *, text: bool = True) -> Recipe:
    """Read the recipe ``source`` (built-in name, path, or run directory), apply ``key=value`` overrides, check.

    An override of a method, an optimizer or the model's source drops what the file sets for the one before.

    Args:
        text: require ``data.train``, which training needs and planning does not.

    Raises:
        UserError: on anything wrong, with the full dotted path of the key.
    """
    return recipe_with(source or DEMOS[0], parsed(overrides), text=text)


def load_data(overrides: Sequence[str]) -> DataRecipe:
    """The ``data`` section by itself, from ``data.…=value`` overrides. Raises :class:`UserError` for any other key."""
    values: dict[str, Any] = {"data": {}}
    for key, value in parsed(overrides):
        if split_key(key)[0] != "data" or split_key(key)[1] not in DataRecipe.model_fields:
            raise _unknown(key, [f"data.{name}" for name in DataRecipe.model_fields])
        if key == "data.cache_dir" or (key == "data.train" and "train" in values["data"]):
            raise UserError(f"{key}={shown(value)}: poetx data has SRC and DIR for that; leave it out")
        _set(values, key, value)
    make_absolute(values)
    _refuse_idle(values, dict(flat(values)))
    return _checked(DataRecipe, values["data"], "data")


def parsed(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """Today's dotted keys and values of ``key=value`` overrides, a section's keys one by one.

    Raises:
        UserError: what is no override; an old name and a new one of the same key, with different values.
    """
    pairs: dict[str, tuple[str, Any]] = {}
    given: list[tuple[str, Any]] = []
    for written, value in (pair for override in overrides for pair in _pairs(*_parse(override))):
        key, now = modern_override(written, value)
        other, before = pairs.setdefault(key, (written, now))
        if before != now:
            if other != written:
                raise UserError(
                    f"{written}={shown(value)}: {other} is given as well, the same key by another name; give one of "
                    "the two"
                )
            logger.warning("%s is given twice, as %s and %s; the last counts", key, shown(before), shown(now))
        given.append((key, now))
    return given


def recipe_with(source: str, pairs: Sequence[tuple[str, Any]], *, text: bool = True) -> Recipe:
    """:func:`load_recipe` of overrides that are :func:`parsed`."""
    values, of_a_run = _read(source)
    for note in modernize(values, of_a_run=of_a_run):
        logger.warning("%s: %s", source, note)
    if (method := values.get("method")) is not None:
        refuse_contradictions([*flat(values)])
        if any(key == "method" for key, _ in pairs):
            check_method(method)  # another takes its place, with all that it would set
        else:
            put_method(values, method)
    values.pop("method", None)
    for section, key, value in without_effect(values):
        raise _without_effect(values, section, key, value)
    meant = {} if _is_written_out(values) else dict(flat(values))  # where all keys are there, none need be meant
    _refuse_idle(values, meant)
    given: set[str] = set()
    own_rate = any(key == "optimizer.lr" for key, _ in pairs)
    for key, value in pairs:
        if key == "method" and (changed := put_method(values, value, own_rate=own_rate)):
            keys = ", ".join(f"{name}={shown(now)}" for name, now in changed.items())
            logger.warning("method=%s: %s, since the recipe's own values are for rotations", value, keys)
    refuse_contradictions(pairs)
    drop_without_effect(values)
    for key, value in pairs:
        if key != "method":
            _set(values, key, value)
            given.add(key)
    modernize(values, keep=given)
    _drop_other_sources(values, given)
    drop_without_effect(values, keep=given)
    make_absolute(values)
    put_shape(values)
    _share_seed(values)
    recipe = _build(values)
    _refuse_idle(values, {key: value for key, value in pairs if key in given})
    if source not in builtin_recipes():
        for key, value in meant.items():
            if value and key not in given and key in dict(flat(values)) and (reason := idle(values, key)):
                logger.warning("%s: %s=%s has no effect %s", source, key, shown(value), reason)
    if text and not recipe.data.train:
        raise UserError(
            "data.train is missing; give it on the command line: data.train=PATH "
            "(text, JSONL, CSV, Parquet or Arrow, a directory or pattern of files, a name on the Hub, or builtin)"
        )
    return recipe


def _refuse_idle(values: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise for a setting that nothing reads; one that switches a thing off has no effect and is right."""
    for key, value in settings.items():
        if value and (reason := idle(values, key)):
            raise UserError(f"{key}={shown(value)}: has no effect {reason}; leave it out")


def _is_written_out(values: Mapping[str, Any]) -> bool:
    train = values.get("train")
    return values.keys() >= _WRITTEN_OUT and isinstance(train, Mapping) and train.keys() >= _WRITTEN_OUT_TRAIN


def with_method(recipe: Recipe, name: str, *, own_rate: bool = False) -> Recipe:
    """``recipe`` trained by the method ``name`` of :data:`poetx.recipe.shorthands.METHODS`, all else as it was.

    Keys that the method does not have are dropped. Raises :class:`UserError` where there is no such method.
    """
    values = recipe.to_dict()
    put_method(values, name, own_rate=own_rate)
    drop_without_effect(values)
    if values["poet"] is None:
        del values["model"]["recompute"]
    _share_seed(values)
    return _build(values)


# -- reading ----------------------------------------------------------------------------------------------------------


def _read(source: str) -> tuple[dict[str, Any], bool]:
    """The values in the file of ``source``, and whether that is the directory of a run."""
    from poetx.recipe.plain_yaml import read_yaml

    path = recipe_path(source)
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: also not UTF-8, no such date, too long
        raise UserError(f"{path}: not valid YAML: {one_line(error)}{kept_recipe(source)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values{kept_recipe(source)}")
    if source in SIZED_RECIPES:
        values["name"] = source
        values["model"]["shape"] = SIZED_RECIPES[source]
    values.setdefault("name", path.stem)
    of_a_run = source not in builtin_recipes() and Path(source).is_dir()
    if of_a_run:
        values["run_dir"] = source  # where the run is now, not where it was when it started
    return values, of_a_run


def _parse(override: str) -> tuple[str, Any]:
    """Key and value of ``a.b=value``; the value is read as YAML, but a place as it is written, ``#`` and spaces too."""
    from poetx.recipe.plain_yaml import check_given, read_yaml

    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"{override!r}: an override is written key=value, for example train.steps=100")
    try:
        check_given(key, text)
        value = read_yaml(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown(override)}: the value is not valid YAML: {one_line(error)}") from None
    first = text.lstrip()[:1]
    unread = isinstance(value, str) or (value is None and first == "#")
    return key, text if unread and first not in ("'", '"') and key in (*PATHS, "run_dir", "name") else value


def _pairs(key: str, value: Any) -> list[tuple[str, Any]]:
    """A section as an override, ``train={seed: 2}``, as its keys one by one: the others stay as the file has them."""
    if key in _SECTIONS and isinstance(value, dict) and value:
        return [(f"{key}.{name}", item) for name, item in value.items()]
    return [(key, value)]


def split_key(dotted: str) -> tuple[str, str]:
    section, _, key = dotted.partition(".")
    return section, key


def refuse_contradictions(pairs: Sequence[tuple[str, Any]]) -> None:
    """Raise where one override undoes another: a whole section and its keys, or a method and what it is made of.

    Of the same key twice the last counts, as for every program's options; and a section that is null after its keys.
    """
    given: dict[str, Any] = {}
    for key, value in pairs:
        if value is None:
            given = {name: kept for name, kept in given.items() if not name.startswith(f"{key}.")}
        given[key] = value
    name = given.pop("method", None)
    settings = settings_of(name) if isinstance(name, str) else {}
    fixed = {key: value for key, value in settings.items() if value not in ("auto", {})}
    if name == "lora":
        del fixed["optimizer.name"]  # AdamW unless given
    for key, value in given.items():
        section = key.partition(".")[0]
        if section != key and section in given:
            raise UserError(f"{section} and {key} are both given, and one would undo the other; give one of them")
        made = [own for own in fixed if own in (key, section) or own.startswith(f"{key}.")]
        if any(own != key or fixed[own] != value for own in made):
            raise UserError(f"{key}={shown(value)}: method={name} means another {made[0]}; give one of the two")


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = values
    for depth, parent in enumerate(parents):
        child = node.get(parent)
        if child is None:  # absent, or `poet: null` about to get settings again
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"{key}: {'.'.join(parents[: depth + 1])} is a single value, it has no keys")
        node = child
    if value != {} or not isinstance(node.get(last), dict):
        node[last] = value


def _drop_other_sources(values: dict[str, Any], given: set[str]) -> None:
    """Of the file's model, what an override of its source replaces: sizes by a checkpoint, and so on."""
    model = values.get("model")
    if not isinstance(model, dict):
        return
    sources: dict[str, tuple[str, ...]] = {
        "config": ("config",),
        "pretrained": ("pretrained",),
        "shape": ("shape", *SIZES),
    }
    chosen = [name for name in sources if f"model.{name}" in given and model.get(name) is not None]
    if chosen:
        away = {key for name, keys in sources.items() if name != chosen[0] or name == "shape" for key in keys}
        away |= {"tie_embeddings"} if chosen[0] != "shape" else set()
        for key in away - {chosen[0]}:
            if f"model.{key}" not in given:
                model.pop(key, None)


def _share_seed(values: dict[str, Any]) -> None:
    """``train.seed`` is also the seed of permutations and fresh converted weights, unless ``poet.seed`` is given."""
    train, poet = values.get("train"), values.get("poet")
    if "poet" not in values and values.get("lora") is None:
        poet = values["poet"] = {}
    if isinstance(train, dict) and finite(train.get("seed")) is not None and isinstance(poet, dict):
        poet.setdefault("seed", train["seed"])


# -- building, and what is said of mistakes ---------------------------------------------------------------------------


def _build(values: Mapping[str, Any]) -> Recipe:
    if not isinstance(values, Mapping):
        raise UserError(f"recipe: expected keys and values, got {shown(values)}")
    for key in values:
        if key not in Recipe.model_fields:
            section, _, name = str(key).partition(".")
            if section in _SECTIONS and name:
                raise UserError(f"{key}: is written in two lines in a file, {section}: and below it {name}: …")
            raise _unknown(str(key), [*Recipe.model_fields, "method"])
    types = section_types(values)
    poet = values.get("poet", None if values.get("lora") is not None else {})
    parts: dict[str, Any] = {key: values[key] for key in ("name", "run_dir", "parallel") if key in values}
    for name in _SECTIONS:
        part = poet if name == "poet" else values.get(name, None if name == "lora" else {})
        if part is None and name in ("poet", "lora"):
            parts[name] = None
            continue
        if not isinstance(part, Mapping):
            raise UserError(f"{name}: expected keys and values, got {shown(part)}")
        for key, value in part.items():
            if key not in types[name].model_fields:
                raise _without_effect(values, name, str(key), value)
        parts[name] = _checked(types[name], part, name)
    return _checked(Recipe, parts, "")


def _checked(kind: type[Any], values: Mapping[str, Any], section: str) -> Any:
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        raise cause
    key = str(first["loc"][0])
    value = values.get(key)
    dotted, wanted = f"{section}{'.' if section else ''}{key}", _wanted(first, kind, key, value)
    if dotted in (*PATHS, "run_dir") and not isinstance(value, list | dict | str):
        wanted += f"; for a place of that name write {dotted}=./{shown(value)}"
    raise UserError(f"{dotted}={shown(value)}: {wanted}")


def _wanted(error: Any, kind: type[Section], key: str, value: Any) -> str:
    """What a value must be instead, in words."""
    if error["type"] == "refused":
        return error["ctx"]["message"]
    if error["type"] == "literal_error":
        choices = [str(choice) for choice in _choices(kind.model_fields[key].annotation)]
        hint = "; write it without the quotes" if value in choices else nearest(shown(value), choices)
        return f"must be one of {', '.join(choices)}{hint}"
    if error["type"] in ("missing", "too_long"):
        return "must be a list of 2 values"
    return "must be text" if error["type"] == "string_type" else str(error["msg"])


def _choices(annotation: Any) -> list[Any]:
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return list(arguments)
    return [choice for argument in arguments for choice in _choices(argument)]


def _without_effect(values: Mapping[str, Any], section: str, key: str, value: Any) -> UserError:
    """A key that the chosen type of the section lacks: it belongs to another type, or to none."""
    owner = belongs(section, key)
    if not owner:
        return _unknown(f"{section}.{key}", list(section_types(values)[section].model_fields))
    poet, optimizer = values.get("poet", {}), values.get("optimizer") or {}
    method = f"poet.method={poet.get('method', 'poet-x')}" if isinstance(poet, Mapping) else "poet=null"
    here = f"{method}, optimizer.name={optimizer.get('name', 'adamw')}"
    return UserError(f"{section}.{key}={shown(value)}: is {owner} and has no effect with {here}; leave it out")


def _unknown(dotted: str, known: Sequence[str]) -> UserError:
    section, _, key = dotted.rpartition(".")
    elsewhere = [f"{name}.{key}" for name, keys in every_key().items() if key in keys and name != section]
    hint = f"; did you mean {elsewhere[0]!r}?" if elsewhere else nearest(key, known)
    return UserError(f"{shown(dotted)}: unknown key{hint}")


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down, so that YAML stays plain."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and not prefix:
            yield from flat(value, f"{key}.")
        else:
            yield f"{prefix}{key}", value
