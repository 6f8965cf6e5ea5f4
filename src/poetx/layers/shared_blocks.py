"""Building the rotations once for several passes, where they cannot have changed in between."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from poetx.layers.poet import PoetLinear
from poetx.layers.walk import poet_layers
from poetx.ops.cayley import side_blocks


@contextlib.contextmanager
def shared_blocks(model: nn.Module, *, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Build the blocks G of every *fast* layer once for all forward passes inside: for gradient accumulation.

        with poetx.shared_blocks(model):
            for batch in micro_batches:
                model(**batch).loss.backward()
        optimizer.step()

    Same numbers, to the bit. All G of the model stay alive meanwhile, where *fast* holds them between a layer's forward
    and its backward only: about twice the bytes of the rotations in the layers' dtype. *mem* layers never keep G and
    ignore this, and so do sharded parameters (FSDP2), layers whose input has another dtype, and passes of so many
    tokens that the weight is rotated.

    Args:
        dtype: of the layers' inputs, if that is not their weights': autocast's.

    Raises:
        RuntimeError: on leaving, if a rotation changed inside, by an optimizer step or a merge: passes after that used
            rotations that were out of date. A write through ``.data`` that was undone before is not seen.
    """
    layers = [layer for _, layer in poet_layers(model) if _always_fast(layer) and _plain(layer)]
    before = [_fingerprint(layer) for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                G_in, G_out = side_blocks(layer.sides, layer.order, dtype or layer.weight_dtype)
                layer.shared_blocks = G_in, G_out
        yield
    finally:
        for layer in layers:
            layer.shared_blocks = None
    for layer, (versions, values) in zip(layers, before, strict=True):
        now = _fingerprint(layer)
        if now[0] != versions or not torch.equal(now[1], values):
            raise RuntimeError(
                f"{layer.label}: its rotations changed inside shared_blocks(); "
                "step the optimizer and merge outside of it"
            )


def _always_fast(layer: PoetLinear) -> bool:
    return layer.config.mode == "fast" if layer.fast_tokens is None else layer.fast_tokens == math.inf


def _plain(layer: PoetLinear) -> bool:
    return all(type(skew.data) is Tensor and not skew.is_meta for skew in layer.rotations)


def _fingerprint(layer: PoetLinear) -> tuple[list[int], Tensor]:
    """What tells rotations that were written: their versions, and the sums of their bits, for ``.data`` counts none."""
    bits = (skew.detach().view(getattr(torch, f"int{8 * skew.itemsize}")) for skew in layer.rotations)
    return [skew._version for skew in layer.rotations], torch.stack([b.sum(dtype=torch.int64) for b in bits])
