"""One recipe by several methods, with the settings that some of them have."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from poetx.errors import UserError
from poetx.recipe.idle import idle
from poetx.recipe.loading import Recipe, parsed, recipe_with, shown, split_key, with_method
from poetx.recipe.sections import belongs
from poetx.recipe.shorthands import METHODS

logger = logging.getLogger(__name__)


def load_methods(source: str, overrides: Sequence[str], methods: Sequence[str]) -> dict[str, Recipe]:
    """``source`` by each of ``methods``; what an override has no effect for is logged, refused where that is all.

    Raises:
        UserError: as :func:`poetx.recipe.load_recipe`, or an override that none of the methods has a use for.
    """
    pairs = parsed(overrides)
    if "method" in dict(pairs):
        raise UserError("--methods and method= are both given; --methods alone says which")
    own = [key for key, _ in pairs if key == "model.recompute" or key.startswith("lora") or belongs(*split_key(key))]
    plain = recipe_with(source, [pair for pair in pairs if pair[0] not in own], text=False)
    recipes = {name: with_method(plain, name) for name in methods}
    for key, value in pairs:
        having = [name for name, recipe in recipes.items() if _has_effect(recipe, name, key)]
        if not having:
            raise UserError(f"{key}={shown(value)}: has no effect with any of {', '.join(methods)}; leave it out")
        if without := ", ".join(name for name in recipes if name not in having):
            logger.warning("%s=%s: has no effect with %s", key, shown(value), without)
        if key in own:
            recipes |= {name: recipes[name].with_keys({key: value}) for name in having}
    return recipes


def _has_effect(recipe: Recipe, method: str, key: str) -> bool:
    """Whether ``recipe``, by ``method``, reads ``key``, and the method does not settle it."""
    section, name = split_key(key)
    fixed = [own for own, value in METHODS[method].items() if value not in ("auto", {})]
    if any(own in (key, section) or own.startswith(f"{key}.") for own in fixed):
        return False
    known = (
        type(getattr(recipe, section)).model_fields if section in ("poet", "lora", "optimizer") and name else (name,)
    )
    return name in known and not idle(recipe.to_dict(), key)
