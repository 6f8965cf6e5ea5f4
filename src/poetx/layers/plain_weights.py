"""The plain weights of rotated layers, which every ``save_pretrained`` of ``transformers`` writes, too."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from poetx.errors import UserError, one_line
from poetx.layers.base import ConvertedLinear


def save_plain_weights_too() -> bool:
    """Have ``PreTrainedModel.save_pretrained`` add the plain weights of rotated layers, wherever they are in a model.

    Once a process, and for the class, as nothing else reaches a model that rotated layers are part of: a layer knows
    none of the modules around it. Models without one are saved as ever. Called for every rotated layer that is made,
    unpickled or used; imports nothing.

    Returns:
        Whether it was this call.
    """
    _accelerate_too()
    kind: Any = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if kind is None or hasattr(kind.save_pretrained, "adds_plain_weights"):
        return False
    save = kind.save_pretrained

    @functools.wraps(save)
    def save_pretrained(model: nn.Module, *args: Any, **settings: Any) -> Any:
        layers = dict(rotated_places(model))
        if not layers:
            return save(model, *args, **settings)
        _check_not_quantized(model)
        call = inspect.signature(save).bind(model, *args, **settings)
        if settings.get("distributed_checkpoint"):
            raise UserError(
                "save_pretrained: distributed_checkpoint=True would write no plain weights; leave it out, or use "
                "torch.distributed.checkpoint for a checkpoint to resume from"
            )
        if call.arguments.get("is_main_process", True):
            given: Mapping[str, Tensor] | None = call.arguments.get("state_dict")
            if given is not None:
                check_whole(model, layers, given)
            state = model.state_dict() if given is None else given
            call.arguments["state_dict"] = {**state, **plain_weights(layers, state, read=given is not None)}
        return save(*call.args, **call.kwargs)

    vars(save_pretrained)["adds_plain_weights"] = True
    kind.save_pretrained = save_pretrained
    return True


def _accelerate_too() -> None:
    """The same for ``Accelerator.save_model``, which saves what ``state_dict()`` of any model gives."""
    kind: Any = getattr(sys.modules.get("accelerate.accelerator"), "Accelerator", None)
    if kind is None or hasattr(kind.save_model, "adds_plain_weights"):
        return
    save = kind.save_model

    @functools.wraps(save)
    def save_model(self: Any, model: nn.Module, *args: Any, **settings: Any) -> Any:
        layers = {layer for _, layer in rotated_places(model)}
        hooks = [layer.register_state_dict_post_hook(_add_plain_weight) for layer in layers]
        try:
            return save(self, model, *args, **settings)
        finally:
            for hook in hooks:
                hook.remove()

    vars(save_model)["adds_plain_weights"] = True
    kind.save_model = save_model


def _add_plain_weight(layer: Any, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    state[f"{prefix}weight"] = layer.plain_weight().cpu()


def rotated_places(model: nn.Module) -> Iterator[tuple[str, ConvertedLinear]]:
    """Layers whose state has no plain weight, by every name they have: a shared one has several."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ConvertedLinear) and module.weight_name != "weight":
            yield name, module


def plain_weights(
    layers: Mapping[str, ConvertedLinear], state: Mapping[str, Tensor], *, read: bool = False
) -> dict[str, Tensor]:
    """``name.weight`` of every layer that ``state`` has, as a plain layer holds it; of a shared layer one tensor.

    The layers' own weights, or (``read``) those that ``state`` gives them.
    """
    made: dict[ConvertedLinear, Tensor] = {}
    found = {}
    for name, layer in layers.items():
        if f"{name}.skew_in" not in state:
            continue
        if layer._probe().is_meta:
            raise UserError(f"save_pretrained: {layer.label} is on the meta device and has no weight; materialize_ it")
        if layer not in made:
            made[layer] = (_as_in(state, name, layer) if read else layer).plain_weight().cpu()
        found[f"{name}.weight"] = made[layer]
    return found


def check_whole(model: nn.Module, layers: Mapping[str, ConvertedLinear], given: Mapping[str, Tensor]) -> None:
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


def _as_in(given: Mapping[str, Tensor], name: str, layer: ConvertedLinear) -> ConvertedLinear:
    """A copy of the layer ``name`` with its state in ``given``."""
    prefix = f"{name}."
    own = {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(prefix)}
    own.pop("weight", None)
    copied = copy.deepcopy(layer)
    try:
        copied.load_state_dict(own)
    except (RuntimeError, UserError) as error:
        raise UserError(f"save_pretrained: state_dict is not this model's: {name}: {one_line(error)}") from None
    return copied


def _check_not_quantized(model: nn.Module) -> None:
    """The quantizer of ``transformers`` would save the layers that it still has, and lose the converted ones."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise UserError(
            f"save_pretrained: some layers of {type(model).__name__} are still in the format of another library; "
            "dequantize them first, or convert them, too"
        )
