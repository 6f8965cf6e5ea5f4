"""The recipe of a run: ``sections`` say what each key means, ``loading`` reads and checks.

``shorthands`` are one word for several keys, ``former`` maps old keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from poetx.lazy import lazy_names

if TYPE_CHECKING:
    from poetx.recipe.loading import (
        DEMOS,
        RECIPE_DIR,
        Recipe,
        builtin_recipes,
        load_recipe,
        with_method,
    )
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

_RESUMING = ("differing_keys", "settled_as")
_LOADING = tuple(name for name in __all__ if name not in _RESUMING)
__getattr__ = lazy_names(__name__, {"poetx.recipe.loading": _LOADING, "poetx.recipe.resuming": _RESUMING})
