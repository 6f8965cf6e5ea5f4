"""Whether every rank holds the same weights: one number a tensor, compared with one small reduction."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from poetx.distributed.ranks import rank_count
from poetx.distributed.sharded import is_sharded
from poetx.errors import AgreedError

_COLUMNS = 1024


def check_alike(tensors: Iterable[tuple[str, Tensor]], when: str) -> None:
    """Compare tensors by their bits over the ranks; reads each once, and makes nothing of its size.

    Sharded ones are left out: no other rank has the same part.

    Raises:
        AgreedError: on every rank, with the name of the first that differs.
    """
    if rank_count() == 1:
        return
    named = [(name, tensor) for name, tensor in tensors if not is_sharded(tensor)]
    if not named:
        return
    device = named[0][1].device
    sums = torch.stack([checksum(tensor).to(device) for _, tensor in named])
    extremes = torch.cat([sums, -sums])
    torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX)
    high, low = extremes.chunk(2)
    differ = (high != -low).tolist()
    if any(differ):
        raise AgreedError(
            f"{named[differ.index(True)][0]}: differs between ranks {when} ({sum(differ)} of {len(named)} tensors do); "
            "gradients are not averaged (the model is not in DistributedDataParallel), a rank computes other numbers "
            "(another kind of device, or a faulty one), or it was changed alone; mend that and go back to a checkpoint"
        )


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """A number, int64, of the bits of ``tensor`` and of where they are: the sum of its words, weighted by their places.

    Exact and without order of summation, so the same on every device.
    """
    if is_traceable_wrapper_subclass(tensor):
        parts = [checksum(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
        return _weighted(torch.stack(parts))
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = data.numel() // 8 * 8
    if data.storage_offset() % 8:
        data = data.clone()
    words = data[:whole].view(torch.int64)
    full = words.numel() // _COLUMNS * _COLUMNS
    grid = words[:full].view(-1, _COLUMNS)
    rest = torch.cat([words[full:], data[whole:].to(torch.int64)])
    return _weighted(grid.sum(0)) + _weighted(grid.sum(1)) + _weighted(rest)


def checksum_of(model: torch.nn.Module) -> str | None:
    """Sixteen hexadecimal digits of all parameters of ``model``; None where some are on the meta device."""
    parameters = list(model.parameters())
    if any(parameter.is_meta for parameter in parameters):
        return None
    return f"{int(_weighted(torch.stack([checksum(parameter).cpu() for parameter in parameters]))) % 2**64:016x}"


def _weighted(values: Tensor) -> Tensor:
    """Σ (2i + 1)·v_i modulo 2⁶⁴; odd factors lose no bit."""
    return (values * (2 * torch.arange(values.numel(), device=values.device) + 1)).sum()
