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


def average_(tensor: Tensor, noise: Callable[[], torch.Generator]) -> None:
    """Mean over the ranks, in place. Of bfloat16 the sum is float32, and rounded stochastically, alike on all ranks."""
    if (ranks := rank_count()) > 1:
        total = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        torch.distributed.all_reduce(total)
        total.div_(ranks)
        if total is not tensor:
            stochastic_round_(tensor, total, noise())


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
