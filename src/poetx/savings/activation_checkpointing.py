"""Activation checkpointing, a decoder layer at a time, that does not recompute what is recomputed already."""

from __future__ import annotations

import functools
import math
from typing import Any, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from poetx.config import Recompute
from poetx.errors import UserError
from poetx.layers.walk import converted_layers


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The items of the longest ``nn.ModuleList`` of one class: the repeated layers of a language model."""
    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(item) for item in module}) == 1
    ]
    return max(lists, key=len, default=[])


def checkpoint_layers_(model: nn.Module, *, recompute: str = "auto", preserve_rng_state: bool = True) -> nn.Module:
    """Keep only the input of every decoder layer for backward, and compute the layer again there, in place.

    ``transformers`` models use their own gradient checkpointing (not reentrant); any other model has the forward of
    its repeated layers wrapped. In effect in ``train()`` mode only. Returns ``model``.

    Args:
        recompute: how the rotated layers inside run, whatever their ``config.mode`` says, which stays as it is (their
            ``fast_tokens`` is set). ``"fast"``: what a layer keeps then lives only while that
            layer's backward runs, and its big product is computed twice (forward and recompute) instead of three
            times. ``"mem"`` keeps even that away. ``"auto"`` is *fast* as long as what it keeps, [tokens,
            out_features], is no larger than the layer's weight: up to in_features tokens; beyond, *mem*. Single-step
            layers, which keep their own output, are always *fast* then. Layers with a quantized weight stay in *mem*,
            their only mode.

        preserve_rng_state: as in ``torch.utils.checkpoint``: a layer that is computed again draws what it drew. False,
            which a CUDA graph needs, is for models that draw nothing; with dropout their gradients would be wrong.

    Raises:
        UserError: no repeated layers to be found, or another ``recompute``.
    """
    if recompute not in (choices := get_args(Recompute)):
        raise UserError(f"recompute={recompute!r}: must be one of {', '.join(choices)}")
    layers = decoder_layers(model)
    if not layers:
        raise UserError("the model has no nn.ModuleList of repeated layers to checkpoint; use torch.utils.checkpoint")
    settings = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
    current: Any = getattr(model, "activation_checkpointing_enable", None)  # the name of newer transformers
    older: Any = getattr(model, "gradient_checkpointing_enable", None)
    supported = getattr(model, "supports_gradient_checkpointing", False)
    if supported and current is not None:
        current(activation_checkpointing_kwargs=settings)
    elif supported and older is not None:
        older(gradient_checkpointing_kwargs=settings)
    else:
        for layer in layers:
            if not isinstance(layer.forward, functools.partial):
                layer.forward = functools.partial(_checkpointed, layer, settings)  # type: ignore[method-assign]
    for layer in layers:
        for _, rotated in converted_layers(layer):
            if rotated.config.weight_format is None:
                limits = {"fast": math.inf, "mem": 0, "auto": rotated.recomputed_fast_tokens}
                rotated.fast_tokens = limits[recompute]
    return model


def _checkpointed(layer: nn.Module, settings: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    plain = functools.partial(type(layer).forward, layer)
    if not (layer.training and torch.is_grad_enabled()):
        return plain(*args, **kwargs)
    return checkpoint(plain, *args, **settings, **kwargs)
