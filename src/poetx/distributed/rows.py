"""Sharded tensors as a file has them: whole, gathered to the first rank or read by rows, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from poetx.distributed.sharded import is_sharded, local, own_rows, padded, shard_group, shard_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def whole_on_first(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The whole tensors on the first rank, in order; elsewhere what is there. Every rank has to take all of them."""
    for tensor in tensors:
        if not is_sharded(tensor):
            yield tensor
            continue
        if _by_columns(tensor):
            yield next(whole_on_first([tensor.T])).T
            continue
        group, own = shard_group(tensor), local(tensor)
        if not tensor.numel():
            yield own.new_empty(tensor.shape)
            continue
        chunk = padded(own, tensor)
        first = group.rank() == 0
        rows = chunk.new_empty(group.size(), chunk.numel()) if first else chunk
        torch.distributed.gather(chunk, list(rows) if first else None, group=group, group_dst=0)
        yield rows.view(own.dtype).flatten()[: tensor.numel()].view(tensor.shape) if first else own
        del rows, chunk


def _by_columns(tensor: DTensor) -> bool:
    """Whether ``tensor`` is the transpose of what is sharded by rows, as a state holds a Conv1D's weight."""
    return any(placement.is_shard(dim=1) for placement in tensor.placements)


def own_part(file: Any, name: str, like: Tensor | None) -> Tensor:
    """What this rank keeps of a tensor in an open safetensors file, of which it reads no more.

    Args:
        like: what it takes the place of, or belongs to as an optimizer's state.

    Returns:
        A DTensor like ``like`` where that is sharded and of this shape, or flat in the file; else the whole tensor.
    """
    stored = file.get_slice(name)
    shape = tuple(stored.get_shape())
    if not is_sharded(like) or not shape or shape not in (tuple(like.shape), (like.numel(),)):
        return file.get_tensor(name)
    if _by_columns(like):
        columns = own_rows(like.T)
        piece: Tensor = stored[:, columns.start : columns.stop].T.contiguous()
        turned: Any = like.T
        return shard_of(piece.to(local(like).device), turned).T
    width = 1 if shape == tuple(like.shape) else like.numel() // like.shape[0]
    rows = own_rows(like)
    piece = stored[rows.start * width : rows.stop * width]
    return shard_of(piece.to(local(like).device).view(-1, *like.shape[1:]), like)
