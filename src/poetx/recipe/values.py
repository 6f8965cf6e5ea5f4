"""Types of a recipe's values, which say what a value must be. Numbers may be text: YAML 1.1 reads ``1e-3`` as that."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError


def refuse(message: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{message}", {"message": message})


def shown(value: Any) -> str:
    """A value in an error message: one line, not endless."""
    try:
        plain = (isinstance(value, str) and value.isprintable()) or isinstance(value, datetime.date)
        text = str(value) if plain else repr(value)
    except ValueError:  # a number of more digits than Python writes
        return "(a very long number)"
    return text if len(text) <= 80 else f"{text[:77]}..."


def finite(value: Any) -> int | float | None:
    """``value`` as a finite number, or None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def whole(value: Any) -> int:
    try:
        number = finite(value)
        if number is None or number != int(number):
            raise refuse("must be a whole number")
        if abs(number) >= 1 << 63:
            raise refuse("must be below 2**63")
    except OverflowError:
        raise refuse("must be below 2**63") from None
    return int(number)


def real(value: Any) -> float:
    try:
        if (number := finite(value)) is not None:
            return float(number)
    except OverflowError:
        pass
    raise refuse("must be a number")


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise refuse("must be true or false")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise refuse("must be text")
    if not value.isprintable():
        wrong = next(letter for letter in value if not letter.isprintable())
        raise refuse(f"must be printable text, without {wrong!a}; rename what has it in its name")
    return value


def _off(value: Any) -> Any:
    """YAML reads ``clip: off`` as false; where a number is optional that means none."""
    return None if value is False else value


def _listed(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise refuse("must be a list" + (f", written [{value}]" if isinstance(value, str) and "," in value else ""))
    return tuple(value)


def must(holds: Callable[[Any], bool], message: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if not holds(value):
            raise refuse(message)
        return value

    return AfterValidator(check)


Text = Annotated[str, BeforeValidator(text)]
Flag = Annotated[bool, BeforeValidator(flag)]
MaybeFlag = Annotated[bool | None, BeforeValidator(lambda value: None if value is None else flag(value))]
Whole = Annotated[int, BeforeValidator(whole)]
Real = Annotated[float, BeforeValidator(real)]
_POSITIVE = must(lambda value: value > 0, "must be positive")
_NOT_NEGATIVE = must(lambda value: value >= 0, "must not be negative")
_SHARE = must(lambda value: 0 <= value <= 1, "must lie in [0, 1]")
Count = Annotated[int, BeforeValidator(whole), _POSITIVE]
Size = Annotated[int, BeforeValidator(whole), _NOT_NEGATIVE]
Rate = Annotated[float, BeforeValidator(real), _POSITIVE]
Amount = Annotated[float, BeforeValidator(real), _NOT_NEGATIVE]
Share = Annotated[float, BeforeValidator(real), _SHARE]
Beta = Annotated[float, BeforeValidator(real), must(lambda value: 0 <= value < 1, "must lie in [0, 1)")]
Betas = Annotated[tuple[Beta, Beta], BeforeValidator(_listed)]
MaybeCount = Annotated[Count | None, BeforeValidator(_off)]
MaybeRate = Annotated[Rate | None, BeforeValidator(_off)]
MaybeAmount = Annotated[Amount | None, BeforeValidator(_off)]
Names = Text | tuple[Text, ...]


def _nested(value: Any) -> Any:
    """Settings by pattern, whose own types :class:`poetx.PoetConfig` checks."""
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(v, Mapping) for v in value.values())):
        raise refuse("must be {PATTERN: {SETTING: VALUE}}")
    return value or None


Nested = Annotated[dict[str, dict[str, Any]] | None, BeforeValidator(_nested)]


def _sources(value: Any) -> Any:
    """One source, several, or a mixture of sources with weights."""
    if isinstance(value, Mapping):
        weights: dict[str, float] = {text(source): finite(weight) or 0 for source, weight in value.items()}
        if not weights or min(weights.values()) <= 0:
            raise refuse("must be {PATH: WEIGHT, …} with positive weights")
        least = min(weights, key=weights.__getitem__)
        if weights[least] < 5e-5 * sum(weights.values()):
            raise refuse(f"must be without weights below 1/20000 of all; raise that of {least}, or leave it out")
        return weights
    if isinstance(value, list | tuple):
        checked = tuple(text(source) for source in value)
        if len(set(checked)) != len(value) or not value:
            raise refuse("must be a list of different paths")
        return checked
    return None if value is None else text(value)


Sources = Annotated[str | tuple[str, ...] | dict[str, float] | None, BeforeValidator(_sources)]
