"""Frozen weights in host memory, brought to the device for each use."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from poetx.errors import UserError, one_line
from poetx.layers.single_step import SingleStepLinear
from poetx.layers.walk import converted_layers
from poetx.ops.host import HostQueue


def offload_frozen_(
    model: nn.Module,
    device: torch.device | str | None = None,
    *,
    prefetch: int = 1,
    keep: int = 0,
    directory: str | Path | None = None,
) -> nn.Module:
    """Keep the weights that the rotated layers turn in host memory, in place; all else moves to ``device``.

    A layer's weight, or its codes and scales, with its extra bits where it has them, comes to the device whenever
    forward or backward multiplies by it, on a stream of its own while the layer before computes. Nothing goes back
    until a merge, which writes each weight once; with ``method="single-step"``, whose weights change at every step,
    :meth:`poetx.POETX.step` brings and writes each once more. Rotations or momenta, gradients and optimizer state stay
    on the device, and so does everything that is not rotated (embeddings, norms, head). Losses, gradients and merged
    weights are those of a model that is on the device, bit for bit.

    Device memory: ``1 + prefetch + keep`` weights in place of all of them. Host memory: the weights, in locked pages.
    Traffic in a micro-batch: each weight twice; with activation checkpointing three times, or twice where ``keep`` is
    as many as a decoder layer has, so that what recomputes it also serves its backward.

    Call it after :func:`poetx.convert_`, where the model fits (on the CPU), and before the optimizer is built.
    ``model.to(device)`` leaves these weights where they are; a copy of the model keeps its own in pages that are not
    locked, which is slower; :func:`poetx.to_dense_` leaves plain layers in host memory.

    Args:
        device: what computes; None: where the model's parameters are.
        prefetch: weights whose copies are ahead of their use; 0 waits for each.
        keep: weights that stay on the device after their use, for another one in the same forward or backward pass.
        directory: on a disk, for the weights of a model that the host has not the memory for either, in files without a
            name: every pass reads them from there as far as memory does not hold them, a merge writes them. Linux only.

    Raises:
        UserError: no converted layer; a single-step layer that a :class:`poetx.POETX` trains already; the CPU;
            ``prefetch`` or ``keep`` below 0; a ``directory`` without room, in memory, or for single-step layers, which
            every step would write.
    """
    for name, number in {"prefetch": prefetch, "keep": keep}.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise UserError(f"{name}={number!r}: must be a whole number of at least 0")
    if directory is not None and not (directory and isinstance(directory, (str, Path))):
        raise UserError(f"directory={directory!r}: must be the path of a directory, a str or pathlib.Path")
    layers = dict(converted_layers(model))
    if not layers:
        raise UserError("the model has no converted layer to offload; call poetx.convert_ first")
    where = next(p.device for p in model.parameters()) if device is None else torch.device(device)
    if where.type == "cpu":
        raise UserError(
            "offload_frozen_: the device is the CPU, where weights are in host memory anyway; give the one that "
            "computes, such as device='cuda'"
        )
    place = None if directory is None else Path(directory)
    if place is not None and any(isinstance(layer, SingleStepLinear) for layer in layers.values()):
        raise UserError(
            f"offload_frozen_: directory={directory}: single-step layers would write all of it at every step"
        )
    try:
        torch.empty(0, device=where)
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"offload_frozen_: device={where}: {one_line(error)}") from None
    queue = next((layer.host for layer in layers.values() if layer.host), None) or HostQueue()
    queue.prefetch, queue.keep, queue.directory = prefetch, keep, place
    for layer in layers.values():
        if layer.host is None:
            layer.keep_in_host_memory_(queue, where)
    return model if where.type == "meta" else model.to(where)
