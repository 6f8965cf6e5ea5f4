"""Muon, from here: torch's iterates in bfloat16, slow on a CPU, and rounds narrow weights to the nearest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poetx.optim.baselines.base import MatrixOptimizer, matrix_shapes, moment_dtype, moving_average
from poetx.optim.orthogonalize import orthogonalize
from poetx.optim.saved_kinds import Kind


class Muon(MatrixOptimizer):
    """``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"``, whose states it reads.

    M ← β M + (1 − β) G; U = 0.2 √max(m, n) · Newton–Schulz of (1 − β) G + β M. On a CPU in float32, where bfloat16
    is slow.
    """

    kind = Kind("Muon", "ns_steps", lambda p: matrix_shapes(p, "momentum_buffer"))

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.95,
        state_dtype: str = "same",
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "ns_steps": 5}
        super().__init__(params, defaults | {"state_dtype": state_dtype}, seed=seed)

    def _direction(
        self, G: Tensor, state: dict[str, Any], group: dict[str, Any], parameter: Tensor, noise: torch.Generator
    ) -> Tensor:
        M = moving_average(state, "momentum_buffer", G, group["momentum"], moment_dtype(parameter, group), noise)
        return orthogonal(G.lerp_(M, group["momentum"])).mul_(0.2 * max(G.shape) ** 0.5)


def orthogonal(U: Tensor) -> Tensor:
    """Newton–Schulz of one matrix, over its smaller side."""
    tall = U.shape[0] > U.shape[1]
    X = orthogonalize((U.T if tall else U)[None], skew=False)[0].to(U.dtype)
    return X.T if tall else X
