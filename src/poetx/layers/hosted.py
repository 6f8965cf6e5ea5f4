"""Layers whose weight can be in host memory while everything else of them is where the model computes."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from poetx.errors import UserError
from poetx.layers.base import ConvertedLinear, RotatedWeight
from poetx.layers.weights import DenseWeight, HostWeight, PackedWeight
from poetx.ops.host import HostQueue, in_host_memory


class HostedLinear(ConvertedLinear):
    """A converted layer that says what its weight is stored in, :meth:`_stored_weight` and :meth:`_of_the_weight`."""

    _like: Tensor
    #: Where the weight is in host memory (:func:`poetx.savings.offload_frozen_`): what brings it to the device.
    host: HostQueue | None = None

    @property
    def frozen_weight(self) -> DenseWeight | PackedWeight | HostWeight:
        """The stored weight as an object that is fetched and written, however and wherever it is stored."""
        weight = self._stored_weight()
        if self.host is None:
            return weight
        me = weakref.ref(self)
        return HostWeight(weight, self.device, self.host, lambda: (now := me()) and now._stored_weight())

    @property
    def device(self) -> torch.device:
        """Where the layer computes, wherever its weight is."""
        return self._probe().device

    def _stored_weight(self) -> DenseWeight | PackedWeight:
        return DenseWeight(self._parameters[self.weight_name], None)  # pyright: ignore[reportArgumentType]

    def _of_the_weight(self) -> list[tuple[dict[str, Any], str]]:
        """Where the weight's tensors are found: (a module's parameters or buffers, name)."""
        return [(self._parameters, self.weight_name)]

    def keep_in_host_memory_(self, queue: HostQueue, device: torch.device) -> None:
        """Move the weight, codes and scales and extra bits with it, to host memory, for use on ``device`` by ``queue``.

        Or to files, where the queue has a directory for them.

        Everything else, bias, rotations and permutations, moves as ever. One layer's weight is there twice meanwhile.
        """
        for tensors, name in self._of_the_weight():
            tensor: Tensor = tensors[name]
            kept = in_host_memory(tensor.detach(), device, queue.directory)
            parameter = name == self.weight_name
            tensors[name] = RotatedWeight.of(kept, mark=getattr(tensor, "_mark", None)) if parameter else kept
        self.host = queue

    def host_tensors(self) -> list[Tensor]:
        """What of this layer is in host memory; nothing unless :attr:`host`."""
        return [] if self.host is None else [tensors[name] for tensors, name in self._of_the_weight()]

    def plain_weight(self) -> Tensor:
        plain = super().plain_weight()
        if self.host is None:
            return plain
        directory = self.host.directory
        return plain.cpu() if directory is None else in_host_memory(plain, torch.device("cpu"), directory)

    def _probe(self) -> Tensor:
        return self._like

    @contextlib.contextmanager
    def _host_tensors_stay(self, fn: Callable[..., Any]) -> Iterator[None]:
        """What is in host memory is out of ``fn``'s reach inside the block.

        Raises:
            UserError: ``fn`` changes the dtype.
        """
        if self.host is None:
            yield
            return
        if fn(self._probe()).dtype != self.weight_dtype:
            raise UserError(f"{self.label}: its weight is in host memory; change dtypes before offload_frozen_")
        kept = [(tensors, name, tensors[name]) for tensors, name in self._of_the_weight()]
        try:
            for tensors, name, _ in kept:
                tensors[name] = None
            yield
        finally:
            for tensors, name, tensor in kept:
                tensors[name] = tensor

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> HostedLinear:
        """``.to()`` and the like: what is in host memory stays there."""
        with self._host_tensors_stay(fn):
            return self._move(fn, recurse)

    def _move(self, fn: Callable[..., Any], recurse: bool) -> HostedLinear:
        super()._apply(fn, recurse)
        return self
