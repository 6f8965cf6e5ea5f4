"""Weights for a converted model on the meta device, layer by layer: never more than its stored size and one layer."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poetx.convert import to_dense_
from poetx.errors import UserError
from poetx.files import read_json, reason
from poetx.layers.poet import PoetLinear
from poetx.layers.walk import poet_layers
from poetx.ops.random import seeded
from poetx.targets import ZERO, next_to_nothing

logger = logging.getLogger(__name__)

#: Elements of an embedding that are read at a time.
_PIECE = 1 << 24

#: Endings of tensors that GPTQ, AWQ, bitsandbytes, compressed-tensors and fp8 checkpoints hold beside or for a weight.
_PACKED = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".SCB", ".absmax", ".quant_map")


class SafetensorsCheckpoint:
    """The tensors of a directory of safetensors files, by name, read one at a time.

    Raises:
        UserError: no such directory, or no safetensors in it.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).expanduser()
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            found = read_json(index).get("weight_map")
            if not isinstance(found, dict) or not all(isinstance(f, str) for f in found.values()):
                raise UserError(f"{index}: has no weight_map of tensors and files; get the checkpoint again")
            self._file_of: dict[str, str] = found
        else:
            self._file_of = {
                name: file.name for file in sorted(self.directory.glob("*.safetensors")) for name in _names(file)
            }
        if not self._file_of:
            raise UserError(f"{directory}: no safetensors files there")

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU; the file is closed again, and its pages with it."""
        with _opened(self.directory / self._file_of[name]) as file:
            return file.get_tensor(name)

    def pieces(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """One tensor of at least one dimension on the CPU, some rows at a time."""
        with _opened(self.directory / self._file_of[name]) as file:
            whole = file.get_slice(name)
            rows, *rest = whole.get_shape()
            step = max(1, _PIECE // max(1, math.prod(rest)))
            for start in range(0, rows, step):
                piece = slice(start, min(start + step, rows))
                yield piece, whole[piece]

    def shape(self, name: str) -> tuple[int, ...]:
        with _opened(self.directory / self._file_of[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def is_integer(self, name: str) -> bool:
        """Whether a tensor is of integers or booleans, by the file's header."""
        with _opened(self.directory / self._file_of[name]) as file:
            return file.get_slice(name).get_dtype().rstrip("0123456789") in ("I", "U", "BOOL")

    def missing(self, model: nn.Module) -> list[str]:
        """Parameters of ``model``, dense or converted, that have no tensor here under any of their names."""
        return [names[0] for names in _wanted(model) if not any(name in self._file_of for name in names)]


def _names(file: Path) -> list[str]:
    with _opened(file) as opened:
        return list(opened.keys())


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({reason(error)}); get the checkpoint again") from None


def _wanted(model: nn.Module) -> list[list[str]]:
    """The names that every parameter has in the dense model: several where it is tied."""
    rotated = {id(p) for _, layer in poet_layers(model) for p in layer.parameters() if p is not layer.bias}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in rotated:
            names.setdefault(id(parameter), []).append(name)
    return [*names.values(), *([f"{name}.weight"] for name, _ in poet_layers(model))]


@torch.no_grad()
def materialize_(
    model: nn.Module,
    checkpoint: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    ready: Callable[[PoetLinear], object] | None = None,
) -> nn.Module:
    """Give a model that was built and converted on the meta device its memory and its weights, in place.

    Rotated layers are made one at a time, so that beside the finished part only one layer exists in full precision:
    a quantized 13B model is built in less than its quantized size and that layer. Returns ``model``.

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        poetx.convert_(model, poetx.PoetConfig(mode="mem", weight_format="int8"))
        poetx.materialize_(model, "path/to/checkpoint")

    Args:
        checkpoint: directory of safetensors files with the dense model's tensors under the model's own names. None:
            fresh weights, rotated layers as their config says, the rest as the model itself initializes it.
        seed: of the fresh part outside the rotated layers; torch's global generators are left as they were.
        ready: called with every rotated layer as soon as it has its weight.

    A weight of zeros, which no rotation moves, becomes a plain layer again, and a warning says so.

    Raises:
        UserError: no converted layer; a tensor that the checkpoint lacks, or has in another shape or with NaN; ``init``
            other than ``"keep"`` with a checkpoint; a module that does not know how to give a parameter or buffer its
            first value where the checkpoint does not.
    """
    layers = dict(poet_layers(model))
    if not layers:
        raise UserError(
            "the model has no PoetLinear layer; call poetx.convert_ on the meta device first (a model of "
            "method='single-step' is built with its weights, then converted)"
        )
    source = None if checkpoint is None else SafetensorsCheckpoint(checkpoint)
    inside = {id(module) for layer in layers.values() for module in layer.modules()}
    if source is not None:
        _check(model, layers, source)
        _check_buffers(model, inside, source)
    _allocate(model, inside, torch.device(device))
    _initialize(model, inside, seed, torch.device(device), fresh=source is None)
    for name, layer in layers.items():
        layer.to_empty(device=device)
        if source is None:
            layer.reset_parameters()
        else:
            _load_layer(layer, name, source)
        if ready is not None:
            ready(layer)
    if source is not None:
        _load_rest(model, inside, source)
        _leave_zeros_dense(model, layers)
    return model


def _leave_zeros_dense(model: nn.Module, layers: dict[str, PoetLinear]) -> None:
    """As :func:`poetx.convert_` does with weights that are there when it looks."""
    norms = {name: layer.base_norm / max(1, layer.out_features) ** 0.5 for name, layer in layers.items()}
    names = next_to_nothing(norms)
    to_dense_(model, names)
    for name in names:
        logger.warning("%s: left dense: %s", name, ZERO)


def _check(model: nn.Module, layers: dict[str, PoetLinear], source: SafetensorsCheckpoint) -> None:
    for layer in layers.values():
        if layer.config.init != "keep":
            raise UserError(
                f"init={layer.config.init!r} would discard the weights of {source.directory}; use init='keep'"
            )
    missing = source.missing(model)
    packed = [name for name in sorted(source.names) if name.endswith(_PACKED)]
    if packed:
        raise UserError(
            f"{source.directory}: holds weights that another library has quantized ({packed[0]}); load it with "
            "from_pretrained and that library, then call poetx.convert_"
        )
    if missing:
        raise UserError(
            f"{source.directory}: has no tensor {missing[0]}"
            + (f" ({len(missing)} are missing)" if len(missing) > 1 else "")
            + "; its names differ from the model's: load it with from_pretrained, then poetx.convert_"
        )
    known = {name for names in _wanted(model) for name in names} | dict(model.named_buffers()).keys()
    unused = sorted(source.names - known)
    if unused:
        logger.warning("%s: %d tensors are not the model's, %s among them", source.directory, len(unused), unused[0])


def _check_buffers(model: nn.Module, inside: set[int], source: SafetensorsCheckpoint) -> None:
    """Every buffer has values there, or its module can compute them: nothing else would ever write it."""
    if hasattr(model, "initialize_weights"):
        return
    names: dict[int, list[str]] = {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        names.setdefault(id(buffer), []).append(name)
    for module in model.modules():
        if id(module) in inside or hasattr(module, "reset_parameters"):
            continue
        for key, buffer in module._buffers.items():
            if buffer is None or not buffer.is_meta or key in module._non_persistent_buffers_set:
                continue
            if not source.names.intersection(names[id(buffer)]):
                raise UserError(
                    f"{source.directory}: has no tensor {names[id(buffer)][0]}, and {type(module).__name__} has no "
                    "reset_parameters to compute it"
                )


def _allocate(model: nn.Module, inside: set[int], device: torch.device) -> None:
    """Real memory for every meta tensor outside the rotated layers, tied ones together."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if id(module) in inside:
            continue
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in memo:
                    fresh = torch.empty_like(tensor, device=device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    memo[id(tensor)] = nn.Parameter(fresh, tensor.requires_grad) if is_parameter else fresh
                store[name] = memo[id(tensor)]


def _initialize(model: nn.Module, inside: set[int], seed: int, device: torch.device, *, fresh: bool) -> None:
    """What the model computes for itself: with a checkpoint only what that does not hold (rotary tables) counts."""
    initialize: Any = getattr(model, "initialize_weights", None)  # transformers
    with seeded(seed, device):
        if initialize is not None:
            initialize()
            return
        for name, module in model.named_modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if id(module) in inside or not own:
                continue
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
            elif fresh or any(key in module._non_persistent_buffers_set for key in module._buffers):
                raise UserError(f"{name}: {type(module).__name__} has no reset_parameters to give it its first values")


def _load_layer(layer: PoetLinear, name: str, source: SafetensorsCheckpoint) -> None:
    weight = source.read(f"{name}.weight")
    weight = weight.T if layer.transposed else weight
    _check_tensor(f"{name}.weight", weight, (layer.out_features, layer.in_features), source, floating=True)
    layer.load_dense_(weight.to(device=layer.skew_in.device, dtype=layer.weight_dtype))


def _load_rest(model: nn.Module, inside: set[int], source: SafetensorsCheckpoint) -> None:
    rotations = {id(p) for _, layer in poet_layers(model) for p in layer.parameters() if p is not layer.bias}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if name in source.names and id(tensor) not in rotations:
            shape, floating = source.shape(name), tensor.is_floating_point()
            if shape != tuple(tensor.shape) or not shape:
                value = source.read(name)
                _check_tensor(name, value, tuple(tensor.shape), source, floating=floating)
                tensor.copy_(value)
                continue
            for rows, value in source.pieces(name):
                _check_tensor(name, value, tuple(tensor[rows].shape), source, floating=floating)
                tensor[rows].copy_(value)


def _check_tensor(
    name: str, got: Tensor, want: tuple[int, ...], source: SafetensorsCheckpoint, *, floating: bool
) -> None:
    if floating and not got.is_floating_point():
        raise UserError(
            f"{source.directory}: {name} is {str(got.dtype).removeprefix('torch.')}: codes of a quantized weight; load "
            "it with from_pretrained and the library that made it, then call poetx.convert_"
        )
    if tuple(got.shape) != want:
        raise UserError(f"{source.directory}: {name} is {tuple(got.shape)}, the model's is {want}")
    if got.dtype.is_floating_point and got.dtype.itemsize > 1 and not got.isfinite().all():
        raise UserError(f"{source.directory}: {name} has NaN or infinity in it; get the file again")
