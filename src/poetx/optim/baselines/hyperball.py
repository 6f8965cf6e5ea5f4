"""Muon that holds every matrix's norm: the rival that the single step's fixed norm asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poetx.errors import UserError
from poetx.optim.baselines.base import MatrixOptimizer, matrix_shapes, moment_dtype, moving_average
from poetx.optim.baselines.muon import orthogonal
from poetx.optim.saved_kinds import Kind
from poetx.optim.sliced import compute_dtype, wide, write_
from poetx.targets import has_values

#: Relative; more than rounding to bfloat16 can do.
_SAME_NORM = 0.01


class MuonHyperball(MatrixOptimizer):
    """Muon on the sphere ‖W‖ = ‖W₀‖ (arXiv 2606.16899): the rate is an angle.

    M ← β M + (1 − β) G, with Nesterov's look-ahead as in Muon; U = Newton–Schulz of it; with c = ‖W₀‖:
    V = W − lr·c·U/‖U‖, W ← c·V/‖V‖. A weight whose norm is off by 1 % was written since, and its norm is held.

    Raises:
        UserError: a weight decay, which a held norm leaves without effect; a matrix of zeros, which it never moves.
    """

    kind = Kind("MuonHyperball", "ball_momentum", lambda p: matrix_shapes(p, "momentum") | {"norm": ((),)})

    def __init__(
        self,
        params: Any,
        lr: float = 0.012,
        weight_decay: float = 0.0,
        *,
        ball_momentum: float = 0.95,
        state_dtype: str = "same",
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "ball_momentum": ball_momentum}
        super().__init__(params, defaults | {"state_dtype": state_dtype}, seed=seed)
        for group in self.param_groups:
            for p in group["params"]:
                if p.numel() and has_values(p) and not p.any():
                    raise UserError(
                        f"MuonHyperball: a parameter of shape {tuple(p.shape)} is all zeros, and would stay so; "
                        "give it to another optimizer"
                    )
            if group["weight_decay"]:
                raise UserError(
                    f"MuonHyperball: weight_decay={group['weight_decay']}: has no effect where the norm is held; set 0"
                )

    def _update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        noise, beta = self._noise(parameter, state["step"]), group["ball_momentum"]
        W = parameter.to(compute_dtype(parameter), copy=True)
        found = torch.linalg.vector_norm(W)
        held = state.get("norm", found)
        state["norm"] = c = torch.where((found / held - 1).abs() < _SAME_NORM, held, found)
        G = wide(grad, W.dtype)
        M = moving_average(state, "momentum", G, beta, moment_dtype(parameter, group), noise)
        U = orthogonal(G.lerp_(M, beta))
        size = torch.linalg.vector_norm(U)
        W.sub_(U * torch.where(size > 0, group["lr"] * c / size, 0.0))
        length = torch.linalg.vector_norm(W)
        write_(parameter, W.mul_(torch.where(length > 0, c / length, 1.0)), noise)
