"""One word for many keys: methods (``method=int8``), Llama shapes (``model.shape=llama-8b``), recipes by size."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from poetx.config import METHODS_OF, WEIGHT_FORMATS
from poetx.errors import UserError, nearest
from poetx.optim.settings import MATRIX_OPTIMIZERS, OPTIMIZERS


class Shape(NamedTuple):
    """A Llama, embeddings untied, and with how much of it at once its recipe trains."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    vocab_size: int = 32000
    micro_batch_size: int = 8
    mode: str = "mem"


#: Those up to llama-13b are the papers'; "llama-1b-12" has half of llama-1b's layers. Qwen's are theirs without biases.
SHAPES = {
    "llama-60m": Shape(512, 1280, 8, 8, 8, micro_batch_size=64, mode="fast"),
    "llama-130m": Shape(768, 2048, 12, 12, 12, micro_batch_size=32, mode="fast"),
    "llama-350m": Shape(1024, 2736, 24, 16, 16, micro_batch_size=16, mode="fast"),
    "llama-1b": Shape(2048, 5632, 24, 32, 32),
    "llama-1b-12": Shape(2048, 5632, 12, 32, 32),
    "llama-3b": Shape(2560, 7168, 32, 32, 32),
    "llama-8b": Shape(4096, 14336, 32, 32, 32),
    "llama-13b": Shape(5120, 13824, 40, 40, 40),
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, vocab_size=128256),
    "llama-3.1-70b": Shape(8192, 28672, 80, 64, 8, vocab_size=128256, micro_batch_size=1),
    "qwen2.5-14b": Shape(5120, 13824, 48, 40, 8, vocab_size=152064, micro_batch_size=1),
    "qwen2.5-32b": Shape(5120, 27648, 64, 40, 8, vocab_size=152064, micro_batch_size=1),
}

#: Names of recipes that are recipes/llama.yaml with a shape.
SIZED_RECIPES = {name: name for name in SHAPES if name != "llama-1b-12"} | {"llama-1b-12l": "llama-1b-12"}


def _poet(mode: str, weight_format: str | None = None) -> dict[str, Any]:
    return {"lora": None, "poet.method": "poet-x", "poet.mode": mode, "poet.weight_format": weight_format}


def _single_step(mode: str) -> dict[str, Any]:
    return {"lora": None, "poet.method": "single-step", "poet.mode": mode}


def _dense(optimizer: str) -> dict[str, Any]:
    return {"poet": None, "lora": None, "optimizer.name": optimizer}


#: What each word of ``method=`` sets, by dotted key; None for a section takes it away.
METHODS: dict[str, dict[str, Any]] = {
    "mem": _poet("mem"),
    "fast": _poet("fast"),
    **{name: _poet("mem", name) for name in WEIGHT_FORMATS},
    "single-step": _single_step("fast"),
    "single-step-mem": _single_step("mem"),
    "single-step-free": _single_step("fast") | {"poet.update": "free", "poet.overrides": None},
    "single-step-fixed": _single_step("fast") | {"poet.update": "rotation", "poet.overrides": None},
    # Rotations on attention, free maps on the rest.
    "single-step-mixed": _single_step("fast")
    | {"poet.update": "free", "poet.overrides": {"*[aA]tt*": {"update": "rotation"}}},
    "poet": _poet("weight"),
    "adamw": _dense("adamw") | {"optimizer.state_dtype": "auto"},
    "adamw-mixed": _dense("adamw")
    | {"optimizer.state_dtype": "auto", "train.autocast": True, "train.dtype": "float32"},
    "adamw-8bit": _dense("adamw") | {"optimizer.state_dtype": "int8"},
    **{name: _dense(name) for name in (*MATRIX_OPTIMIZERS, *OPTIMIZERS[1:])},
    # LOMO: SGD whose gradients are used up inside backward.
    "lomo": _dense("sgd") | {"optimizer.momentum": 0.0, "optimizer.release_gradients": True, "optimizer.clip": None},
    "lora": {"poet": None, "lora": {}, "optimizer.name": "adamw"},
    "oft": {"lora": None, "poet.method": "oft"},
}
#: Other words for some of them.
METHOD_ALIASES = {
    "poet-x": "fast",
    "poet-x-fast": "fast",
    "poet-x-mem": "mem",
    "poet-x-int8": "int8",
    "poet-x-int4": "int4",
    "adamw8bit": "adamw-8bit",
}


#: Rates of a dense model's matrices, and LoRA's, where a recipe's rates are of rotations: the best at 0.4M to 2M
#: parameters (docs/compare.md), and what is usual at 60M to 1B. Never more than the recipe's own.
_START = {"adamw": 1.5e-3, "smmf": 1.5e-3, "hfac": 1.5e-3, "muon": 3e-3, "rmnp": 3e-3, "lora": 3e-3}


def settings_of(name: str) -> dict[str, Any]:
    """What a word of ``method=`` sets, nothing for a word that is none."""
    return METHODS.get(METHOD_ALIASES.get(name, name), {})


def check_method(name: Any) -> None:
    """Raise :class:`UserError` where there is no such method."""
    if not isinstance(name, str) or not settings_of(name):
        known = ", ".join(METHODS)
        raise UserError(f"method={name}: no such method{nearest(str(name), METHODS)} (there are {known})")


def put_method(values: dict[str, Any], name: str, *, own_rate: bool = False) -> dict[str, Any]:
    """Set the keys of the method ``name`` in nested recipe ``values``, in place; what it has not stays to be dropped.

    Returns the dotted keys whose values are not the recipe's any more, so that the method starts as well as its own.

    Args:
        own_rate: ``optimizer.lr`` is given for this method; else it may be of the one before.

    Raises:
        UserError: no such method.
    """
    check_method(name)
    before = copy.copy(values.get("poet"))
    for key, value in copy.deepcopy(settings_of(name)).items():
        section, _, last = key.partition(".")
        if not last:
            if value != {} or not isinstance(values.get(section), dict):  # {}: the section, whatever it says
                values[section] = dict(value) if isinstance(value, dict) else value
            continue
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values[section][last] = value
    _keep_overrides_of_the_method(values["poet"])
    if values["poet"] is not None and (values.get("optimizer") or {}).get("name") in MATRIX_OPTIMIZERS:
        values["optimizer"]["name"] = "adamw"  # those are for dense matrices
    return _start(values, before, own_rate) if isinstance(before, dict) and before.get("method") != "oft" else {}


def _start(values: dict[str, Any], poet: dict[str, Any], own_rate: bool) -> dict[str, Any]:
    """Start what has replaced the rotations of ``poet`` in nested recipe ``values`` as well as those, in place.

    Their ``lr`` was of embedding and head alone, and much too large for matrices; fresh layers that write to the
    residual stream start as much smaller as rotated ones did.
    """
    own, model, changed = values.get("optimizer"), values.get("model"), {}
    if not own_rate and isinstance(own, dict) and isinstance(lr := own.get("lr"), float):
        kind = "lora" if values.get("lora") is not None else own.get("name", "adamw")
        if values["poet"] is None and lr > _START.get(kind, lr) and own.get("matrix_lr") is None:
            changed["optimizer.lr" if kind == "lora" else "optimizer.matrix_lr"] = _START[kind]
        elif (values["poet"] or {}).get("method") == "oft":  # whose rotations have no other rate
            changed["optimizer.lr"] = own.get("poet_lr", lr)
    if values["poet"] is None and values.get("lora") is None and isinstance(model, dict):
        fresh = model.get("pretrained") is None and poet.get("init", "keep") != "keep"
        if fresh and model.get("residual_scale", 1.0) == 1 != poet.get("residual_scale", 1.0):
            changed["model.residual_scale"] = poet["residual_scale"]
    for key, value in changed.items():
        section, _, last = key.partition(".")
        values[section][last] = value
    return changed


def _keep_overrides_of_the_method(poet: Any) -> None:
    """Leave out, in place, what ``poet.overrides`` set of another method."""
    if not isinstance(poet, dict) or not isinstance(poet.get("overrides"), dict):
        return
    method = poet.get("method", "poet-x")
    kept = {
        pattern: {key: value for key, value in own.items() if method in METHODS_OF.get(key, (method,))}
        for pattern, own in poet["overrides"].items()
        if isinstance(own, dict)
    }
    poet["overrides"] = {pattern: own for pattern, own in kept.items() if own} or None


def put_shape(values: dict[str, Any]) -> None:
    """Read ``model.shape`` in nested recipe ``values`` as the sizes it stands for, where none are given, in place.

    And so with what its recipe takes at once (``train.micro_batch_size``, ``poet.mode``) and its vocabulary.

    Raises:
        UserError: no such shape.
    """
    model = values.get("model")
    name = model.pop("shape", None) if isinstance(model, dict) else None
    if name is None or not isinstance(model, dict):
        return
    if not isinstance(name, str) or name not in SHAPES:
        raise UserError(f"model.shape={name}: must be one of {', '.join(SHAPES)}{nearest(str(name), SHAPES)}")
    shape = SHAPES[name]
    sizes = {key: getattr(shape, key) for key in Shape._fields[:5]}
    if shape.num_key_value_heads == shape.num_heads:
        del sizes["num_key_value_heads"]
    for key, size in sizes.items():
        if model.get(key) is None:
            model[key] = size
    train, poet, data = values.get("train"), values.get("poet"), values.get("data")
    batch = train.get("batch_size") if isinstance(train, dict) else None
    if isinstance(train, dict) and isinstance(batch, int) and batch % shape.micro_batch_size == 0:
        train.setdefault("micro_batch_size", shape.micro_batch_size)
    if isinstance(poet, dict) and poet.get("method") != "oft":
        poet.setdefault("mode", shape.mode)
    if isinstance(data, dict):
        data.setdefault("vocab_size", shape.vocab_size)
