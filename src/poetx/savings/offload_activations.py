"""What checkpointed decoder layers keep, their inputs, in host memory between forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from poetx.errors import UserError
from poetx.ops.host import Copy, Return, empty_in_host_memory
from poetx.savings.activation_checkpointing import decoder_layers

#: Elements below which a tensor stays where it is: its copy would cost a launch and spare nothing.
_FEW = 1 << 16


class _Away:
    """A tensor in host memory, whose pages are free again when nobody holds it, and its copy on the way back."""

    def __init__(self, held: Tensor, device: torch.device, before: _Away | None, free: list[Tensor]) -> None:
        self.held, self.device, self.before, self._free = held, device, before, free
        self._copy: Copy | None = None
        self._taken = False

    def bring(self) -> None:
        """Start its copy, if nobody has taken it before the one that was saved after it."""
        if self._copy is None and not self._taken:
            self._copy = Copy((self.held,), self.device)

    def take(self) -> Tensor:
        copy, self._copy, self._taken = self._copy or Copy((self.held,), self.device), None, True
        return copy.arrived()[0]

    def __del__(self) -> None:
        if self._copy is not None:
            self._copy.arrived()  # its memory is written to until then
        self._free.append(self.held)


class HostActivations:
    """Hooks for what autograd saves: each large tensor goes to host memory beside what is computed next.

    Backward takes them back, each while the layer behind it is computed: the one that was saved before it is brought
    as soon as one is used. The host waits for nothing, and the device holds two of them at most. Pages are used again
    in the next pass.

    Args:
        few: elements below which a tensor stays on the device.

    Attributes:
        moved: bytes that went to host memory and come back. size: of its pages. told: called with each tensor there.
    """

    def __init__(self, few: int = _FEW) -> None:
        self.few, self.moved, self.size = few, 0, 0
        self.told: Callable[[Iterable[Tensor]], object] = lambda tensors: None
        self._free: dict[Any, list[Tensor]] = {}
        self._own: set[int] = set()
        self._latest: _Away | None = None
        self._going: Return | None = None

    def __reduce__(self) -> Any:  # a copy of a model has pages of its own
        return HostActivations, (self.few,)

    def hooks(self, model: nn.Module) -> saved_tensors_hooks:
        """To be entered around a forward pass of ``model``, whose own tensors stay where they are."""
        self._latest = None
        self._own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        own = tensor.untyped_storage()._cdata in self._own
        if own or tensor.numel() < self.few or not tensor.is_floating_point():
            return tensor
        free = self._free.setdefault((tensor.shape, tensor.dtype), [])
        if free:
            held = free.pop()
        else:
            held = empty_in_host_memory(tensor, tensor.device)
            self.size += held.numel() * held.element_size()
        self.told([held])
        self.moved += held.numel() * held.element_size()
        if self._going is not None:
            self._going.over()  # whose values' memory is free for later work then
        self._going = Return([held], [tensor.detach()], tensor.device)
        self._going.start()
        self._latest = _Away(held, tensor.device, self._latest, free)
        return self._latest

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Away):
            return packed
        if self._going is not None:
            self._going.over()
            self._going = None
        tensor = packed.take()
        if packed.before is not None:
            packed.before.bring()
        return tensor


def offload_activations_(model: nn.Module, *, few: int = _FEW) -> HostActivations:
    """Keep what every forward pass of ``model`` saves for backward in host memory, in place: for long contexts.

    For a model whose decoder layers are checkpointed (:func:`poetx.savings.checkpoint_layers_`), of which each saves
    its input only: tokens × hidden size × layers leave the device, and go back once. What runs inside a checkpointed
    layer, and what its recomputation saves, stays on the device, and so do tensors of few elements. Numbers are the
    same to the bit.

    Raises:
        UserError: no repeated layers to be found.
    """
    body: Any = getattr(model, "base_model", model)
    if not decoder_layers(body):
        raise UserError("the model has no nn.ModuleList of repeated layers whose inputs could be offloaded")
    kept = body.host_activations = HostActivations(few)
    body.forward = functools.partial(_offloaded, body)
    return kept


def host_activations(model: nn.Module) -> HostActivations | None:
    """What :func:`offload_activations_` gave ``model``."""
    return getattr(getattr(model, "base_model", model), "host_activations", None)


def _offloaded(body: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(body).forward, body)
    kept = host_activations(body)
    if kept is None or not (body.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    with kept.hooks(body):
        return forward(*args, **kwargs)
