"""One recipe by several methods, with the settings that some of them have."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from poetx.errors import UserError
from poetx.recipe.former import modern_override
from poetx.recipe.loading import Recipe, _pairs, _parse, _shown, _split_key, load_recipe, with_method
from poetx.recipe.sections import belongs
from poetx.recipe.shorthands import METHODS

logger = logging.getLogger(__name__)


def load_methods(source: str, overrides: Sequence[str], methods: Sequence[str]) -> dict[str, Recipe]:
    """``source`` by each of ``methods``; what an override has no effect for is logged, refused where that is all.

    Raises:
        UserError: as :func:`load_recipe`, or an override that none of the methods has a use for.
    """
    if any(text.partition("=")[0].strip() == "method" for text in overrides):
        raise UserError("--methods and method= are both given; --methods alone says which")
    pairs = {t: [modern_override(*pair) for pair in _pairs(*_parse(t))] for t in overrides}
    own = {t: of for t, of in pairs.items() if all(belongs(*_split_key(key)) for key, _ in of)}
    plain = load_recipe(source, [t for t in overrides if t not in own], text=False)
    recipes = {name: with_method(plain, name) for name in methods}
    for text, settings in own.items():
        idle = []
        for name, recipe in recipes.items():
            fixed = {key for key, value in METHODS[name].items() if value != "auto"}
            parts = {key: getattr(recipe, _split_key(key)[0]) for key, _ in settings}
            if all(key not in fixed and _split_key(key)[1] in type(part).model_fields for key, part in parts.items()
                   if part is not None) and None not in parts.values():  # fmt: skip
                recipes[name] = recipe.with_keys(dict(settings))
            else:
                idle.append(name)
        if len(idle) == len(recipes):
            raise UserError(f"{_shown(text)}: has no effect with any of {', '.join(methods)}; leave it out")
        if idle:
            logger.warning("%s: has no effect with %s", _shown(text), ", ".join(idle))
    return recipes
