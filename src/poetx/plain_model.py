"""Saving a converted model as the plain model that it acts as, while it goes on training."""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from poetx.errors import UserError, one_line
from poetx.layers.poet import PoetLinear
from poetx.layers.walk import converted_layers


def save_pretrained(model: nn.Module, directory: str | os.PathLike[str], **settings: Any) -> None:
    """Write a ``transformers`` model as the plain model that it acts as; ``model`` trains on, untouched.

    The same files as from ``to_dense_`` of a copy, without the copy: they hold nothing of poetx, and any program that
    knows the architecture reads them. Memory: the plain weights once more, on the CPU.

    A converted model's own ``model.save_pretrained``, which the Trainer calls for its checkpoints, writes the layers'
    state beside the plain weights. ``from_pretrained`` reads the same model from there, and training goes on from it
    to the bit; but the files are larger, and other programs may not like tensors that they do not know. A
    ``state_dict`` that is given to it (of averaged weights, say) is checked to be whole, and makes the plain weights.

    Args:
        directory: made where it is missing.
        settings: what ``PreTrainedModel.save_pretrained`` takes besides, such as ``max_shard_size``.

    Raises:
        UserError: ``model`` has no ``save_pretrained``, is on the meta device, or holds layers that another library has
            quantized; ``directory`` is a file; a ``state_dict`` that is given is not this model's or not whole.
    """
    kind: Any = type(model)
    if not _has_save_pretrained(model):
        raise UserError(
            f"save_pretrained: {kind.__name__} is no transformers model (unwrap it first if it holds one); "
            "otherwise save poetx.to_dense_(copy.deepcopy(model)).state_dict()"
        )
    _check_not_quantized(model)
    if os.path.isfile(directory):  # noqa: PTH113 - transformers would only log it
        raise UserError(f"save_pretrained: {os.fspath(directory)} is a file; name a directory")
    state = plain_state_dict(model, settings.pop("state_dict", None))
    kind.save_pretrained(model, directory, state_dict=state, **settings)


def plain_state_dict(model: nn.Module, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict of ``to_dense_(model)``: rotated layers' weights on the CPU, everything else as it is, not copied.

    Args:
        given: a state of the model to take the values from; None: as it is now.

    Raises:
        UserError: a layer on the meta device, or without values since; ``given`` is not this model's or not whole.
    """
    layers = dict(_places(model))
    if given is not None:
        _check_whole(model, layers, given)
    else:
        for _, layer in converted_layers(model):
            layer.check_filled()
    state = model.state_dict() if given is None else given
    rotations = {f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict() if key != "bias"}
    return {key: value for key, value in state.items() if key not in rotations} | _plain_weights(
        layers, state, read=given is not None
    )


def save_plain_weights_too_(model: nn.Module) -> None:
    """Have ``save_pretrained`` of every ``transformers`` model in ``model`` with rotated layers add plain weights."""
    for module in model.modules():
        if _has_save_pretrained(module) and any(_places(module)):
            vars(module)["save_pretrained"] = functools.partial(_save_both, module)


def save_as_before_(model: nn.Module) -> None:
    """Undo :func:`save_plain_weights_too_` where no rotated layer is left."""
    for module in model.modules():
        own = vars(module).get("save_pretrained")
        if getattr(own, "func", None) is _save_both and not any(_places(module)):
            del vars(module)["save_pretrained"]


def _save_both(model: nn.Module, *args: Any, **settings: Any) -> Any:
    _check_not_quantized(model)
    kind: Any = type(model)
    save = kind.save_pretrained
    call = inspect.signature(save).bind(model, *args, **settings)
    if call.arguments.get("is_main_process", True):
        given: Mapping[str, Tensor] | None = call.arguments.get("state_dict")
        layers = dict(_places(model))
        if given is not None:
            _check_whole(model, layers, given)
        state = model.state_dict() if given is None else given
        call.arguments["state_dict"] = {**state, **_plain_weights(layers, state, read=given is not None)}
    return save(*call.args, **call.kwargs)


def _check_whole(model: nn.Module, layers: Mapping[str, PoetLinear], given: Mapping[str, Tensor]) -> None:
    """Raise :class:`UserError` where ``given`` is not of this model, or not all of it, tied tensors once."""
    plain = {f"{name}.weight" for name in layers}
    names: dict[int, list[str]] = defaultdict(list)
    for key, tensor in model.state_dict(keep_vars=True).items():
        names[id(tensor)].append(key)
    own = {key for several in names.values() for key in several}
    inside = {f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict() if key != "bias"}
    missing = [several[0] for several in names.values() if not inside.union(given).intersection(several)]
    missing += sorted(name for name in plain if name not in given and f"{name[:-6]}skew_in" not in given)
    if wrong := missing or sorted(given.keys() - own - plain):
        raise UserError(
            f"save_pretrained: state_dict is not this model's: {wrong[0]} is {'missing' if missing else 'unknown'}"
            f"{f' ({len(wrong)} are)' if len(wrong) > 1 else ''}; give model.state_dict(), or leave it out"
        )


def _as_in(given: Mapping[str, Tensor], name: str, layer: PoetLinear) -> PoetLinear:
    """A copy of the layer ``name`` with its state in ``given``."""
    prefix = f"{name}."
    own = {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}
    own.pop("weight", None)
    copied = copy.deepcopy(layer)
    try:
        copied.load_state_dict(own)
    except RuntimeError as error:
        raise UserError(f"save_pretrained: state_dict is not this model's: {name}: {one_line(error)}") from None
    return copied


def _has_save_pretrained(module: nn.Module) -> bool:
    return callable(getattr(type(module), "save_pretrained", None))


def _places(model: nn.Module) -> Iterator[tuple[str, PoetLinear]]:
    """Rotated layers by every name they have: a shared one has several."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PoetLinear):
            yield name, module


def _check_not_quantized(model: nn.Module) -> None:
    """The quantizer of ``transformers`` would save the layers that it still has, and lose the converted ones."""
    if any(_places(model)) and getattr(model, "hf_quantizer", None) is not None:
        raise UserError(
            f"save_pretrained: some layers of {type(model).__name__} are still in the format of another library; "
            "dequantize them first, or convert them, too"
        )


def _plain_weights(
    layers: Mapping[str, PoetLinear], state: Mapping[str, Tensor], *, read: bool = False
) -> dict[str, Tensor]:
    """``name.weight`` of every layer that ``state`` has, as a plain layer holds it; of a shared layer one tensor.

    The layers' own weights, or (``read``) those that ``state`` gives them.
    """
    made: dict[PoetLinear, Tensor] = {}
    found = {}
    for name, layer in layers.items():
        if f"{name}.skew_in" not in state:
            continue
        if layer.skew_in.is_meta:
            raise UserError(f"save_pretrained: {layer.label} is on the meta device and has no weight; materialize_ it")
        if layer not in made:
            made[layer] = (_as_in(state, name, layer) if read else layer).plain_weight().cpu()
        found[f"{name}.weight"] = made[layer]
    return found
