"""What :func:`poetx.convert_` did to a model, to be read by people: first what stays ordinary for a cause."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from poetx.layers.prequantized import foreign_buffers
from poetx.layers.walk import converted_layers
from poetx.layers.weights import PackedWeight


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
    """One matrix (or stack of matrices) that stays as it was, by parameter name, with the reason.

    ``for_cause``: its layer was wanted and could not learn as a rotated one, or is not one that rotations are for.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    for_cause: bool = False


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert_` did. ``print(report)`` is meant to be read.

    Attributes:
        rotation_parameters: degrees of freedom in all rotations (without padding of ragged blocks).
        trainable_parameters: those plus every other parameter that requires a gradient, tied ones once.
        total_parameters: parameters of the model before conversion, tied ones once.
        remarks: settings without effect, one line each.
    """

    converted: tuple[ConvertedLayer, ...]
    skipped: tuple[SkippedParameter, ...]
    rotation_parameters: int
    trainable_parameters: int
    total_parameters: int
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"note: {remark}" for remark in self.remarks]
        lines += self._left([item for item in self.skipped if item.for_cause], "left dense, trained as usual:")
        lines.append(
            f"converted {len(self.converted)} layers: {self.trainable_parameters / 1e6:.2f}M of "
            f"{self.total_parameters / 1e6:.2f}M parameters train, {self.rotation_parameters / 1e6:.2f}M of them "
            "rotations"
        )
        alike = Counter(replace(layer, name=_generic(layer.name), rotation_parameters=0) for layer in self.converted)
        for one, count in alike.items():
            blocks = f"b={one.block_size_out}"
            if one.block_size_out == 1 < one.out_features:
                blocks = f"b={one.block_size_in} in"
            elif one.block_size_out != one.block_size_in:
                blocks = f"b={one.block_size_out} out, {one.block_size_in} in"
            note = f"  ({one.note})" if one.note else ""
            lines.append(f"  {one.name}  {one.out_features}x{one.in_features}  {blocks}  x{count}{note}")
        lines += self._left([item for item in self.skipped if not item.for_cause], "left as they are:")
        return "\n".join(lines)

    @staticmethod
    def _left(items: list[SkippedParameter], title: str) -> list[str]:
        alike: dict[tuple, int] = defaultdict(int)
        for item in items:
            alike[_generic(item.name), "x".join(map(str, item.shape)), item.reason] += 1
        lines = [f"  {name}  {shape}  x{count}: {reason}" for (name, shape, reason), count in alike.items()]
        return [title, *lines] if lines else []

    def with_dense(self, model: nn.Module, reason: str) -> ConversionReport:
        """The report of a model some of whose layers became dense again afterwards, for ``reason``."""
        there = {name for name, _ in converted_layers(model)}
        gone = [layer for layer in self.converted if layer.name not in there]
        fewer = sum(layer.rotation_parameters for layer in gone)
        more = sum(layer.in_features * layer.out_features for layer in gone)
        dense = [
            SkippedParameter(f"{layer.name}.weight", (layer.out_features, layer.in_features), reason, for_cause=True)
            for layer in gone
        ]
        return replace(
            self,
            converted=tuple(layer for layer in self.converted if layer.name in there),
            skipped=(*dense, *self.skipped),
            rotation_parameters=self.rotation_parameters - fewer,
            trainable_parameters=self.trainable_parameters - fewer + more,
        )


def _generic(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def skipped(
    model: nn.Module, reasons: Mapping[nn.Module, str], for_cause: set[nn.Module]
) -> Iterator[SkippedParameter]:
    """Every parameter with two or more dimensions outside the converted layers, and every quantized weight."""
    inside = {id(part) for _, layer in converted_layers(model) for part in layer.modules()}
    for module_name, module in model.named_modules():
        if id(module) in inside:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2:
                continue
            own = reasons.get(module) if name == "weight" else None
            yield SkippedParameter(
                f"{module_name}.{name}".lstrip("."),
                tuple(parameter.shape),
                own or _why_not(module, parameter),
                own is not None and module in for_cause,
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
