"""The mean of gradients over the ranks, on its way while backward still runs.

What ``DistributedDataParallel`` does, with five differences that matter here: no memory is held between steps (its
buckets live as long as the model), a parameter without gradient on some ranks, or on all, needs no search of the
graph, the model stays the model, so names, losses without logits and released gradients are as in one process,
float32 gradients of rotations of bfloat16 layers go in bfloat16, as those of the layers' weights would, and of an
embedding only the rows that some rank has a gradient for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from poetx.distributed.ranks import rank_count, sum_
from poetx.distributed.sharded import is_sharded, local

#: Gradients are sent together up to so many bytes; one that is larger is sent where it is.
BUCKET_BYTES = 25 << 20


class _Sent(NamedTuple):
    """A bucket on its way: ``flat`` becomes the gradients of ``parameters``, or those ``rows`` of the only one."""

    parameters: list[Tensor]
    flat: Tensor
    rows: Tensor | None
    work: Any


class GradientAverage:
    """Averages the gradients of ``parameters``: :meth:`start` before a step's last backward, :meth:`finish` after it.

    Every rank sends the same buckets in the same order, the last parameters first, each as soon as its gradients and
    those of all buckets before it are there. A gradient that some rank lacks counts as zero, and is there afterwards.

    Args:
        overlap: send while backward runs. Without it all are sent at the end, for a backward that talks itself.
        sent_in: dtypes of those that are not sent in their own. by_row: those of which only rows with a gradient are.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        overlap: bool = True,
        bucket_bytes: int = BUCKET_BYTES,
        sent_in: Mapping[Tensor, torch.dtype] = MappingProxyType({}),
        by_row: Collection[Tensor] = (),
    ) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._dtypes = {p: sent_in.get(p, p.dtype) for p in self._parameters}
        self._by_row = set(by_row)
        self._buckets = self._in_buckets(bucket_bytes)
        self._bucket_of = {p: index for index, bucket in enumerate(self._buckets) for p in bucket}
        self._lacking: list[int] = []  # gradients still to come, by bucket; empty while nothing is to be sent
        self._sent: list[_Sent] = []
        self._absent: set[Tensor] = set()
        if overlap:
            for p in self._parameters:
                p.register_post_accumulate_grad_hook(self._arrived)

    @property
    def nbytes(self) -> int:
        """Bytes that a step sends where every row of every embedding has a gradient."""
        return sum(p.numel() * self._dtypes[p].itemsize for p in self._parameters)

    def start(self) -> None:
        """Send each gradient that the next backward completes."""
        self._lacking = [len(bucket) for bucket in self._buckets]
        self._sent, self._absent = [], set()

    def finish(self) -> None:
        """Send what is left, and wait for all of it."""
        self._lacking = []
        while len(self._sent) < len(self._buckets):
            self._send_next()
        there = torch.ones(len(self._parameters), dtype=torch.int32, device=self._parameters[0].device)
        there[[index for index, p in enumerate(self._parameters) if p in self._absent]] = 0
        torch.distributed.all_reduce(there, op=torch.distributed.ReduceOp.MAX)
        for parameters, flat, rows, work in self._sent:
            work.wait()
            if rows is not None:
                parameters[0].grad.index_copy_(0, rows, flat)  # pyright: ignore[reportOptionalMemberAccess]
            elif flat.dtype != parameters[0].dtype:
                self._hand_out(flat.to(parameters[0].dtype), parameters)
        self._sent = []
        if self._absent:
            nowhere = (there == 0).tolist()
            for index, p in enumerate(self._parameters):
                if nowhere[index]:
                    p.grad = None

    def _arrived(self, parameter: Tensor) -> None:
        if self._lacking:
            self._lacking[self._bucket_of[parameter]] -= 1
            while len(self._sent) < len(self._buckets) and self._lacking[len(self._sent)] == 0:
                self._send_next()

    def _send_next(self) -> None:
        """Replace the gradients of the next bucket by pieces of what is sent; their old memory is free at once."""
        bucket = self._buckets[len(self._sent)]
        self._absent.update(p for p in bucket if p.grad is None)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in bucket]
        rows = None
        if bucket[0] in self._by_row:
            bucket[0].grad = grads[0]
            rows = _touched(grads[0]).nonzero().flatten()
            flat = grads[0][rows]
        else:
            flat = grads[0].contiguous() if len(grads) == 1 else torch.cat([grad.flatten() for grad in grads])
        flat.div_(rank_count())  # before the sum, which could overflow
        if (dtype := self._dtypes[bucket[0]]) != flat.dtype:
            flat = flat.to(dtype)
            for p in bucket:
                p.grad = None
        elif rows is None:
            self._hand_out(flat, bucket)
        self._sent.append(_Sent(bucket, flat, rows, torch.distributed.all_reduce(flat, async_op=True)))

    @staticmethod
    def _hand_out(flat: Tensor, parameters: list[Tensor]) -> None:
        for p, piece in zip(parameters, flat.flatten().split([p.numel() for p in parameters]), strict=True):
            p.grad = piece.view(p.shape)

    def _in_buckets(self, bucket_bytes: int) -> list[list[Tensor]]:
        """The parameters from the last to the first, together with those of their kind up to a size."""
        buckets: list[list[Tensor]] = []
        open_: dict[Any, tuple[list[Tensor], int]] = {}
        for p in reversed(self._parameters):
            if p in self._by_row:
                buckets.append([p])
                continue
            kind = p.dtype, self._dtypes[p], p.device
            bucket, size = open_.get(kind, ([], bucket_bytes))
            if size + p.nbytes > bucket_bytes:
                bucket, size = [], 0
                buckets.append(bucket)
            bucket.append(p)
            open_[kind] = bucket, size + p.nbytes
        return buckets


def embeddings(model: nn.Module) -> set[Tensor]:
    """Parameters of a model that only ``nn.Embedding`` holds: a tied head has a gradient for every row."""
    held = [(p, isinstance(module, nn.Embedding)) for module in model.modules() for p in module._parameters.values()]
    elsewhere = {p for p, embeds in held if not embeds}
    return {p for p, embeds in held if embeds and p is not None and p not in elsewhere}


def _touched(gradient: Tensor, group: Any = None) -> Tensor:
    """Whether each row of a gradient, as 0 or 1, is not all zeros on some rank; the others sum to zero."""
    touched = gradient.ne(0).any(1).to(torch.uint8)
    torch.distributed.all_reduce(touched, op=torch.distributed.ReduceOp.MAX, group=group)
    return touched


class ReduceScatterByRow:
    """What ``fully_shard`` may reduce the gradient of one embedding with (``set_custom_reduce_scatter``).

    Each rank gets those of its rows that some rank has a gradient for, from all ranks, and sums them in float32 at
    least, in the order of the ranks.

    Args:
        width: numbers in a row.
    """

    def __init__(self, width: int) -> None:
        self._width = width

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The memory of what is sent, and of what comes back."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Sum, or mean, of ``input_tensor`` [ranks × rows × width], of which ``output_tensor`` is this rank's part."""
        rows, ranks = input_tensor.view(-1, self._width), group.size()
        first = torch.arange(ranks) * (len(rows) // ranks)
        parts = [part.nonzero().flatten() for part in _touched(rows, group).cpu().view(ranks, -1)]
        own = parts[group.rank()].to(rows.device)
        sent = rows[torch.cat([part + begin for part, begin in zip(parts, first, strict=True)]).to(rows.device)]
        found = sent.new_empty(ranks * len(own), self._width)
        counts = [len(own)] * ranks, [len(part) for part in parts]
        torch.distributed.all_to_all_single(found, sent, *counts, group=group)
        total = found.view(ranks, -1, self._width).sum(0, dtype=torch.promote_types(found.dtype, torch.float32))
        if op == torch.distributed.ReduceOp.AVG:
            total.div_(ranks)
        output_tensor.zero_()
        output_tensor.view(-1, self._width)[own] = total.to(output_tensor.dtype)


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, of sharded ones over all ranks; a scalar, the same on every rank."""
    shards = [local(gradient) for gradient in gradients if is_sharded(gradient)]
    norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if not is_sharded(gradient)])
    if not shards:
        return norm
    square = sum_(torch.nn.utils.get_total_norm(shards).double().square())
    return (square + norm.double().square()).sqrt()


def clip_(parameters: Iterable[Tensor], largest: float, norm: Tensor) -> None:
    """Scale gradients, whose norm is ``norm`` over all ranks, down to the largest one."""
    parameters = list(parameters)
    shards = [local(p.grad) for p in parameters if p.grad is not None and is_sharded(p.grad)]
    if shards:
        factor = (largest / (norm + 1e-6)).clamp(max=1)
        for shard in shards:
            shard.mul_(factor)
    whole = [p for p in parameters if not is_sharded(p.grad)]
    torch.nn.utils.clip_grads_with_norm_(whole, largest, norm)
