"""One recipe by several methods, with the settings that some of them have."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from poetx.errors import UserError, nearest, one_line
from poetx.recipe.former import drop_without_effect
from poetx.recipe.idle import idle
from poetx.recipe.loading import Recipe, parsed, recipe_with, refuse_contradictions, split_key, with_method
from poetx.recipe.sections import belongs
from poetx.recipe.shorthands import check_method, settings_of
from poetx.recipe.values import shown

logger = logging.getLogger(__name__)


def methods_in(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Methods by label, with settings of their own: of names, and of YAML files that say ``LABEL: {KEY: VALUE, …}``.

    In a file ``method`` names the method where the label does not; ``FILE.yaml:LABEL`` is one entry of it.

    Raises:
        UserError: a file that cannot be read or says something else, a label twice, an unknown method.
    """
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        file, _, only = word.partition(":")
        entries = _entries(file) if Path(file).suffix in (".yaml", ".yml") else {word: {}}
        if only and only not in entries:
            raise UserError(f"--methods {word}: no {only} there{nearest(only, entries)}")
        for label, settings in entries.items() if not only else [(only, entries[only])]:
            if label in found:
                raise UserError(f"--methods: {label} is there twice; give it another label in the file")
            check_method(settings.get("method", label))
            found[label] = settings
    return found


def _entries(path: str) -> dict[str, dict[str, Any]]:
    from poetx.recipe.plain_yaml import read_yaml

    try:
        entries = read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--methods {path}: {one_line(error)}") from None
    if not isinstance(entries, dict):
        raise UserError(f"--methods {path}: must say LABEL: {{KEY: VALUE, …}} for every method")
    for label, settings in entries.items():
        if not (isinstance(label, str) and re.fullmatch(r"\w[\w.-]*", label)):
            raise UserError(f"{path}: {label}: a label is text of letters, digits, -, _ and dots; quote a number")
        if label.endswith((".html", ".json", ".jsonl", ".md")):
            raise UserError(f"{path}: {label}: would be a file that compare writes; give it another label")
        if not isinstance(settings or {}, Mapping):
            raise UserError(f"{path}: {label}: must be LABEL: {{KEY: VALUE, …}}")
        for key in settings or {}:
            if _is_of_all(str(key)):
                raise UserError(
                    f"{path}: {label}: {key}: all methods have the same model, text, tokens and seeds; give it beside "
                    "the recipe, for all of them"
                )
    return {label: dict(settings or {}) for label, settings in entries.items()}


#: Keys of the model and of training that a method may have for itself; all of those of the other sections but data.
_OF_MODELS = ("residual_scale", "gradient_checkpointing", "recompute", "offload", "offload_dir")
_OF_RUNS = ("steps", "batch_size", "seed", "device", "eval_every", "eval_windows", "log_every", "sample_tokens")


def _is_of_all(key: str) -> bool:
    """Whether methods that differ in ``key`` would not be compared on the same model, text, tokens and seeds."""
    section, _, name = key.partition(".")
    if section == "train":
        return name in _OF_RUNS
    return section not in ("method", "poet", "lora", "optimizer") and (section != "model" or name not in _OF_MODELS)


def load_methods(
    source: str, overrides: Sequence[str], methods: Sequence[str] | Mapping[str, Mapping[str, Any]]
) -> dict[str, Recipe]:
    """``source`` by each of ``methods``; what an override has no effect for is logged, refused where that is all.

    Args:
        methods: names, or what :func:`methods_in` gives: a label's own settings come last.

    Raises:
        UserError: as :func:`poetx.recipe.load_recipe`, or an override that none of the methods has a use for.
    """
    own_settings = methods if isinstance(methods, Mapping) else {name: {} for name in methods}
    word = {label: settings.get("method", label) for label, settings in own_settings.items()}
    pairs = parsed(overrides)
    if "method" in dict(pairs):
        raise UserError("--methods and method= are both given; --methods alone says which")
    own = [key for key, _ in pairs if key == "model.recompute" or key.startswith("lora") or belongs(*split_key(key))]
    plain = recipe_with(source, [pair for pair in pairs if pair[0] not in own], text=False)
    rated = [label for label, settings in own_settings.items() if "optimizer.lr" in {*dict(pairs), *settings}]
    recipes = {label: with_method(plain, word[label], own_rate=label in rated) for label in own_settings}
    for key, value in pairs:
        having = [name for name, recipe in recipes.items() if _has_effect(recipe, word[name], key)]
        if not having:
            raise UserError(f"{key}={shown(value)}: has no effect with any of {', '.join(methods)}; leave it out")
        if without := ", ".join(name for name in recipes if name not in having):
            logger.warning("%s=%s: has no effect with %s", key, shown(value), without)
        if key in own:
            recipes |= {name: recipes[name].with_keys({key: value}) for name in having}
    for label, settings in own_settings.items():
        keys = {key: value for key, value in settings.items() if key != "method"}
        try:
            refuse_contradictions([("method", word[label]), *keys.items()])
        except UserError as error:
            raise UserError(f"--methods: {label}: {error}") from None
        recipes[label] = _with_settings(recipes[label], keys)
        for key, value in keys.items():
            if value and (reason := idle(recipes[label].to_dict(), key)):
                raise UserError(f"--methods: {label}: {key}={shown(value)}: has no effect {reason}; leave it out")
    return recipes


def _with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """``recipe`` with these dotted keys changed; what the optimizer or method before had alone is dropped."""
    values = recipe.to_dict()
    for key, value in settings.items():
        section, name = split_key(key)
        if not name or not isinstance(values.get(section), dict):
            raise UserError(f"--methods: {key}: must be the key of a section that the method has, such as optimizer.lr")
        values[section][name] = value
    drop_without_effect(values, keep=settings)
    return Recipe.from_dict(values)


def _has_effect(recipe: Recipe, method: str, key: str) -> bool:
    """Whether ``recipe``, by ``method``, reads ``key``, and the method does not settle it."""
    section, name = split_key(key)
    fixed = [own for own, value in settings_of(method).items() if value not in ("auto", {})]
    if any(own in (key, section) or own.startswith(f"{key}.") for own in fixed):
        return False
    known = (
        type(getattr(recipe, section)).model_fields if section in ("poet", "lora", "optimizer") and name else (name,)
    )
    return name in known and not idle(recipe.to_dict(), key)
