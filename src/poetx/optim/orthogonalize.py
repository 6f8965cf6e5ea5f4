"""What a step follows: momentum made orthogonal, and the state it keeps of a matrix.

Gradients arrive by addition, in ``state["momentum_in"]`` and ``state["momentum_out"]`` [K, blocks, …], between two
steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poetx.ops.fold import stochastic_round_
from poetx.ops.single_step import block_peaks

# Five steps of the quintic Newton-Schulz iteration with the coefficients of Muon (Jordan et al. 2024): every singular
# value ends near 1, between 0.7 and 1.2. Odd polynomials of a skew-symmetric matrix are skew-symmetric.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
#: No singular value of what :func:`orthogonalize` returns is larger.
LARGEST_SINGULAR_VALUE = 1.3

#: Elements of unpacked blocks that one batched iteration takes.
_BATCH_ELEMENTS = 1 << 23


def orthogonalize(X_KBB: Tensor, *, skew: bool = True) -> Tensor:
    """The nearest orthogonal-like matrices: five Newton–Schulz steps; of skew-symmetric ones, antisymmetrised again.

    Blocks of zeros stay zero; no finite block gives anything else than finite numbers, however large or small.
    On a GPU in bfloat16, several times faster; the singular values it gives are rough in any precision.
    """
    a, b, c = _NEWTON_SCHULZ
    # By an exact power of two, near 1 before anything is squared; blocks of subnormal numbers count as zero.
    peaks = block_peaks(X_KBB)
    empty = peaks < torch.finfo(X_KBB.dtype).tiny
    power = torch.ldexp(torch.ones_like(peaks), torch.frexp(peaks.masked_fill(empty, 1.0)).exponent - 1)
    X = (X_KBB / power[:, None, None]).masked_fill_(empty[:, None, None], 0.0)
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    if X.dtype == torch.float32 and X.is_cuda:
        X = X.bfloat16()
    for _ in range(5):
        A = torch.bmm(X, X.transpose(1, 2))
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    X = X.to(X_KBB.dtype)
    return (X - X.transpose(1, 2)) / 2 if skew else X


def batches(blocks: dict[Tensor, tuple[int, int]]) -> Iterator[list[Tensor]]:
    """Matrices, given with block size and number of blocks, that can go through one batched iteration: not too many."""
    kinds: dict[tuple[Any, ...], list[Tensor]] = {}
    for p, (block_size, _) in blocks.items():
        kinds.setdefault((block_size, p.dtype, p.device), []).append(p)
    for (block_size, *_), alike in kinds.items():
        batch, elements = [], 0
        for p in alike:
            size = blocks[p][1] * block_size**2
            if batch and elements + size > _BATCH_ELEMENTS:
                yield batch
                batch, elements = [], 0
            batch.append(p)
            elements += size
        yield batch


class Move(NamedTuple):
    """One (side, partition): what a step may write."""

    side: str  # "in": columns of the matrix, "out": rows
    index: int


class Finished(NamedTuple):
    """A matrix after its step."""

    state: dict[str, Any]
    upcoming: Iterable[Move]  # what its next step will write
    noise: Callable[[str], torch.Generator]  # for a purpose: the same on every rank and in every resumed run


@dataclass(frozen=True)
class Ortho:
    """Momentum, for :func:`orthogonalize`; with ``nesterov`` it looks one gradient ahead."""

    momentum: float
    nesterov: bool
    entries = ("momentum",)

    def direction(self, states: Sequence[dict[str, Any]], move: Move) -> Tensor:
        """Of several matrices, one after the other, in float32 or float64."""
        now = [state[f"momentum_{move.side}"][move.index] for state in states]
        momentum = torch.cat(now).to(torch.promote_types(now[0].dtype, torch.float32))
        if not self.nesterov:
            return momentum
        # The gradient is what came since the copy was taken; states of old have none before their first step.
        key = f"before_{move.side}_{move.index}"
        before = [state[key] if key in state else torch.zeros_like(q) for state, q in zip(states, now, strict=True)]
        return momentum.mul_(1 + self.momentum).sub_(torch.cat(before))

    def restart(self, state: dict[str, Any]) -> None:
        """Forget what came so far."""
        for side in ("in", "out"):
            state[f"momentum_{side}"].zero_()

    def finish(self, states: Sequence[Finished]) -> None:
        """Make momenta ready for the gradients of the next step."""
        wide = []
        for side, (state, _, noise) in itertools.product(("in", "out"), states):
            sink = state[f"momentum_{side}"]
            if sink.dtype == torch.bfloat16:
                stochastic_round_(sink, sink.float().mul_(self.momentum), noise(f"momentum-{side}"))
            else:
                wide.append(sink)
        if wide:
            torch._foreach_mul_(wide, self.momentum)  # pyright: ignore[reportPrivateImportUsage]
        for state, upcoming, _ in states:
            self.expect(state, upcoming)

    def expect(self, state: dict[str, Any], upcoming: Iterable[Move]) -> None:
        """Take the copies that the look-ahead of the next step needs, before its gradients come."""
        for key in [key for key in state if key.startswith("before_")]:
            del state[key]
        for move in upcoming if self.nesterov else ():
            state[f"before_{move.side}_{move.index}"] = state[f"momentum_{move.side}"][move.index].clone()
