"""SMMF, square-matricized momentum factorisation (arXiv 2412.08894): both moments as rank-1 factors.

The gradient of any tensor is reshaped to the most nearly square matrix Ḡ [n̂, m̂], n̂ ≥ m̂ as the authors' code has it
(the other way round, other elements share a row, and runs differ by several percent). Of each moment only a row vector
r and a column vector c are kept, of the first its signs too, one bit each. A step decompresses, updates, compresses:

    M̂ = sign ⊙ (r_M c_Mᵀ),  V̂ = r_V c_Vᵀ
    M = β₁ₜ M̂ + (1 − β₁ₜ) Ḡ,  V = β₂ₜ V̂ + (1 − β₂ₜ) Ḡ²;   β₁ₜ = β₁ λ^(t−1),  β₂ₜ = 1 − t^γ
    r = row sums, c = column sums of |M| (of V), c, the shorter one, divided by its total
    θ ← θ − η M / (√V + ε)
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
from torch import Tensor

from poetx.optim.saved_kinds import Kind, Shapes
from poetx.optim.settings import check_numbers
from poetx.optim.sliced import SlicedOptimizer, compute_dtype, row_slices, wide, write_

logger = logging.getLogger(__name__)


class SMMF(SlicedOptimizer):
    """An eighth of a byte a parameter (the signs) plus two vectors for each moment.

    Args:
        params: parameters or groups, as for any torch optimizer; tensors of any rank.
        lr: η. eps: ε, outside the root. weight_decay: decoupled, as in AdamW.
        beta: β₁. growth: λ. decay: γ of the second moment, −0.5, or −0.8 for transformers.
        seed: of the rounding noise of bfloat16 parameters.

    Raises:
        UserError: a value outside its range.
    """

    _beta_count = 1

    kind = Kind("SMMF", "growth", lambda p: _shapes(p.numel()))

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        growth: float = 0.999,
        decay: float = -0.8,
        seed: int = 0,
    ) -> None:
        check_numbers({"beta": beta})
        defaults = {
            "lr": lr,
            "betas": (beta,),  # the name that schedulers which cycle momentum look for
            "eps": eps,
            "weight_decay": weight_decay,
            "growth": growth,
            "decay": decay,
        }
        super().__init__(params, defaults, seed=seed)

    def _update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        rows, columns = square_shape(parameter.numel())
        dtype, step = compute_dtype(parameter), state["step"]
        if "momentum_row" in state and state["momentum_row"].numel() != rows:
            logger.warning(
                "SMMF: the state of a parameter of shape %s was saved by a version that reshaped the other way, as "
                "%d × %d; its momentum and variance start anew",
                tuple(parameter.shape),
                columns,
                rows,
            )
            state.clear()
            step = state["step"] = 1
        if "momentum_row" not in state:
            for name in ("momentum", "variance"):
                state[f"{name}_row"] = torch.zeros(rows, dtype=dtype, device=parameter.device)
                state[f"{name}_column"] = torch.zeros(columns, dtype=dtype, device=parameter.device)
            shape = rows, -(-columns // 8)
            state["signs"] = torch.zeros(shape, dtype=torch.uint8, device=parameter.device)
        beta = group["betas"][0] if "betas" in group else group["beta"]  # as it was saved once
        beta1 = beta * group["growth"] ** (step - 1)
        beta2 = 1 - step ** group["decay"]
        noise = self._noise(parameter, step)
        flat = parameter.view(-1) if parameter.is_contiguous() else parameter.reshape(-1)
        weight, grad = flat.view(rows, columns), grad.reshape(rows, columns)
        sums = {name: torch.zeros_like(state[f"{name}_column"]) for name in ("momentum", "variance")}
        for here in row_slices(rows, columns):
            g = wide(grad[here], dtype)
            M = torch.outer(state["momentum_row"][here], state["momentum_column"])
            M = _with_signs(M, state["signs"][here]).mul_(beta1).add_(g, alpha=1 - beta1)
            V = torch.outer(state["variance_row"][here], state["variance_column"])
            V.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            state["signs"][here] = pack_signs(M)
            # The old row factors are read slice by slice, so the new ones may take their place at once.
            state["momentum_row"][here] = M.abs().sum(1)
            state["variance_row"][here] = V.sum(1)
            sums["momentum"] += M.abs().sum(0)
            sums["variance"] += V.sum(0)
            value = weight[here].to(dtype, copy=True).mul_(1 - group["lr"] * group["weight_decay"])
            value.addcdiv_(M, V.sqrt_().add_(group["eps"]), value=-group["lr"])
            write_(weight[here], value, noise)
        for name, total in sums.items():
            state[f"{name}_column"] = total
            size = total.sum()
            total.div_(torch.where(size > 0, size, 1.0))
        if not parameter.is_contiguous():
            parameter.copy_(flat.view(parameter.shape))


def _shapes(numel: int) -> Shapes:
    """Of both ways to reshape: see the warning in ``_update``."""
    ways = square_shape(numel), square_shape(numel)[::-1]
    vectors = ("momentum_row", "momentum_column", "variance_row", "variance_column")
    return dict.fromkeys(vectors, tuple((size,) for size in ways[0])) | {
        "signs": tuple((n, -(-m // 8)) for n, m in ways)
    }


@functools.cache
def square_shape(numel: int) -> tuple[int, int]:
    """(n̂, m̂) with n̂ · m̂ = numel, n̂ ≥ m̂, as nearly square as its divisors allow."""
    columns = next(m for m in range(max(1, math.isqrt(numel)), 0, -1) if numel % m == 0)
    return numel // columns, columns


def pack_signs(M: Tensor) -> Tensor:
    """[n, m] → [n, ⌈m/8⌉] uint8, one bit each: set where M ≥ 0."""
    bits = torch.nn.functional.pad((M >= 0).to(torch.uint8), (0, -M.shape[1] % 8)).view(M.shape[0], -1, 8)
    return bits.mul_(_powers(M)).sum(2, dtype=torch.uint8)


def _with_signs(M: Tensor, signs: Tensor) -> Tensor:
    bits = signs[:, :, None].bitwise_and(_powers(M)).view(M.shape[0], -1)[:, : M.shape[1]]
    return torch.where(bits != 0, M, -M)


def _powers(like: Tensor) -> Tensor:
    return torch.bitwise_left_shift(
        torch.ones(8, dtype=torch.uint8, device=like.device), torch.arange(8, device=like.device)
    )
