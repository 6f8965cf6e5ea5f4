"""Near-stateless rules: the gradient with its rows, its columns or both normalized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poetx.optim.baselines.base import MatrixOptimizer, limited_, matrix_shapes, moment_dtype, moving_average
from poetx.optim.saved_kinds import Kind

_TINY = 1e-8
_LEAST = 1e-30


class Scale(MatrixOptimizer):
    """SCALE (arXiv 2506.16659): G / RMS of every row; the head's is of a momentum, the embedding's of columns.

    Args:
        params: matrices or groups of them. over, of a group: 1, the RMS of each row (an output), or 0, of each column
            (an embedding's, over the vocabulary). momentum, of a group: 0.9 for the head, M ← 0.9 M + 0.1 G.
    """

    kind = Kind("SCALE", "over", lambda p: matrix_shapes(p, "momentum"))

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        over: int = 1,
        momentum: float = 0.0,
        state_dtype: str = "same",
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "over": over, "momentum": momentum}
        defaults["state_dtype"] = state_dtype
        super().__init__(params, defaults, seed=seed)

    def _direction(
        self, G: Tensor, state: dict[str, Any], group: dict[str, Any], parameter: Tensor, noise: torch.Generator
    ) -> Tensor:
        if group["momentum"]:
            G = moving_average(state, "momentum", G, group["momentum"], moment_dtype(parameter, group), noise)
        over = group["over"]
        rms = torch.linalg.vector_norm(G, dim=over, keepdim=True) / G.shape[over] ** 0.5
        return G.div_(rms.clamp_min_(_TINY))


class SinkGD(MatrixOptimizer):
    """SinkGD (arXiv 2502.06742): rows and columns of G normalized in turn, five times; no state at all.

    X ← √n·X / ‖rows‖, then X ← √m·X / ‖columns‖; W ← W − lr·scale·X.
    """

    kind = Kind("SinkGD", "iterations", lambda p: {})

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        weight_decay: float = 0.0,
        *,
        scale: float = 0.05,
        iterations: int = 5,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "scale": scale, "iterations": iterations}
        super().__init__(params, defaults, seed=seed)

    def _direction(
        self, G: Tensor, state: dict[str, Any], group: dict[str, Any], parameter: Tensor, noise: torch.Generator
    ) -> Tensor:
        G.div_(G.abs().amax().clamp_min_(torch.finfo(G.dtype).tiny))  # of no effect but on what underflows
        for _ in range(group["iterations"]):
            for over in (1, 0):
                norm = torch.linalg.vector_norm(G, dim=over, keepdim=True) / G.shape[over] ** 0.5
                G.div_(torch.where(norm > 0, norm, 1.0))
        return G.mul_(group["scale"])


class RACS(MatrixOptimizer):
    """Row and column scaled SGD (arXiv 2502.07752): G / √(s qᵀ), with s qᵀ near G², and a limit on how fast it grows.

    From q = 1, five times: s ← G² q / ‖q‖², q ← (G²)ᵀ s / ‖s‖². Of both a moving average is kept, m + n
    numbers. That its start is corrected as Adam's is, is ours; the fixed point was not compared with the authors' code.
    """

    kind = Kind("RACS", "racs_beta", lambda p: {"s": ((p.shape[0],),), "q": ((p.shape[-1],),), "norm": ((),)})

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        weight_decay: float = 0.0,
        *,
        racs_beta: float = 0.9,
        scale: float = 0.05,
        limit: float = 1.01,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "racs_beta": racs_beta, "scale": scale, "limit": limit}
        super().__init__(params, defaults, seed=seed)

    def _direction(
        self, G: Tensor, state: dict[str, Any], group: dict[str, Any], parameter: Tensor, noise: torch.Generator
    ) -> Tensor:
        peak = G.abs().amax().clamp_min_(torch.finfo(G.dtype).tiny)
        square = (G / peak).square_()
        s, q = torch.ones_like(square[:, 0]), torch.ones_like(square[0])
        for _ in range(5):
            s = square @ q / q.square().sum().clamp_min(_LEAST)
            q = square.T @ s / s.square().sum().clamp_min(_LEAST)
        s.mul_(peak).mul_(peak)
        beta, dtype = group["racs_beta"], G.dtype
        s = moving_average(state, "s", s, beta, dtype, noise) / (1 - beta ** state["step"])
        q = moving_average(state, "q", q, beta, dtype, noise) / (1 - beta ** state["step"])
        G.mul_(s.clamp_min_(_LEAST).rsqrt()[:, None]).mul_(q.clamp_min_(_LEAST).rsqrt())
        return limited_(G, state, group["limit"]).mul_(group["scale"])


class RMNP(MatrixOptimizer):
    """RMNP (arXiv 2603.20527): Muon with each row of the momentum normalized in place of Newton–Schulz.

    M ← β M + (1 − β) G; U = 0.2 √n · rows of M over their norms: as large as AdamW's steps, like Muon's
    ``match_rms_adamw``.
    """

    kind = Kind("RMNP", "row_momentum", lambda p: matrix_shapes(p, "momentum"))

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        row_momentum: float = 0.95,
        state_dtype: str = "same",
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "row_momentum": row_momentum, "state_dtype": state_dtype}
        super().__init__(params, defaults, seed=seed)

    def _direction(
        self, G: Tensor, state: dict[str, Any], group: dict[str, Any], parameter: Tensor, noise: torch.Generator
    ) -> Tensor:
        M = moving_average(state, "momentum", G, group["row_momentum"], moment_dtype(parameter, group), noise)
        norm = torch.linalg.vector_norm(M, dim=1, keepdim=True)
        return M.mul_(torch.where(norm > 0, 0.2 * M.shape[1] ** 0.5 / norm, 0.0))
