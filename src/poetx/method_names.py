"""Methods by one word: ``mem``, ``int8``, ``single-step``, ``adamw``, ``muon``, ``lora`` … as the keys they set."""

from __future__ import annotations

from typing import Any

from poetx.config import WEIGHT_FORMATS
from poetx.errors import UserError, nearest


def _poet(mode: str, weight_format: str | None = None) -> dict[str, Any]:
    return {"lora": None, "poet.method": "poet-x", "poet.mode": mode, "poet.weight_format": weight_format}


def _single_step(mode: str) -> dict[str, Any]:
    return {"lora": None, "poet.method": "single-step", "poet.mode": mode}


def _dense(optimizer: str) -> dict[str, Any]:
    return {"poet": None, "lora": None, "optimizer.name": optimizer}


#: What each method sets, by dotted key; None for a section takes it away.
METHODS: dict[str, dict[str, Any]] = {
    "mem": _poet("mem"),
    "fast": _poet("fast"),
    **{name: _poet("mem", name) for name in WEIGHT_FORMATS},
    "single-step": _single_step("fast"),
    "single-step-mem": _single_step("mem"),
    "adamw": _dense("adamw") | {"optimizer.state_dtype": "auto"},
    "adamw-mixed": _dense("adamw")
    | {"optimizer.state_dtype": "auto", "train.autocast": True, "train.dtype": "float32"},
    "adamw-8bit": _dense("adamw") | {"optimizer.state_dtype": "int8"},
    **{name: _dense(name) for name in ("muon", "adafactor", "sgd", "smmf", "hfac")},
    "lora": {"poet": None, "optimizer.name": "adamw", "lora": {}},
}

#: Keys that a method does not have, and what they become when it is put into a recipe that sets them.
_RESET: dict[str, dict[str, Any]] = {
    "poet-x": {},
    "single-step": {"poet.merge_every": None, "poet.weight_format": None, "poet.weight_extra_bits": False},
    "none": {"optimizer.base": None},
}


def put_method(values: dict[str, Any], name: str) -> None:
    """Make nested recipe ``values`` those of the method ``name``, in place.

    Raises:
        UserError: no such method.
    """
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise UserError(f"method={name}: no such method{nearest(str(name), METHODS)} (there are {known})")
    keys = METHODS[name]
    before = values.get("poet")
    for key, value in (keys | _RESET[keys.get("poet.method", "none")]).items():
        section, _, last = key.partition(".")
        if not last:
            values[section] = dict(value) if isinstance(value, dict) else value
        else:
            if not isinstance(values.get(section), dict):
                values[section] = {}
            values[section][last] = value
    poet, optimizer = values.get("poet"), values.get("optimizer") or {}
    if poet and poet["method"] == "poet-x" and isinstance(before, dict) and before.get("method") == "single-step":
        poet.pop("merge_every", None)
    if poet and optimizer.get("name") == "muon":
        optimizer["name"] = "adamw"
