"""``convert_``: swap a model's linear layers for rotated ones, in place, and say what was not swapped and why."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from poetx.config import PoetConfig, name_matches
from poetx.errors import UserError, nearest
from poetx.layers.poet import DTYPES, PoetLinear
from poetx.layers.prequantized import dense_weight, foreign_buffers, is_foreign
from poetx.layers.single_step import SingleStepLinear
from poetx.layers.walk import converted_layers, poet_layers
from poetx.layers.weights import PackedWeight

#: Names that checkpoints in the wild give to several matrices held as one.
_FUSED = re.compile(r"(^|\.)(c_attn|qkv|qkv_proj|query_key_value|Wqkv|in_proj|gate_up_proj|kv_proj|q_attn)$")


@dataclass(frozen=True)
class ConvertedLayer:
    """One converted layer: its name, sizes, the block size each side got, and anything worth knowing."""

    name: str
    in_features: int
    out_features: int
    block_size_in: int
    block_size_out: int
    rotation_parameters: int
    note: str = ""


@dataclass(frozen=True)
class SkippedParameter:
    """One matrix (or stack of matrices) that stays as it was, by parameter name, with the reason."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert_` did. ``print(report)`` is meant to be read.

    Attributes:
        rotation_parameters: degrees of freedom in all rotations (without padding of ragged blocks).
        trainable_parameters: those plus every other parameter that requires a gradient, tied ones once.
        total_parameters: parameters of the model before conversion, tied ones once.
    """

    converted: tuple[ConvertedLayer, ...]
    skipped: tuple[SkippedParameter, ...]
    rotation_parameters: int
    trainable_parameters: int
    total_parameters: int

    def __str__(self) -> str:
        lines = [
            f"converted {len(self.converted)} layers: {self.trainable_parameters / 1e6:.2f}M of "
            f"{self.total_parameters / 1e6:.2f}M parameters train, {self.rotation_parameters / 1e6:.2f}M of them "
            "rotations"
        ]
        groups: dict[tuple, list[str]] = defaultdict(list)
        for layer in self.converted:
            key = (
                _generic(layer.name),
                layer.out_features,
                layer.in_features,
                layer.block_size_out,
                layer.block_size_in,
                layer.note,
            )
            groups[key].append(layer.name)
        for (name, m, n, block_out, block_in, note), names in groups.items():
            blocks = f"b={block_out}" if block_out == block_in else f"b={block_out} out, {block_in} in"
            lines.append(f"  {name}  {m}x{n}  {blocks}  x{len(names)}" + (f"  ({note})" if note else ""))
        if self.skipped:
            lines.append("left as they are:")
            skipped: dict[tuple, int] = defaultdict(int)
            for item in self.skipped:
                skipped[_generic(item.name), item.shape, item.reason] += 1
            for (name, shape, reason), count in skipped.items():
                lines.append(f"  {name}  {'x'.join(map(str, shape))}  x{count}: {reason}")
        return "\n".join(lines)


def _generic(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


_LAYERS: dict[str, type[PoetLinear] | type[SingleStepLinear]] = {
    "poet-x": PoetLinear,
    "single-step": SingleStepLinear,
}


def _is_conv1d(module: nn.Module) -> bool:
    # By name, so that a plain torch model needs no transformers import.
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _output_layer(model: nn.Module) -> Any:
    getter: Any = getattr(model, "get_output_embeddings", None)
    try:
        return getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        return None


def _refusal(module: nn.Module, shared: set[int], *, foreign: bool, replaced: bool) -> str | None:
    """Why a linear layer that the patterns reach is left alone, or None if it is to be converted or rotated."""
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        return "its weight is computed (a parametrization or pruning); remove that first"
    if id(weight) in shared:
        return "its weight is tied to another layer's"
    if not weight.requires_grad and not (foreign and is_foreign(module)):
        return "frozen (requires_grad=False)"
    if weight.numel() == 0:
        return "it has no elements"
    if hasattr(module, "parametrizations"):
        return "parametrized; remove the parametrization first"
    if not replaced:
        return None
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if "forward" in vars(module) or hasattr(module, "_hf_hook"):
        return "its forward has been replaced, which conversion would lose; convert before that"
    if any(hooks):
        return "it has hooks, which conversion would lose; convert before registering them"
    return None


@dataclass(frozen=True)
class Targets:
    """The linear layers that a config reaches: by first name, every place each stands in, and why others are not."""

    layers: dict[str, nn.Module]
    places: dict[nn.Module, list[str]]
    reasons: dict[nn.Module, str]


def find_targets(model: nn.Module, config: PoetConfig, *, foreign: bool = False, replaced: bool = True) -> Targets:
    """Which layers of ``model`` to rotate: ``nn.Linear`` and ``Conv1D`` within the config's patterns, and with
    ``foreign`` linear layers that bitsandbytes or torchao have quantized.

    Not those with hooks or another forward of their own, if they are to be ``replaced``, which would lose these.

    Raises:
        UserError: none is left, or one of them is float16.
    """
    places: dict[nn.Module, list[str]] = defaultdict(list)
    owners: dict[int, set[int]] = defaultdict(set)
    for name, module in model.named_modules(remove_duplicate=False):
        places[module].append(name)
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].add(id(module))
    shared = {parameter for parameter, modules in owners.items() if len(modules) > 1}
    head = _output_layer(model)

    reasons: dict[nn.Module, str] = {}
    layers: dict[str, nn.Module] = {}
    linears = [m for m in places if type(m) is nn.Linear or _is_conv1d(m) or (foreign and is_foreign(m))]
    matched = False
    for module in linears:
        name = places[module][0]
        wanted = config.target_modules == "all-linear" or name_matches(name, config.target_modules)
        if not wanted:
            reason = "not in target_modules"
        elif module is head and config.target_modules == "all-linear":
            reason = "the output layer"
        elif name_matches(name, config.exclude_modules):
            reason = "in exclude_modules"
        else:
            matched = True
            reason = _refusal(module, shared, foreign=foreign, replaced=replaced)
        if reason is not None:
            reasons[module] = reason
        elif not (foreign and is_foreign(module)) and module.weight.dtype not in DTYPES:
            raise UserError(
                f"{name}: {module.weight.dtype} is not supported (its range needs loss scaling); convert the "
                "model to bfloat16 or float32 first"
            )
        else:
            layers[name] = module
    if config.residual_scale != 1 and layers and not any(map(config.writes_to_residual, layers)):
        endings = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        raise UserError(
            f"residual_scale={config.residual_scale}: no layer to convert is in residual_modules; name those that "
            f"write to the residual stream (the layers end in {endings})"
        )
    if not layers:
        _raise_no_match(config, [places[m][0] for m in linears], [reasons[m] for m in linears] if matched else [])
    return Targets(layers, dict(places), reasons)


def convert_(model: nn.Module, config: PoetConfig | None = None) -> ConversionReport:
    """Replace the linear layers of ``model`` by :class:`PoetLinear` or :class:`SingleStepLinear`, in place.

    Takes exact ``nn.Linear`` modules, ``transformers`` ``Conv1D``, and linear layers that bitsandbytes or torchao
    have quantized; everything else that holds a matrix is in the report's ``skipped`` with the reason. Tied weights,
    frozen weights and the output layer of a ``transformers`` model stay as they are. With ``config.init == "keep"``
    the model's function is preserved, up to the rounding of a ``weight_format``.
    Memory: each layer's old weight is released before the next is converted. Works on the meta device, for
    :func:`poetx.materialize_` to fill.

    Raises:
        UserError: nothing matches ``target_modules``; the model is already converted; a targeted layer is
            float16. The model is then unchanged.
    """
    config = config or PoetConfig()
    if isinstance(model, nn.Linear) or _is_conv1d(model):
        raise UserError(
            "convert_ replaces layers inside a model; for a single layer use PoetLinear.from_linear or wrap it "
            "in nn.Sequential"
        )
    if next(converted_layers(model), None) is not None:
        raise UserError("the model is already converted; poetx.to_dense_(model) undoes that")

    total = sum(p.numel() for p in model.parameters())
    found = find_targets(model, config, foreign=True)
    others = (p.dtype for p in model.parameters() if p.dtype in DTYPES and not p.is_meta)
    dtype = next(others, torch.get_default_dtype())
    converted = []
    for name in list(found.layers):
        module = found.layers.pop(name)  # so that nothing here keeps the old weight alive
        places = found.places[module]
        notes = ["one matrix holding several: its output blocks mix them"] if _FUSED.search(name) else []
        if config.residual_scale != 1 and config.writes_to_residual(name):
            notes.append(f"starts {config.residual_scale:g} times as large: it writes to the residual stream")
        weight = None
        if is_foreign(module):
            try:
                weight = dense_weight(module, dtype)
            except ValueError as error:
                found.reasons[module] = str(error)
                continue
            notes.append(f"was {_kind(module)}")
        layer = _LAYERS[config.method].from_linear(module, config=config, name=name, weight=weight)
        if layer.rotation_count > layer.in_features * layer.out_features:
            notes.append("its blocks hold more numbers than its weight: a smaller block_size saves memory")
        del found.places[module], module, weight
        for place in places:
            parent, _, child = place.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
        converted.append(
            ConvertedLayer(
                name,
                layer.in_features,
                layer.out_features,
                layer.block_size_in,
                layer.block_size_out,
                layer.rotation_count,
                "; ".join(notes),
            )
        )
    if not converted:
        name, reason = next((places[0], found.reasons[m]) for m, places in found.places.items() if m in found.reasons)
        raise UserError(f"no layer could be converted: {name}: {reason}")
    rotations = sum(layer.rotation_parameters for layer in converted)
    return ConversionReport(
        converted=tuple(converted),
        skipped=tuple(_skipped(model, found.reasons)),
        rotation_parameters=rotations,
        trainable_parameters=rotations + sum(p.numel() for p in _trainable_base(model)),
        total_parameters=total,
    )


def _kind(module: nn.Module) -> str:
    return type(module.weight if type(module) is nn.Linear else module).__name__


def _trainable_base(model: nn.Module) -> Iterator[nn.Parameter]:
    rotations = {id(p) for _, layer in poet_layers(model) for p in layer.rotations}
    return (p for p in model.parameters() if p.requires_grad and id(p) not in rotations)


def _raise_no_match(config: PoetConfig, names: list[str], reasons: list[str]) -> None:
    if not names:
        raise UserError("the model has no nn.Linear (or Conv1D) layer to convert")
    if reasons:
        why = "; ".join(f"{name} is {reason}" for name, reason in list(zip(names, reasons, strict=True))[:3])
        raise UserError(f"target_modules={config.target_modules!r}: every layer it matches must stay as it is: {why}")
    wanted = config.target_modules
    word = wanted if isinstance(wanted, str) else ", ".join(wanted)
    endings = sorted({name.rpartition(".")[2] for name in names})
    raise UserError(
        f"target_modules={wanted!r}: matches no linear layer outside exclude_modules={config.exclude_modules!r}"
        f"{nearest(word, endings)}; the model's linear layers end in {', '.join(endings)}"
    )


def _skipped(model: nn.Module, reasons: dict[nn.Module, str]) -> Iterator[SkippedParameter]:
    """Every parameter with two or more dimensions outside the converted layers, and every quantized weight."""
    for module_name, module in model.named_modules():
        if isinstance(module, (PoetLinear, SingleStepLinear)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2:
                continue
            yield SkippedParameter(
                f"{module_name}.{name}".lstrip("."),
                tuple(parameter.shape),
                (name == "weight" and reasons.get(module)) or _why_not(module, parameter),
            )
        for name, shape in [] if isinstance(module, PackedWeight) else foreign_buffers(module):
            reason = f"quantized by {type(module).__module__.partition('.')[0]} in a format that is not read"
            yield SkippedParameter(f"{module_name}.{name}".lstrip("."), shape, reason)


def _why_not(module: nn.Module, parameter: nn.Parameter) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "an embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "a convolution"
    if isinstance(module, nn.Linear):
        return f"{kind}, a subclass of nn.Linear whose forward may differ"
    if parameter.ndim >= 3:
        return f"a {parameter.ndim}-D stack of matrices in {kind}, which is not a linear layer (experts?)"
    return f"a matrix in {kind}, which is not a linear layer"


@torch.no_grad()
def to_dense_(model: nn.Module) -> nn.Module:
    """Replace every converted layer by the plain layer it came from, with the same function, in place.

    ``nn.Linear``, or ``Conv1D`` where the layer came from one. The weight is rounded to the stored dtype once;
    it requires a gradient again, unless its layer was frozen. Returns ``model``, unchanged if nothing is converted.

    Raises:
        UserError: ``model`` itself is a layer, which cannot be replaced in place.
    """
    if isinstance(model, (PoetLinear, SingleStepLinear)):
        raise UserError("to_dense_ replaces layers inside a model; wrap the layer in nn.Sequential")
    places: dict[PoetLinear | SingleStepLinear, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (PoetLinear, SingleStepLinear)):
            places[module].append(name)
    while places:
        layer, names = places.popitem()  # so that nothing here keeps the old weight alive
        dense = _dense_layer(layer)
        del layer
        for place in names:
            parent, _, child = place.rpartition(".")
            setattr(model.get_submodule(parent), child, dense)
    return model


def _dense_layer(layer: PoetLinear | SingleStepLinear) -> nn.Module:
    weight = layer.weight.detach()
    if layer.transposed:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            dense: Any = Conv1D(layer.out_features, layer.in_features)
        weight = weight.T.contiguous()
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=not (isinstance(layer, SingleStepLinear) and layer.frozen))
    dense.bias = layer.bias
    return dense.train(layer.training)
