"""Strict reading of nested dataclasses from YAML values: unknown keys and wrong types are one-line errors."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from poetx.errors import UserError, nearest


def build(cls: type, values: Any, *, path: str) -> Any:
    """One dataclass from a mapping, recursively, with strict keys and types."""
    if not isinstance(values, Mapping):
        raise UserError(f"{path or 'recipe'}: expected keys and values, got {values!r}")
    if hasattr(cls, "from_mapping"):
        return cls.from_mapping(values, path=path)
    hints = typing.get_type_hints(cls)
    check_keys(values, list(hints), path=path)
    return cls(**{key: coerce(value, hints[key], path=join(path, key)) for key, value in values.items()})


def check_keys(values: Mapping[Any, Any], known: Sequence[str], *, path: str) -> None:
    for key in values:
        if key not in known:
            raise UserError(f"{join(path, str(key))}: unknown key{nearest(str(key), known)}")


def coerce(value: Any, hint: Any, *, path: str) -> Any:
    """``value`` as the type ``hint``, or a one-line error. YAML 1.1 reads ``1e-3`` as text: that is tried too."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, path=path)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, args, path=path)
    if origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
        choices = ", ".join(str(choice) for choice in args)
        raise UserError(f"{path}={value}: must be one of {choices}{nearest(str(value), map(str, args))}")
    if origin is tuple:
        return _coerce_tuple(value, args, path=path)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint in (int, float) and not isinstance(value, bool):
        number = _number(value)
        if number is not None and (hint is float or number == int(number)):
            return hint(number) if not isinstance(number, int) or hint is float else number
    if hint is Any:
        return value
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))
    raise UserError(f"{path}={value!r}: must be {wanted}")


def _coerce_union(value: Any, options: tuple[Any, ...], *, path: str) -> Any:
    if value is None and type(None) in options:
        return None
    # YAML reads clip: off as False; for an optional number that means none.
    if value is False and type(None) in options and bool not in options:
        return None
    real = [option for option in options if option is not type(None)]
    if len(real) == 1:
        return coerce(value, real[0], path=path)
    for option in real:
        try:
            return coerce(value, option, path=path)
        except UserError:
            continue
    raise UserError(f"{path}={value!r}: must be {' or '.join(str(getattr(o, '__name__', o)) for o in real)}")


def _coerce_tuple(value: Any, args: tuple[Any, ...], *, path: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UserError(f"{path}={value!r}: must be a list")
    if args and args[-1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(args) != len(value):
        raise UserError(f"{path}={list(value)}: must be a list of {len(args)} values")
    return tuple(coerce(item, arg, path=path) for item, arg in zip(value, args, strict=True))


def _number(value: Any) -> int | float | None:
    """``value`` as a finite number, or None."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, int):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else None


def positive(section: Any, path: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and value <= 0:
            raise UserError(f"{path}.{name}={value} must be positive")


def not_negative(section: Any, path: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and value < 0:
            raise UserError(f"{path}.{name}={value} must not be negative")


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down, so that YAML stays plain."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in nested ``values``; the value is read as YAML."""
    import yaml

    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"{override!r}: an override is written key=value, for example train.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: the value is not valid YAML: {one_line(error)}") from None
    *parents, last = key.split(".")
    node = values
    for depth, parent in enumerate(parents):
        child = node.get(parent)
        if child is None:  # absent, or `poet: null` about to get settings again
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"{key}: {'.'.join(parents[: depth + 1])} is a single value, it has no keys")
        node = child
    node[last] = value
