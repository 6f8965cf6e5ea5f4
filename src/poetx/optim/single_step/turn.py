"""The step of a batch of matrices: first what it turns them by, which writes nothing, then the writing of it.

The first part may come earlier, while somebody waits for the loss: :class:`Ahead`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poetx.ops.cayley import exact_delta, unpack_skew
from poetx.ops.fold import full_precision_products
from poetx.optim.orthogonalize import LARGEST_SINGULAR_VALUE, orthogonalize
from poetx.optim.single_step.matrix import Matrix, touched_blocks
from poetx.optim.single_step.together import KernelStep, batches, can_step_together

#: Batches whose maps are computed ahead: enough that a GPU has work until the host has asked for the next.
_MAPS_AHEAD = 2


class Turn(NamedTuple):
    """What one side of each matrix of a batch is turned by.

    Attributes:
        momenta: of each matrix, with the gradients of this step, flat.
        E_KBB: of the blocks of all: they become (I + factor · E) of themselves. touched: [K], which blocks move.
    """

    momenta: list[Tensor]
    E_KBB: Tensor
    factor: float
    touched: Tensor


def turn_of(batch: Sequence[Matrix], angle: Any, momentum: float) -> Turn:
    """What the next step turns a batch by: of the side whose turn it is, the same for all of them; nothing is written.

    Args:
        angle: see :class:`poetx.POETX`; a number, or a scalar tensor. momentum: for the look-ahead.
    """
    side, free = batch[0].side, batch[0].free
    now = [matrix.with_gradient() for matrix in batch]
    counts = [matrix.blocks(side) for matrix in batch]
    each = zip(batch, now, strict=True)
    direction = torch.cat([matrix.momentum_of(momenta, side) for matrix, (momenta, _) in each])
    wide = now[0][1][side].dtype  # float32, or float64
    direction = direction.to(wide)
    if batch[0].look_ahead:  # one gradient ahead, which is what came since the copy was taken
        direction.mul_(1 + momentum)
        torch._foreach_sub_(direction.split(counts), [matrix.before(side) for matrix in batch])  # pyright: ignore[reportPrivateImportUsage]
    touched = touched_blocks(direction, torch.cat([peaks[side] for _, peaks in now]))
    direction.masked_fill_(~touched.view(-1, *[1] * (direction.ndim - 1)), 0.0)
    if not free:
        direction = unpack_skew(direction, 0, batch[0].sizes(side)[1])
    direction = orthogonalize(direction, skew=not free)
    with full_precision_products():
        if free and isinstance(angle, Tensor):
            E, factor = direction.to(wide).mul_(-2 * angle), 1.0
        elif free:
            E, factor = direction, -2 * angle
        else:
            E, factor = exact_delta(direction.mul_(-angle), LARGEST_SINGULAR_VALUE * angle), 1.0
    return Turn([momenta for momenta, _ in now], E, factor, touched)


def take_turn(batch: Sequence[Matrix], turn: Turn, momentum: float, step: KernelStep | None = None) -> None:
    """Take one step of every matrix of the batch; momenta decay by ``momentum``. ``step``: where it has been made."""
    kernels = step is not None or can_step_together(batch[0])
    with full_precision_products():
        if kernels and not batch[0].hosted:
            (step or KernelStep(batch, turn.momenta, momentum)).take_(turn.E_KBB, turn.factor, turn.touched)
            return
        # One by one: of weights in host memory one is on the device at a time.
        Es = turn.E_KBB
        if not kernels:
            Es = Es.to(torch.promote_types(Es.dtype, torch.float32)).mul_(turn.factor)
        counts = [matrix.blocks(matrix.side) for matrix in batch]
        each = zip(batch, turn.momenta, Es.split(counts), turn.touched.split(counts), strict=True)
        for matrix, momenta, E_KBB, touched in each:
            if kernels:
                KernelStep([matrix], [momenta], momentum).take_(E_KBB, turn.factor, touched)
            else:
                matrix.take_step(momenta, E_KBB, touched, momentum)


class _Prepared(NamedTuple):
    step: KernelStep
    turn: Turn | None


class Ahead:
    """What has been done of a step before it: all that the host does for the kernels, and the first maps.

    Of converted layers only, on a device that computes while the host waits: their momenta have the gradients when
    backward is over. A batch is looked up by all that its step depends on, so that one which gradients, rates, writes
    in place, a discarded or a loaded state have changed since is not found.
    """

    def __init__(self) -> None:
        self._batches: dict[tuple[object, ...], _Prepared] = {}

    def prepare(self, matrices: Iterable[Matrix], angle: Any, momentum: float) -> None:
        """For those matrices of a group that move, in the batches that the step takes them in."""
        if isinstance(angle, Tensor):  # whose value only the device knows
            return
        for batch in batches(matrices):
            if any(m.layer is None or m.hosted for m in batch) or not can_step_together(batch[0]):
                continue
            turn = turn_of(batch, angle, momentum) if len(self._batches) < _MAPS_AHEAD else None
            step = KernelStep(batch, [matrix.momenta for matrix in batch], momentum)
            self._batches[_known_by(batch, angle, momentum)] = _Prepared(step, turn)

    def take_(self, batch: Sequence[Matrix], angle: Any, momentum: float) -> None:
        """Take one step of every matrix of the batch."""
        step = turn = None
        if self._batches and not isinstance(angle, Tensor):
            step, turn = self._batches.pop(_known_by(batch, angle, momentum), (None, None))
        take_turn(batch, turn or turn_of(batch, angle, momentum), momentum, step)


def _known_by(batch: Sequence[Matrix], angle: float, momentum: float) -> tuple[object, ...]:
    from poetx.ops.triton.tuning import address  # only after can_step_together

    places = [(address(t), t._version) for m in batch for t in (m.parameter, m.momenta)]
    return (angle, momentum, *places, *((m.index, m.step, m.changes) for m in batch))
