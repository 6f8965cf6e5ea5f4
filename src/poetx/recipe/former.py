"""Recipes as former versions wrote them: old names, removed settings, and keys that had no effect."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

from poetx.config import GONE, current_keys, current_name
from poetx.config import RENAMED as RENAMED_SETTINGS
from poetx.errors import UserError
from poetx.recipe.sections import belongs, default_of, section_types

_OPTIMIZER_RENAMED = {
    "optimizer.base": "optimizer.dense_optimizer",
    "optimizer.muon_lr": "optimizer.matrix_lr",
}
#: Defaults that runs of former versions were started with, where today's is another.
DEFAULTS = {"poet.weight_extra_bits": False, "poet.update": "rotation"}
_GONE_DEFAULTS = {"partitions": 2, "partition_kind": "structured"}


def modernize(values: dict[str, Any], *, of_a_run: bool = False, keep: Container[str] = ()) -> list[str]:
    """Put nested recipe ``values`` into today's keys, in place; one line about everything that is worth telling.

    Earlier versions wrote every key with its default, so a key without effect is dropped if it has that; in the
    recipe of a run it is dropped whatever it has; what ``keep`` names as ``section.key`` stays.

    Raises:
        UserError: a setting that would train otherwise today.
    """
    notes = _rename_of_optimizer(values)
    poet = values.get("poet")
    if isinstance(poet, dict):
        single_step = poet.get("method") == "single-step"
        for key in () if single_step or of_a_run else GONE:
            if poet.get(key, _GONE_DEFAULTS[key]) not in (_GONE_DEFAULTS[key], GONE[key][0]):
                raise UserError(
                    f"poet.{key}={poet[key]!r}: has had no effect with method=poet-x and is gone; leave it out"
                )
        new = current_keys(poet, "poet.")
        for old, name in RENAMED_SETTINGS.items():
            if old in poet and name != "update" and not _usual("poet", name, new[name]):
                notes.append(f"poet.{old} is called poet.{name} now")
        poet.clear()
        poet.update(new)
        if of_a_run:
            key = "update" if single_step else "weight_extra_bits"
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
    """Today's dotted key and value of an override. Raises :class:`UserError` where there is none."""
    section, _, name = key.partition(".")
    if section == "poet" and name in GONE:
        raise UserError(f"{key}={value!r}: is gone; single steps have {GONE[name][1]} on a side; leave it out")
    if section == "poet" and name:
        name, value = current_name(name, value)
        return f"{section}.{name}", value
    return _OPTIMIZER_RENAMED.get(key, key), value


def _rename_of_optimizer(values: dict[str, Any]) -> list[str]:
    """Put settings of the optimizer under the names that they have today."""
    part, poet = values.get("optimizer"), values.get("poet")
    notes = []
    for old, new in _OPTIMIZER_RENAMED.items():
        key, name = old.rpartition(".")[2], new.rpartition(".")[2]
        if not isinstance(part, dict) or (value := part.pop(key, None)) is None:
            continue
        if key == "base" and isinstance(poet, dict) and poet.get("method") == "single-step":
            name = "name"  # there one optimizer steps all that is not rotated
        if part.setdefault(name, value) != value:
            raise UserError(
                f"{old}={value} with optimizer.{name}={part[name]}: {key} is the former name of {name}, and the two "
                f"differ; leave {old} out"
            )
        notes.append(f"{old} is called optimizer.{name} now")
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
