"""``convert_``: swap a model's linear layers for rotated ones, in place, and say what was not swapped and why."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from poetx.config import PoetConfig, list_hint, name_matches, override_matches
from poetx.conversion_report import ConversionReport, ConvertedLayer, skipped
from poetx.errors import UserError, nearest
from poetx.find_shared import find_shared
from poetx.layers.attributes import carry_attributes
from poetx.layers.base import DTYPES, ConvertedLinear, is_finite
from poetx.layers.merge_reminder import MergeReminder, remind_of_merging
from poetx.layers.oft import OFTLinear
from poetx.layers.poet import PoetLinear
from poetx.layers.prequantized import dense_weight, drop_quantizers_, is_foreign
from poetx.layers.shared_features import SharedFeatures, unwatch
from poetx.layers.single_step import SingleStepLinear
from poetx.layers.walk import check_model, converted_layers, poet_layers, rotation_ids
from poetx.targets import Targets, find_targets, is_conv1d

logger = logging.getLogger(__name__)

#: Names that checkpoints in the wild give to several matrices held as one.
_FUSED = re.compile(r"(^|\.)(c_attn|qkv|qkv_proj|query_key_value|Wqkv|in_proj|gate_up_proj|kv_proj|q_attn)$")

_LAYERS: dict[str, type[ConvertedLinear]] = {
    "poet-x": PoetLinear,
    "single-step": SingleStepLinear,
    "oft": OFTLinear,
}


def convert_(model: nn.Module, config: PoetConfig | None = None) -> ConversionReport:
    """Replace the linear layers of ``model`` by those of ``config.method``, in place.

    Takes exact ``nn.Linear`` modules, ``transformers`` ``Conv1D``, and linear layers that bitsandbytes or torchao
    have quantized; everything else that holds a matrix is in the report's ``skipped`` with the reason. Tied and frozen
    weights, output layers and task heads, adapters of PEFT, weights that the model multiplies by without calling the
    layer, and (with ``init="keep"``) matrices of zeros stay as they are: the report's first lines. With
    ``config.init == "keep"`` the model's function is preserved, up to the rounding of a ``weight_format``.
    Memory: each layer's old weight is released before the next is converted. Works on the meta device, for
    :func:`poetx.materialize_` to fill.
    Fresh weights and permutations are drawn from (seed, name in ``model``): parts of one model that are converted one
    by one draw the same for the same names, so convert the whole, or give each part a ``seed`` of its own.

    Raises:
        UserError: nothing matches ``target_modules``; the model is already converted; a targeted layer is
            float16, or holds inf or NaN. The model is then unchanged.
    """
    config = PoetConfig() if config is None else config
    if not isinstance(config, PoetConfig):
        raise UserError(
            f"convert_: config is a {type(config).__name__}; give a PoetConfig, as PoetConfig(block_size=256)"
        )
    if torch.is_inference_mode_enabled():
        raise UserError("convert_: inside torch.inference_mode, whose tensors can never train; use torch.no_grad")
    if isinstance(model, DistributedDataParallel):
        raise UserError(
            "convert_: the model is in DistributedDataParallel, which would not average the rotations; convert it "
            "first, then wrap it"
        )
    if hasattr(model, "_orig_mod"):  # of torch.compile: names, by which permutations are drawn, are the plain model's
        return convert_(model._orig_mod, config)  # pyright: ignore[reportArgumentType]
    if isinstance(model, nn.Linear) or is_conv1d(model):
        raise UserError(
            "convert_ replaces layers inside a model; for a single layer use PoetLinear.from_linear or wrap it "
            "in nn.Sequential"
        )
    if next(converted_layers(model), None) is not None:
        raise UserError("the model is already converted; poetx.to_dense_(model) undoes that")
    found = find_targets(model, config, foreign=True)
    _check_overrides(config, found)
    total = sum(p.numel() for p in model.parameters())
    remarks = tuple(_remarks(config, (name for names in found.places.values() for name in names)))
    others = (p.dtype for p in model.parameters() if p.dtype in DTYPES and not p.is_meta)
    dtype = next(others, torch.get_default_dtype())
    shared = find_shared(model, found, config) if config.method == "poet-x" else {}
    converted, dtypes = [], set()
    for name in list(found.layers):
        layer, change = _convert_layer(model, name, config, found, dtype, shared.get(name, {}))
        if isinstance(layer, PoetLinear) and not layer.one_sided and not converted:
            remind_of_merging(layer)
        if layer is not None:
            converted.append(_described(layer, name, config, change))
            dtypes.add(layer.weight_dtype)
    if not converted:
        name, reason = next((places[0], found.reasons[m]) for m, places in found.places.items() if m in found.reasons)
        raise UserError(f"no layer could be converted: {name}: {reason}")
    if config.weight_extra_bits and config.weight_format is None and torch.bfloat16 not in dtypes:
        remarks += ("weight_extra_bits=True is without effect until a cast: no converted weight is bfloat16",)
    if not shared and config.permutation == "shared" and config.method == "poet-x":
        remarks += ("permutation='shared' is as 'random' here: no two layers of a module read the same features",)
    drop_quantizers_(model)
    for _, layer in poet_layers(model):
        for shared_features in _shared_features(layer):
            shared_features.look_again()
            shared_features.watch()
    vars(model)["_apply"] = MethodType(_apply, model)
    if any(isinstance(layer, SingleStepLinear) and layer.transposed for _, layer in converted_layers(model)):
        model.register_load_state_dict_pre_hook(_take_older_layout)
    rotations = sum(layer.rotation_parameters for layer in converted)
    return ConversionReport(
        converted=tuple(converted),
        skipped=tuple(skipped(model, found.reasons, found.for_cause)),
        rotation_parameters=rotations,
        trainable_parameters=rotations + sum(p.numel() for p in _trainable_base(model)),
        total_parameters=total,
        remarks=remarks,
    )


def _shared_features(layer: Any) -> list[SharedFeatures]:
    sides = (getattr(layer, "shared_in", None), getattr(layer, "shared_out", None))
    return [shared for shared in sides if shared is not None]


def _check_overrides(config: PoetConfig, found: Targets) -> None:
    for pattern in config.overrides or {}:
        if not any(override_matches(name, pattern) for name in found.layers):
            left = [names[0] for names in found.places.values() if any(override_matches(n, pattern) for n in names)]
            why = f"{left[0]} is not converted" if left else "no layer has such a name"
            endings = ", ".join(sorted({name.rpartition(".")[2] for name in found.layers}))
            raise UserError(f"overrides: {pattern!r} matches nothing: {why} (the converted layers end in {endings})")


def _apply(model: nn.Module, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
    """``model._apply``: what a converted layer refuses (float16), before torch has changed the modules ahead of it."""
    for _, layer in converted_layers(model):
        layer.check_cast(fn)
    return type(model)._apply(model, fn, recurse)


def _take_older_layout(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Turn square weights that single-step layers in place of a ``Conv1D`` once saved as [out, in]; others show it.

    Where there are no others, they are taken as the plain model has them, and a warning says so unless the state is
    known as one of today's.
    """
    layers = {
        f"{prefix}{name}.weight": layer
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, SingleStepLinear) and layer.transposed
    }
    shapes = {key: (layer.out_features, layer.in_features) for key, layer in layers.items() if key in state_dict}
    if any(m != n and state_dict[key].shape == (m, n) for key, (m, n) in shapes.items()):
        state_dict |= {key: state_dict[key].T for key, (m, n) in shapes.items() if m == n}
    elif shapes and all(m == n for m, n in shapes.values()):
        key = next(iter(shapes))
        known = getattr(state_dict, "_metadata", {}).get(key.removesuffix(".weight"), {})
        if known.get("version", 1) < SingleStepLinear._version:
            logger.warning(
                "%s: taken as Conv1D holds it, [in, out]; an earlier poetx saved it transposed, and a square weight "
                "does not show which it is",
                key,
            )


def _convert_layer(
    model: nn.Module,
    name: str,
    config: PoetConfig,
    found: Targets,
    dtype: torch.dtype,
    shared: Mapping[str, SharedFeatures],
) -> tuple[ConvertedLinear | None, str | None]:
    """Put the layer's successor in all its places, None where its library cannot undo its format; and what changed."""
    module = found.layers.pop(name)  # so that nothing here keeps the old weight alive
    weight = was = None
    if is_foreign(module):
        was = type(module.weight if type(module) is nn.Linear else module).__name__
        try:
            weight = dense_weight(module, dtype)
        except ValueError as error:
            found.reasons[module] = str(error)
            return None, was
        if not is_finite(weight):
            found.reasons[module] = "it holds inf or NaN"
            return None, was
    settings = {"config": config.for_layer(name), "name": name, "weight": weight}
    layer = _LAYERS[config.method].from_linear(module, **settings, shared=shared)
    _put(model, found.places.pop(module), layer)
    if was is not None:
        return layer, f"was {was}"
    lost = carry_attributes(module, layer)
    return layer, f"without its {', '.join(lost)}, which the new layer cannot have" if lost else None


def _put(model: nn.Module, places: Iterable[str], module: nn.Module) -> None:
    for place in places:
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def _described(layer: ConvertedLinear, name: str, config: PoetConfig, change: str | None) -> ConvertedLayer:
    notes = ["one matrix holding several: its output blocks mix them"] if _FUSED.search(name) else []
    notes += [] if config.init == "keep" else [f"a fresh weight, by seed={config.seed} whatever torch's own is"]
    if config.residual_scale != 1 and config.writes_to_residual(name):
        notes.append(f"starts {config.residual_scale:g} times as large: it writes to the residual stream")
    own = {key: value for override in (config.overrides or {}).values() for key, value in override.items()}
    settled = {key: getattr(layer.config, key) for key in own}
    notes += [f"{key}={value}" for key, value in settled.items() if value != getattr(config, key)]
    notes += [change] if change else []
    notes += _shared_notes(layer) if isinstance(layer, PoetLinear) else []
    if layer.rotation_count > layer.in_features * layer.out_features:
        notes.append("its blocks hold more numbers than its weight: a smaller block_size saves memory")
    return ConvertedLayer(
        name=name,
        in_features=layer.in_features,
        out_features=layer.out_features,
        block_size_in=layer.block_size_in,
        block_size_out=layer.block_size_out,
        rotation_parameters=layer.rotation_count,
        note="; ".join(notes),
    )


def _shared_notes(layer: PoetLinear) -> Iterator[str]:
    if (shared := layer.shared_in) is not None:
        others = [name for name in shared.readers if name != layer.name.rpartition(".")[2]]
        writers = f"takes the permuted features of {' and '.join(shared.writers)}"
        yield writers if shared.writers else f"its input is gathered once for {' and '.join(others)}, too"
    if (shared := layer.shared_out) is not None:
        yield f"hands its features on to {' and '.join(shared.readers)} permuted"


def _remarks(config: PoetConfig, names: Iterable[str]) -> Iterator[str]:
    """Settings that were changed and that nothing reads."""
    default = {field.name: field.default for field in dataclasses.fields(PoetConfig)}
    idle = {
        "single-step": ["neumann_order", "permutation"],
        "poet-x": ["update"],
        "oft": ["update", "mode", "permutation"],
    }[config.method]
    idle += ["group_size"] if config.weight_format is None else []
    idle += ["residual_modules"] if config.residual_scale == 1 else []
    for name in idle:
        if getattr(config, name) != default[name]:
            yield f"{name}={getattr(config, name)!r} is without effect here"
    known = list(names)
    for key in ("target_modules", "exclude_modules"):
        patterns = getattr(config, key)
        if patterns != default[key]:
            for one in [patterns] if isinstance(patterns, str) else [(pattern,) for pattern in patterns]:
                if not any(name_matches(name, one) for name in known):
                    pattern = one if isinstance(one, str) else one[0]
                    yield f"{key}: {pattern!r} matches no module{list_hint(key, one, known)}"


def _trainable_base(model: nn.Module) -> Iterator[nn.Parameter]:
    rotations = rotation_ids(model)
    return (p for p in model.parameters() if p.requires_grad and id(p) not in rotations)


@torch.no_grad()
def to_dense_(model: nn.Module, names: Iterable[str] | None = None) -> nn.Module:
    """Replace converted layers, all or those of ``names``, by the plain layers they came from, in place.

    The function stays, and so do hooks and attributes; ``nn.Linear``, or ``Conv1D`` where the layer came from one. The
    weight is rounded to the stored dtype once; it requires a gradient again, unless its layer was frozen. An optimizer
    built before does not hold it: build another to train on. Returns ``model``, unchanged if nothing is converted.

    Raises:
        UserError: ``model`` itself is a layer, which cannot be replaced in place; a name that no converted layer has.
    """
    if isinstance(model, ConvertedLinear):
        raise UserError("to_dense_ replaces layers inside a model; wrap the layer in nn.Sequential")
    check_model(model)
    places: dict[ConvertedLinear, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ConvertedLinear):
            places[module].append(name)
    wanted = None if names is None else {names} if isinstance(names, str) else set(names)
    known = [name for where in places.values() for name in where]
    for name in sorted(wanted or ()):
        if name not in known:
            raise UserError(f"to_dense_: names={name!r}: no converted layer has this name{nearest(name, known)}")
    left: set[SharedFeatures] = set()
    while places:
        layer, where = places.popitem()  # so that nothing here keeps the old weight alive
        if wanted is None or wanted.intersection(where):
            left.update(_shared_features(layer))
            dense = _dense_layer(layer)
            del layer
            _put(model, where, dense)
    for shared in left:
        shared.look_again()
    for module in model.modules():
        unwatch(module)
    if next(converted_layers(model), None) is None:
        vars(model).pop("_apply", None)
    return model


def _dense_layer(layer: ConvertedLinear) -> nn.Module:
    if layer.transposed:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            dense: Any = Conv1D(layer.out_features, layer.in_features)
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(layer.plain_weight(), requires_grad=not layer.frozen)
    dense.bias = layer.bias
    carry_attributes(layer, dense)
    layer.made_dense = True
    for parameter in getattr(layer, "rotations", ()):  # all of the layer that an optimizer holds
        parameter.made_dense = True
    for kind in [key for key in vars(dense) if key.startswith(("_forward_", "_backward_", "_is_full_backward_"))]:
        setattr(dense, kind, getattr(layer, kind))  # the very dictionaries, from which their handles remove them
    for key, hook in list(dense._forward_pre_hooks.items()):
        if isinstance(hook, MergeReminder):
            del dense._forward_pre_hooks[key]
    return dense.train(layer.training)
