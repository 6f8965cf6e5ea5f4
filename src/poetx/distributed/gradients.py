"""The mean of gradients over the ranks, on its way while backward still runs.

What ``DistributedDataParallel`` does, with three differences that matter here: no memory is held between steps (its
buckets live as long as the model), a parameter without gradient on some ranks, or on all, needs no search of the
graph, and the model stays the model, so names, losses without logits and released gradients are as in one process.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from poetx.distributed.ranks import rank_count, sum_
from poetx.distributed.sharded import is_sharded, local

#: Gradients are sent together up to so many bytes; one that is larger is sent where it is.
BUCKET_BYTES = 25 << 20


class GradientAverage:
    """Averages the gradients of ``parameters``: :meth:`start` before a step's last backward, :meth:`finish` after it.

    Every rank sends the same buckets in the same order, the last parameters first, each as soon as its gradients and
    those of all buckets before it are there. A gradient that some rank lacks counts as zero, and is there afterwards.

    Args:
        overlap: send while backward runs. Without it all are sent at the end, for a backward that talks itself.
    """

    def __init__(self, parameters: Iterable[Tensor], *, overlap: bool = True, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._buckets = _buckets(self._parameters, bucket_bytes)
        self._bucket_of = {p: index for index, bucket in enumerate(self._buckets) for p in bucket}
        self._lacking: list[int] = []  # gradients still to come, by bucket; empty while nothing is to be sent
        self._sent, self._works = 0, []
        if overlap:
            for p in self._parameters:
                p.register_post_accumulate_grad_hook(self._arrived)

    def start(self) -> None:
        """Send each gradient that the next backward completes."""
        self._lacking = [len(bucket) for bucket in self._buckets]
        self._sent, self._works = 0, []

    def finish(self) -> None:
        """Send what is left, and wait for all of it."""
        self._lacking = []
        lacking = [index for index, p in enumerate(self._parameters) if p.grad is None]
        while self._sent < len(self._buckets):
            self._send_next()
        there = torch.ones(len(self._parameters), dtype=torch.int32, device=self._parameters[0].device)
        there[lacking] = 0
        torch.distributed.all_reduce(there, op=torch.distributed.ReduceOp.MAX)
        for work in self._works:
            work.wait()
        self._works = []
        if lacking:
            nowhere = (there == 0).tolist()
            for index in lacking:
                if nowhere[index]:
                    self._parameters[index].grad = None

    def _arrived(self, parameter: Tensor) -> None:
        if self._lacking:
            self._lacking[self._bucket_of[parameter]] -= 1
            while self._sent < len(self._buckets) and self._lacking[self._sent] == 0:
                self._send_next()

    def _send_next(self) -> None:
        """Replace the gradients of the next bucket by pieces of what is sent; their old memory is free at once."""
        bucket = self._buckets[self._sent]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in bucket]
        flat = grads[0].contiguous() if len(grads) == 1 else torch.cat([grad.flatten() for grad in grads])
        flat.div_(rank_count())  # before the sum, which could overflow
        for p, piece in zip(bucket, flat.flatten().split([p.numel() for p in bucket]), strict=True):
            p.grad = piece.view(p.shape)
        self._works.append(torch.distributed.all_reduce(flat, async_op=True))
        self._sent += 1


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


def _buckets(parameters: list[Tensor], bucket_bytes: int) -> list[list[Tensor]]:
    """The parameters from the last to the first, together with those of their kind up to a size."""
    buckets: list[list[Tensor]] = []
    open_: dict[Any, tuple[list[Tensor], int]] = {}
    for p in reversed(parameters):
        kind = p.dtype, p.device
        bucket, size = open_.get(kind, ([], bucket_bytes))
        if size + p.nbytes > bucket_bytes:
            bucket, size = [], 0
            buckets.append(bucket)
        bucket.append(p)
        open_[kind] = bucket, size + p.nbytes
    return buckets
