"""Recipes as former versions wrote them: old names, removed settings, and keys that had no effect."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

from poetx.config import RENAMED as RENAMED_SETTINGS
from poetx.errors import UserError
from poetx.recipe.sections import belongs, default_of, section_types

#: Former dotted keys.
RENAMED = {"optimizer.base": "optimizer.dense_optimizer"} | {
    f"poet.{old}": f"poet.{new}" for old, new in RENAMED_SETTINGS.items()
}
#: Defaults that runs of former versions were started with, where today's is another.
DEFAULTS = {"poet.weight_extra_bits": False, "poet.update": "rotation"}
#: Settings of single-step runs that are gone: all that is left is what these values gave.
_ONLY = {"partitions": (1, "one partition"), "partition_kind": ("structured", "contiguous blocks")}


def modernize(values: dict[str, Any], *, of_a_run: bool = False, keep: Container[str] = ()) -> list[str]:
    """Put nested recipe ``values`` into today's keys, in place; one line about everything that is worth telling.

    Earlier versions wrote every key with its default, so a key without effect is dropped if it has that; in the
    recipe of a run it is dropped whatever it has; what ``keep`` names as ``section.key`` stays.

    Raises:
        UserError: a setting that would train otherwise today.
    """
    notes = _rename(values)
    poet = values.get("poet")
    if isinstance(poet, dict):
        former = bool(poet.keys() & {"spectrum", *_ONLY})
        if "spectrum" in poet:
            poet["update"] = _update(poet.pop("spectrum"))
        for key, (left, words) in _ONLY.items():
            value = poet.pop(key, left)
            if value != left and poet.get("method") == "single-step":
                raise UserError(
                    f"poet.{key}={value}: of a version before; single steps have {words} on a side since then. Leave "
                    "it out and start anew, or use the version the run was started with"
                )
        key = "update" if poet.get("method") == "single-step" else "weight_extra_bits"
        if of_a_run or (key == "update" and former):
            poet.setdefault(key, DEFAULTS[f"poet.{key}"])
    for section, key, value in list(without_effect(values)):
        ramp = key.startswith("clip_ramp")  # built-in single-step recipes had it
        if f"{section}.{key}" in keep:
            continue
        usual = value is None or ramp or _usual(section, key, value)
        if usual or of_a_run:
            del values[section][key]
            if not usual:
                notes.append(f"{section}.{key}={value} has had no effect in this run and is left out")
    return notes


def modern_override(key: str, value: Any) -> tuple[str, Any]:
    """Today's dotted key and value of an override."""
    if key == "poet.spectrum":
        return "poet.update", _update(value)
    return RENAMED.get(key, key), value


def _update(spectrum: Any) -> Any:
    return "rotation" if spectrum == "fixed" else spectrum


def _rename(values: dict[str, Any]) -> list[str]:
    notes = []
    for old, new in RENAMED.items():
        (section, _, key), name = old.partition("."), new.rpartition(".")[2]
        part = values.get(section)
        if not isinstance(part, dict) or key not in part:
            continue
        value = part.pop(key)
        poet = values.get("poet")
        if key == "base" and value is not None and isinstance(poet, dict) and poet.get("method") == "single-step":
            name = "name"  # there one optimizer steps all that is not rotated
        if name == "name" or not _same(value, default_of(section, name)):
            part[name] = value
        if name == "name" or not _usual(section, name, value):
            notes.append(f"{old} is called {section}.{name} now")
    return notes


def without_effect(values: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Section, key and value of everything that belongs to another method or optimizer than ``values`` choose."""
    types = section_types(values)
    for section in ("poet", "optimizer"):
        part = values.get(section)
        if isinstance(part, dict) and section in types:
            known = types[section].model_fields
            yield from ((section, k, v) for k, v in part.items() if k not in known and belongs(section, str(k)))


def drop_without_effect(values: dict[str, Any], *, keep: Container[str] = ()) -> None:
    """Delete what :func:`without_effect` finds, in place; what ``keep`` names as ``section.key`` only if it is null."""
    for section, key, value in list(without_effect(values)):
        if value is None or f"{section}.{key}" not in keep:
            del values[section][key]


def _usual(section: str, key: str, value: Any) -> bool:
    return _same(value, DEFAULTS.get(f"{section}.{key}", default_of(section, key)))


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, list | tuple) and isinstance(default, list | tuple):
        return list(value) == list(default)
    return value == default
