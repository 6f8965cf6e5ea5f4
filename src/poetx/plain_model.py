"""Saving a converted model as the plain model that it acts as, while it goes on training."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from poetx.errors import UserError
from poetx.layers.plain_weights import check_whole, plain_weights, rotated_places
from poetx.layers.walk import check_model, converted_layers


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
    check_model(model)
    kind: Any = type(model)
    if not isinstance(directory, (str, os.PathLike)):
        raise UserError(f"save_pretrained: directory={directory!r}: name a directory")
    if not callable(getattr(kind, "save_pretrained", None)):
        raise UserError(
            f"save_pretrained: {kind.__name__} is no transformers model (unwrap it first if it holds one); "
            "otherwise save poetx.to_dense_(copy.deepcopy(model)).state_dict()"
        )
    if os.path.isfile(directory):  # noqa: PTH113 - transformers would only log it
        raise UserError(f"save_pretrained: {os.fspath(directory)} is a file; name a directory")
    state = plain_state_dict(model, settings.pop("state_dict", None))
    own = getattr(model, "generation_config", None)
    changed: Any = {} if own is None else {"generation_config": writable_generation(own)}
    vars(model).update(changed)
    try:
        kind.save_pretrained(model, directory, state_dict=state, **settings)
    finally:
        vars(model).update(dict.fromkeys(changed, own))


def writable_generation(config: Any) -> Any:
    """A copy of a ``GenerationConfig`` that can be saved; None of None.

    Some checkpoints (Llama 2's) set what only sampling reads where nothing is sampled, which transformers reads but
    refuses to write.
    """
    config = copy.deepcopy(config)
    if config is not None and not config.do_sample:
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(config, name, None)
    return config


def plain_state_dict(model: nn.Module, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict of ``to_dense_(model)``: rotated layers' weights on the CPU, everything else as it is, not copied.

    Args:
        given: a state of the model to take the values from; None: as it is now.

    Raises:
        UserError: a layer on the meta device, or without values since; ``given`` is not this model's or not whole.
    """
    layers = dict(rotated_places(model))
    if given is not None:
        check_whole(model, layers, given)
    else:
        for _, layer in converted_layers(model):
            layer.check_filled()
    state = model.state_dict() if given is None else given
    rotations = {f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict() if key != "bias"}
    return {key: value for key, value in state.items() if key not in rotations} | plain_weights(
        layers, state, read=given is not None
    )
