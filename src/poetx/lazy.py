"""Names that are imported when first used, so that ``import poetx`` and ``poetx --help`` do not wait for torch."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    module: str, homes: Mapping[str, tuple[str, ...]], *, modules: tuple[str, ...] = ()
) -> Callable[[str], Any]:
    """The ``__getattr__`` of ``module``: each name of ``homes`` (full module name → names) from where it lives.

    Args:
        modules: modules inside it, which are found without an import of their own, too.
    """
    home = {name: place for place, names in homes.items() for name in names}

    def look_up(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f"{module}.{name}")
        if name not in home:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home[name]), name)
        setattr(sys.modules[module], name, value)
        return value

    return look_up


def moved_names(module: str, homes: Mapping[str, tuple[str, ...]]) -> Callable[[str], Any]:
    """As :func:`lazy_names`, for names that have moved: each warns once where it is now."""
    look_up = lazy_names(module, homes)
    home = {name: place for place, names in homes.items() for name in names}

    def look_up_and_warn(name: str) -> Any:
        value = look_up(name)
        warnings.warn(
            f"{module}.{name} has moved to {home[name]}.{name} and goes from here with the next release",
            DeprecationWarning,
            stacklevel=3,
        )
        return value

    return look_up_and_warn
