"""Which matrices take a step together; and that step on a GPU: weights and states in place, in three launches.

The weights of a large model are hundreds of matrices: launched one by one their kernels would wait for the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from poetx.distributed.sharded import is_sharded
from poetx.layers.weights import HostWeight
from poetx.ops.dispatch import use_triton
from poetx.ops.library import device_type
from poetx.ops.single_step_update import SAME_NORM
from poetx.ops.transaction import signals_deferred
from poetx.optim.single_step.matrix import SIDES, Matrix, first_elements

#: Elements of unpacked blocks that one batched iteration takes; on a GPU some forty launches.
_BATCH_ELEMENTS = {"cpu": 1 << 23}
_BATCH_ELEMENTS_ELSEWHERE = 1 << 24
#: For which matrices the kernels have been compiled.
_compiled: set[tuple[Any, ...]] = set()


def batches(matrices: Iterable[Matrix]) -> Iterable[list[Matrix]]:
    """Matrices of one kind whose blocks go through one batched iteration: so many elements, or one matrix."""
    kinds: dict[tuple[Any, ...], list[Matrix]] = {}
    for matrix in matrices:
        side, p = matrix.side, matrix.parameter
        alike = (side, matrix.free, matrix.sizes(side)[1], p.dtype, matrix.momenta.dtype, matrix.device)
        kinds.setdefault((*alike, matrix.hosted, is_sharded(p)), []).append(matrix)
    for those in kinds.values():
        batch, size = [], 0
        elements = _BATCH_ELEMENTS.get(device_type(those[0].momenta), _BATCH_ELEMENTS_ELSEWHERE)
        side = those[0].side
        for matrix in those:
            more = matrix.blocks(side) * matrix.sizes(side)[1] ** 2
            if batch and size + more > elements:
                yield batch
                batch, size = [], 0
            batch.append(matrix)
            size += more
        yield batch


def can_step_together(matrix: Matrix) -> bool:
    """Whether the kernels take a matrix; all of one batch are alike in what they look at."""
    block_size = matrix.sizes(matrix.side)[1]
    if is_sharded(matrix.parameter) or not use_triton(matrix.momenta, block_size, on_fakes=True):
        return False
    from poetx.ops.triton.single_step import can_fold

    return can_fold(matrix.parameter.dtype, block_size)


class KernelStep:
    """:meth:`Matrix.take_step` of a batch by the kernels: made, which is the host's work, then taken.

    Args:
        momenta: of each, with this step's gradients, flat. decay: what momenta decay by.
    """

    def __init__(self, batch: Sequence[Matrix], momenta: Sequence[Tensor], decay: float) -> None:
        from poetx.ops.triton import single_step as kernels

        self.batch, self.decay = batch, decay
        self.side, block_size = batch[0].side, batch[0].sizes(batch[0].side)[1]
        self.weights: list[Tensor] = []
        turns, decays = [], []
        for matrix, with_gradients in zip(batch, momenta, strict=True):
            layer, state, step = matrix.layer, matrix.state, matrix.step + 1
            weight = matrix.parameter.detach()
            if layer is not None and matrix.hosted:
                weight = cast(HostWeight, layer.frozen_weight).brought()
            self.weights.append(weight)
            seed = matrix.noise_seed(f"rounding-{self.side}-0", step) if weight.dtype == torch.bfloat16 else 0
            stack = matrix.matrices(weight)
            for place, W in enumerate(stack if self.side == "out" else stack.mT):
                exact = torch.linalg.vector_norm(W, dtype=torch.float64) if step == 1 else None  # held for good
                norm, scale = state["norm"][place], state["scale"][place]
                turns.append(kernels.Turn(W, norm, scale, exact, step - 1, seed + place))
            sizes = [state[f"momentum_{side}"].numel() for side in SIDES]
            upcoming = SIDES[step % 2]
            start = 0 if upcoming == "in" else sizes[0]
            copied = slice(start, start + sizes[step % 2]) if matrix.look_ahead else slice(0, 0)
            out = first_elements(matrix.momenta, sum(sizes) + copied.stop - copied.start)
            seed = matrix.noise_seed("momentum-in", step) if matrix.rounds_momenta else 0
            decays.append(kernels.Decay(with_gradients, out, copied, matrix.all_peaks, seed))
        self.turns, self.decays = kernels.Turns(turns, block_size), kernels.Decays(decays)
        self.norms: dict[str, Any] = {"growth": batch[0].growth, "same": SAME_NORM}
        kind = (batch[0].device, block_size, batch[0].growth, batch[0].momenta.dtype)
        if kind not in _compiled:  # what could fail once a weight has been written
            unwritten = momenta[0].new_empty(0, dtype=torch.float32)
            self.turns.hold_(unwritten, unwritten.bool(), **self.norms, compile_only=True)
            self.decays.decay_(decay, compile_only=True)
            _compiled.add(kind)

    def take_(self, E_KBB: Tensor, factor: float, touched: Tensor) -> None:
        """W ← (I + factor · E)·W, or W·(I + factor · E); signals wait, so that all of the batch is stepped or nothing.

        Args:
            E_KBB: of the blocks of all; in bfloat16 where it is that. touched: [K], which of them move.
        """
        steps = [matrix.step + 1 for matrix in self.batch]
        with signals_deferred():
            squares = self.turns.fold_(E_KBB, factor, self.side, touched)
            self.turns.hold_(squares, touched, **self.norms)
            self.decays.decay_(self.decay)
            for matrix, weight, step in zip(self.batch, self.weights, steps, strict=True):
                matrix.stepped(weight, step)
