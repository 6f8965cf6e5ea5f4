"""Which rank of how many this process is, and what they make of a step together: its sums, means and maxima."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from poetx.ops.random import stochastic_round_


def rank_count() -> int:
    """Ranks of the process group, 1 without one."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process in its group, from 0; 0 without a group."""
    return torch.distributed.get_rank() if rank_count() > 1 else 0


def on_any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    """Whether each flag is set on one rank at least, with one small reduction on ``device``, which it waits for."""
    if rank_count() == 1 or not flags:
        return flags
    total = torch.tensor(flags, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(total, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in total.tolist()]


def sent_dtype(values: torch.dtype, weight: torch.dtype) -> torch.dtype:
    """What a mean over the ranks is sent in: bfloat16 where the values or their layer's weight are, as dense gradients.

    The products that ``values`` come from were rounded to the weight's dtype.
    """
    return torch.bfloat16 if torch.bfloat16 in (values, weight) else values


def average_(tensor: Tensor, noise: Callable[[], torch.Generator], dtype: torch.dtype) -> None:
    """Mean over the ranks, in place, sent in ``dtype``.

    In bfloat16 each rank gets one part of ``tensor`` from all, sums it in float32, and gives the mean to all. What is
    sent is rounded stochastically, so the mean is unbiased, however little one rank adds to it.

    Args:
        noise: this rank's own.
    """
    if (ranks := rank_count()) == 1:
        return
    if dtype != torch.bfloat16:
        torch.distributed.all_reduce(tensor)
        tensor.div_(ranks)
        return
    generator, size = noise(), tensor.numel()
    sent = tensor.new_zeros(ranks, -(-size // ranks), dtype=dtype)
    sent_flat, parts = sent.view(-1)[:size], torch.empty_like(sent)
    if tensor.dtype == dtype:
        sent_flat.copy_(tensor.flatten())
    else:
        stochastic_round_(sent_flat, tensor.flatten(), generator)
    torch.distributed.all_to_all_single(parts, sent)
    own = stochastic_round_(sent[0], parts.float().mean(0), generator)
    torch.distributed.all_gather(list(parts), own)
    tensor.copy_(parts.view(-1)[:size].view_as(tensor))


def sum_(tensor: Tensor) -> Tensor:
    """Sum over the ranks of each entry, in place."""
    if rank_count() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def maximum_(tensors: list[Tensor]) -> None:
    """Largest value over the ranks of each entry, in place, with one reduction for all tensors of a device."""
    if rank_count() > 1 and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat, op=torch.distributed.ReduceOp.MAX)
        for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(piece.view(tensor.shape))
