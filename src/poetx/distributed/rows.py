"""Sharded tensors as a file has them: whole, gathered to the first rank or read by rows, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from poetx.distributed.sharded import is_sharded, local, padded, shard_group

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Part(NamedTuple):
    """A tensor, or this rank's part of one, that goes by a name.

    like: the parameter whose rows it is sharded by, of its shape or flat; None: it is whole on every rank.
    """

    name: str
    value: Tensor
    like: DTensor | None

    @classmethod
    def of(cls, name: str, value: Tensor, parameter: Tensor | None) -> Part:
        """Of the state dict of a model, or of what an optimizer keeps of ``parameter``; numbers are never sharded."""
        return cls(name, value.detach(), parameter if is_sharded(parameter) and value.ndim else None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        if self.like is None or is_sharded(self.value):
            return tuple(self.value.shape)
        return (self.like.numel(),)


def whole_on_first(parts: Iterable[Part]) -> Iterator[Tensor]:
    """The whole tensors on the first rank, in order; elsewhere what is there. Every rank has to take all of them."""
    for part in parts:
        if part.like is None:
            yield part.value
            continue
        group, own = shard_group(part.like), local(part.value)
        chunk = padded(own, part.like)
        first = group.rank() == 0
        rows = chunk.new_empty(group.size(), chunk.numel()) if first else chunk
        torch.distributed.gather(chunk, list(rows) if first else None, group=group, group_dst=0)
        yield rows.view(own.dtype).flatten()[: part.like.numel()].view(part.shape) if first else own
        del rows, chunk


def own_part(file: Any, name: str, like: Tensor | None) -> Tensor:
    """What this rank keeps of a tensor in an open safetensors file, of which it reads no more.

    Args:
        like: the parameter that it belongs to.

    Returns:
        A DTensor like ``like`` where the shapes are the same, a plain tensor of this rank's elements where it is flat,
        and the whole tensor where ``like`` is not sharded or has another size.
    """
    stored = file.get_slice(name)
    shape = tuple(stored.get_shape())
    if not is_sharded(like) or not shape or shape not in (tuple(like.shape), (like.numel(),)):
        return file.get_tensor(name)
    width = like.numel() // like.shape[0] if shape != tuple(like.shape) else 1
    group = shard_group(like)
    chunk = -(-like.shape[0] // group.size())
    start, stop = (min(like.shape[0], i * chunk) for i in (group.rank(), group.rank() + 1))
    piece: Tensor = stored[start * width : stop * width].to(local(like).device)
    if shape != tuple(like.shape):
        return piece
    from torch.distributed.tensor import DTensor

    place = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(piece, like.device_mesh, like.placements, run_check=False, **place)
