"""Parameters whose rows are sharded over ranks, as FSDP2's ``fully_shard`` leaves them between two steps.

What is sharded: every parameter, by rows of its first dimension: embeddings and norms as in any model; of a converted
layer the packed rotations by blocks, and the frozen weight, a parameter without gradient, by rows. Buffers
(permutations, counters, norms) are on every rank.

Forward and backward need nothing from here: ``fully_shard`` puts whole parameters, ordinary tensors, in place for as
long as a layer runs, and reduce-scatters the gradients of those that have one. An optimizer steps the shards.

Between steps a merge changes a layer's weight as a whole: its permutations mix all rows. So the layers are dealt out
(:func:`deal_`). For each round of as many layers as there are ranks, every rank gathers one of them, changes it as one
process would (permutations and rounding noise come from (seed, layer, count), drawn for the whole weight) and scatters
the rows back. So the weights are those of one process to the bit, no rank ever holds more than one layer beside its
shards, a rank folds one layer in N, and what is sent is each layer once there and once back.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from poetx.errors import UserError
from poetx.ops.transaction import swap_

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
L = TypeVar("L", bound=nn.Module)


def is_sharded(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """Whether ``tensor`` is a DTensor: what is there of it on this rank is not all of it."""
    module = sys.modules.get("torch.distributed.tensor")  # nobody has one where it is not imported
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of ``tensor``, in the same memory; the tensor itself where it is whole."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def shard_group(tensor: DTensor) -> Any:
    """The process group that the rows of ``tensor`` are sharded over, in their order."""
    mesh = tensor.device_mesh
    return mesh.get_group(next(i for i, placement in enumerate(tensor.placements) if placement.is_shard()))


def own_rows(tensor: Tensor) -> slice:
    """Which rows of ``tensor`` this rank holds: all where it is whole; of a scalar one."""
    rows = tensor.shape[0] if tensor.ndim else 1
    if not is_sharded(tensor):
        return slice(0, rows)
    return rows_of(tensor, shard_group(tensor).rank())


def rows_of(tensor: DTensor, rank: int) -> slice:
    """Which rows of ``tensor`` a rank of its group holds."""
    rows = tensor.shape[0]
    chunk = -(-rows // shard_group(tensor).size())
    return slice(min(rows, rank * chunk), min(rows, (rank + 1) * chunk))


def compute_device(tensor: Tensor) -> torch.device:
    """Where layers compute with ``tensor``: with ``CPUOffloadPolicy`` shards are elsewhere."""
    return torch.device(tensor.device_mesh.device_type) if is_sharded(tensor) else tensor.device


def shard_sum_(values: Tensor, like: Tensor) -> Tensor:
    """Sum of ``values`` over the ranks that hold shards of ``like``, in place; as they are where it is whole."""
    if is_sharded(like):
        torch.distributed.all_reduce(values, group=shard_group(like))
    return values


def whole_blocks(tensor: DTensor, block_size: int) -> tuple[Tensor, int]:
    """This rank's rows with those of other ranks that are in the same blocks, and the place of the first of them.

    Sent are the rows of blocks that straddle ranks, and nothing where none does.
    """
    own, group = local(tensor).detach(), shard_group(tensor)
    mine = rows_of(tensor, me := group.rank())

    def reach(rows: slice) -> slice:
        first, last = rows.start // block_size * block_size, -(-rows.stop // block_size) * block_size
        return slice(first, min(last, tensor.shape[0])) if rows.start < rows.stop else rows

    wanted = reach(mine)
    if wanted == mine:  # so no other rank asks for any
        return own, mine.start
    found = own.new_empty(wanted.stop - wanted.start, *own.shape[1:])
    found[mine.start - wanted.start : mine.stop - wanted.start] = own
    operations = []
    for peer in (index for index in range(group.size()) if index != me):
        theirs = rows_of(tensor, peer)
        for operation, held, asked, place in (
            (torch.distributed.isend, mine, reach(theirs), found),
            (torch.distributed.irecv, theirs, wanted, found),
        ):
            first, last = max(held.start, asked.start), min(held.stop, asked.stop)
            if first < last:
                rows = place[first - wanted.start : last - wanted.start].view(torch.uint8)
                operations.append(torch.distributed.P2POp(operation, rows, group=group, group_peer=peer))
    for work in torch.distributed.batch_isend_irecv(operations):
        work.wait()
    return found, wanted.start


def shard_of(own: Tensor, like: DTensor) -> DTensor:
    """``own`` as this rank's rows of a tensor that is sharded as ``like`` is."""
    from torch.distributed.tensor import DTensor

    place = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(own, like.device_mesh, like.placements, run_check=False, **place)


def refuse_sharded(params: Iterable[Tensor], who: str, *, rows: bool = False) -> None:
    """Say at once what would end in an error of torch at the first merge.

    Args:
        rows: those of ``fully_shard``, sharded by rows, are fine.

    Raises:
        UserError: one of ``params`` is a DTensor.
    """
    for parameter in params:
        if is_sharded(parameter) and not (rows and _by_rows(parameter)):
            remedy = "shard by rows, as fully_shard does by itself" if rows else "use DistributedDataParallel"
            raise UserError(
                f"{who}: a parameter of shape {tuple(parameter.shape)} is a DTensor of placements "
                f"{parameter.placements}, which is not supported yet; {remedy}"
            )


def _by_rows(tensor: DTensor) -> bool:
    from torch.distributed.tensor import Replicate, Shard

    *outer, last = tensor.placements
    return type(last) is Shard and last.dim == 0 and all(isinstance(placement, Replicate) for placement in outer)


class _Whole(Generic[L]):
    """The sharded parameters of a layer, whole on one rank of their group, the owner; then its buffers, on all."""

    def __init__(self, layer: L, owner: int) -> None:
        self.layer, self.owner = layer, owner
        places: list[Any] = [(module, *named) for module in layer.modules() for named in module._parameters.items()]
        self._places = [(m, name, p) for m, name, p in places if is_sharded(p) and name != "bias"]
        self.group = shard_group(self._places[0][2])
        self.device = self._places[0][2].device_mesh.device_type
        self.is_mine = self.group.rank() == owner
        self._buffers: list[Tensor] = []  # [ranks, chunk] of each parameter, on the owner

    def gather(self) -> None:
        """Send the rows of every parameter to the owner, and put whole parameters in place there."""
        for module, name, parameter in self._places:
            chunk = padded(local(parameter), parameter)
            pieces = None
            if self.is_mine:
                self._buffers.append(chunk.new_empty(self.group.size(), chunk.numel()))
                pieces = list(self._buffers[-1])
                rows = self._buffers[-1].view(parameter.dtype)
                whole = rows.view(-1, *parameter.shape[1:])[: parameter.shape[0]]
                module._parameters[name] = nn.Parameter(whole, requires_grad=False)
            torch.distributed.gather(chunk, pieces, group=self.group, group_dst=self.owner)

    def put_back(self) -> None:
        """Put the sharded parameters back in their places."""
        for module, name, parameter in self._places:
            module._parameters[name] = parameter

    def scatter(self) -> list[tuple[Tensor, Tensor]]:
        """This rank's rows of what the owner has, beside those that they replace."""
        pairs = []
        for index, (_, _, parameter) in enumerate(self._places):
            chunk = torch.empty_like(padded(local(parameter), parameter))
            pieces = list(self._buffers[index]) if self.is_mine else None
            torch.distributed.scatter(chunk, pieces, group=self.group, group_src=self.owner)
            target = local(parameter)
            rows = chunk.view(parameter.dtype)[: target.numel()].view(target.shape)
            pairs.append((target, rows))
        return pairs

    def share(self, *also: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The owner's buffers of the layer, and ``also``, beside those of this rank; sent as one tensor."""
        targets = [*self.layer.buffers(), *also]
        flat = torch.cat([t.contiguous().flatten().view(torch.uint8) for t in targets])
        torch.distributed.broadcast(flat, group=self.group, group_src=self.owner)
        pieces = flat.split([t.nbytes for t in targets])
        # Pieces begin anywhere, values of several bytes may not.
        return [(t, piece.clone().view(t.dtype).view(t.shape)) for t, piece in zip(targets, pieces, strict=True)]


def padded(own: Tensor, parameter: DTensor) -> Tensor:
    """This rank's ``own`` values, one for each of ``parameter``, as bytes on the group's kind of device.

    As many as the first rank's: as collectives want them.
    """
    own = own.to(parameter.device_mesh.device_type).flatten()
    rows = parameter.shape[0]
    size = -(-rows // shard_group(parameter).size()) * (parameter.numel() // rows)
    if own.numel() < size:
        own = torch.cat([own, own.new_zeros(size - own.numel())])
    return own.view(torch.uint8)


def reshard_(model: nn.Module) -> None:
    """Have the parameters of ``model`` be the shards, where ``fully_shard`` may have left whole ones in place."""
    if "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def as_forward(model: nn.Module, function: Callable[..., T]) -> Callable[..., T]:
    """``function`` with the parameters of ``model`` whole inside, as in a forward pass, if ``fully_shard`` is on it."""
    if "torch.distributed.fsdp" not in sys.modules:
        return function
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if not isinstance(model, FSDPModule):
        return function
    name = "_as_forward"
    vars(model)[name] = lambda *args, **kwargs: function(*args, **kwargs)
    register_fsdp_forward_method(model, name)
    return vars(model).pop(name)


def deal_(
    layers: Sequence[L], change: Callable[[L], Tensor], facts: int, also: Callable[[L], object]
) -> dict[L, Tensor]:
    """Change layers with sharded parameters, each as a whole on one rank, N at a time; see the module's text.

    Args:
        change: works on whole parameters, in place, biases left out; returns ``facts`` finite float64 numbers.
        also: done on every rank together with taking the rows over; must do no harm when called twice.

    Returns:
        What ``change`` returned for each layer, on every rank.

    Raises:
        UserError: on every rank, where ``change`` raised it on one of them; that layer is as it was.
    """
    found: dict[L, Tensor] = {}
    groups: dict[Any, list[L]] = {}
    for layer in sorted(layers, key=lambda layer: -sum(p.numel() for p in layer.parameters())):  # equal ones together
        groups.setdefault(_Whole(layer, 0).group, []).append(layer)
    for group, members in groups.items():
        for first in range(0, len(members), group.size()):
            dealt = [_Whole(layer, owner) for owner, layer in enumerate(members[first : first + group.size()])]
            for whole in dealt:
                whole.gather()
            results, error = [], None
            for whole in dealt:
                result = torch.full([facts], math.nan, dtype=torch.float64, device=whole.device)
                if whole.is_mine:
                    try:
                        result.copy_(change(whole.layer))
                    except UserError as raised:
                        error = raised
                    finally:
                        whole.put_back()
                results.append(result)
            for whole, result in zip(dealt, results, strict=True):
                pairs = [*whole.scatter(), *whole.share(result)]
                failed = bool(pairs[-1][1].isnan().any())
                swap_(pairs, *([] if failed else [lambda layer=whole.layer: also(layer)]))
            if failed := [whole for whole, result in zip(dealt, results, strict=True) if result.isnan().any()]:
                raise error or UserError(f"{failed[0].layer.label}: rank {failed[0].owner} could not change it")
            found |= zip((whole.layer for whole in dealt), results, strict=True)
    return found
