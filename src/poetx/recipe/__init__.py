"""The recipe of a run: ``sections`` say what each key means, ``loading`` reads and checks.

``shorthands`` are one word for several keys, ``former`` maps old keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from poetx.lazy import lazy_names

if TYPE_CHECKING:
    from poetx.recipe.loading import (
        DEMOS,
        Recipe,
        load_recipe,
        with_method,
    )
    from poetx.recipe.places import RECIPE_DIR, builtin_recipes
    from poetx.recipe.resuming import differing_keys, settled_as

__all__ = [
    "DEMOS",
    "RECIPE_DIR",
    "Recipe",
    "builtin_recipes",
    "differing_keys",
    "load_recipe",
    "settled_as",
    "with_method",
]

__getattr__ = lazy_names(
    __name__,
    {
        "poetx.recipe.loading": ("DEMOS", "Recipe", "load_recipe", "with_method"),
        "poetx.recipe.places": ("RECIPE_DIR", "builtin_recipes"),
        "poetx.recipe.resuming": ("differing_keys", "settled_as"),
    },
)
