"""Adam in a subspace of the gradient: GaLore, Fira, APOLLO and APOLLO-Mini."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poetx.optim.baselines.base import MatrixOptimizer, limited_, moment_dtype, moving_average
from poetx.optim.moments import shapes_of
from poetx.optim.saved_kinds import Kind, Shapes

#: How much an update may grow from one step to the next.
_GROWTH = 1.01


class _LowRank(MatrixOptimizer):
    """What all keep: Adam's moments of R = Pᵀ·G, where G is seen with its smaller side as rows."""

    _beta_count = 2

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        *,
        rank: int,
        scale: float,
        state_dtype: str,
        seed: int,
        **settings: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank, "scale": scale}
        defaults["state_dtype"] = state_dtype
        super().__init__(params, defaults | settings, seed=seed)

    def _direction(
        self, G: Tensor, state: dict[str, Any], group: dict[str, Any], parameter: Tensor, noise: torch.Generator
    ) -> Tensor:
        tall = G.shape[0] > G.shape[1]
        U = self._along_rows(G.T if tall else G, state, group, parameter, noise)
        return U.T if tall else U

    def _along_rows(
        self, G: Tensor, state: dict[str, Any], group: dict[str, Any], parameter: Tensor, noise: torch.Generator
    ) -> Tensor:
        raise NotImplementedError

    def _adam(
        self, R: Tensor, state: dict[str, Any], group: dict[str, Any], parameter: Tensor, noise: torch.Generator
    ) -> Tensor:
        """Adam's direction of R [r, k]."""
        (beta1, beta2), step = group["betas"], state["step"]
        kinds = [moment_dtype(parameter, group, signed=signed) for signed in (True, False)]
        m = moving_average(state, "exp_avg", R, beta1, kinds[0], noise)
        v = moving_average(state, "exp_avg_sq", R, beta2, kinds[1], noise, squared=True)
        return m.div_(1 - beta1**step).div_(v.div_(1 - beta2**step).sqrt_().add_(group["eps"]))


def _positive(norm: Tensor) -> Tensor:
    """Norms to divide by."""
    return norm.clamp_min_(torch.finfo(norm.dtype).tiny)


def _moment_shapes(p: Tensor) -> Shapes:
    """Of Adam's moments of rank r: [r, larger side], or codes of as many elements."""
    small, large = min(p.shape), max(p.shape)
    found: Shapes = {}
    for name in ("exp_avg", "exp_avg_sq"):
        codes = [shapes_of(name, r * large) for r in range(1, small + 1)]
        scales = tuple(dict.fromkeys(of[f"{name}_scale"][0] for of in codes))
        found |= {name: (*((r, large) for r in range(1, small + 1)), *(of[name][0] for of in codes))}
        found |= {f"{name}_scale": scales}
    return found


class GaLore(_LowRank):
    """GaLore (arXiv 2403.03507), and Fira (arXiv 2410.01623) with ``residual=True``.

    P [r columns] holds the largest singular vectors of G on its smaller side, anew every ``subspace_gap`` steps. With
    R = Pᵀ·G and N = Adam(R), whose moments stay when P changes, U = scale·P·N. Fira adds scale·φ⊙(G − P·R),
    φ_j = ‖N_:j‖ / ‖R_:j‖, which may grow by 1 % from one step to the next.

    Args:
        rank: r, at most the smaller side. P is kept in the weight's dtype.
    """

    kind = Kind("GaLore", "subspace_gap", lambda p: _galore_shapes(p))

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int = 128,
        subspace_gap: int = 200,
        scale: float = 0.25,
        residual: bool = False,
        state_dtype: str = "same",
        seed: int = 0,
    ) -> None:
        settings = {"subspace_gap": subspace_gap, "residual": residual, "state_dtype": state_dtype}
        super().__init__(params, lr, betas, eps, weight_decay, rank=rank, scale=scale, seed=seed, **settings)

    def _along_rows(
        self, G: Tensor, state: dict[str, Any], group: dict[str, Any], parameter: Tensor, noise: torch.Generator
    ) -> Tensor:
        rank = min(group["rank"], G.shape[0])
        if (state["step"] - 1) % group["subspace_gap"] == 0 or "subspace" not in state:
            # Eigenvectors of the small Gram matrix: the same subspace as by an SVD, in m × m memory.
            # Of NaN it finds nothing to decompose; R has it all the same.
            # Their signs are arbitrary, and moments outlive them: the largest entry of each is positive here.
            vectors = torch.linalg.eigh((G @ G.T).nan_to_num(0.0, 0.0, 0.0))[1][:, -rank:].flip(1)
            signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
            state["subspace"] = (vectors * signs).to(parameter.dtype).contiguous()
        P = state["subspace"].to(G.dtype)
        R = P.T @ G
        N = self._adam(R, state, group, parameter, noise)
        U = P @ N
        if group["residual"]:
            phi = torch.linalg.vector_norm(N, dim=0) / _positive(torch.linalg.vector_norm(R, dim=0))
            U = U + limited_(torch.addmm(G, P, R, alpha=-1).mul_(phi), state, _GROWTH)
        return U.mul_(group["scale"])


def _galore_shapes(p: Tensor) -> Shapes:
    small = min(p.shape)
    return _moment_shapes(p) | {"subspace": tuple((small, r) for r in range(1, small + 1)), "norm": ((),)}


class Apollo(_LowRank):
    """APOLLO (arXiv 2412.05270); with ``rank=1, by_channel=False`` APOLLO-Mini.

    P [r rows] ~ N(0, 1/r), drawn anew every ``sketch_gap`` steps from the seed and never stored; R = P·G, Ñ = Adam(R);
    U = √scale · G·diag(‖Ñ_:j‖ / ‖R_:j‖), or one factor ‖Ñ‖ / ‖R‖ for the matrix; it may grow by 1 % from one step to
    the next.
    """

    kind = Kind("APOLLO", "sketch_gap", lambda p: _apollo_shapes(p))

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int = 256,
        sketch_gap: int = 200,
        scale: float = 1.0,
        by_channel: bool = True,
        state_dtype: str = "same",
        seed: int = 0,
    ) -> None:
        settings = {"sketch_gap": sketch_gap, "by_channel": by_channel, "state_dtype": state_dtype}
        super().__init__(params, lr, betas, eps, weight_decay, rank=rank, scale=scale, seed=seed, **settings)

    def _along_rows(
        self, G: Tensor, state: dict[str, Any], group: dict[str, Any], parameter: Tensor, noise: torch.Generator
    ) -> Tensor:
        rank = min(group["rank"], G.shape[0])
        drawn = (state["step"] - 1) // group["sketch_gap"]
        draw = self._stream(parameter, drawn, "sketch")
        P = torch.randn(rank, G.shape[0], generator=draw, device=G.device, dtype=G.dtype).div_(rank**0.5)
        R = P @ G
        N = self._adam(R, state, group, parameter, noise)
        over = 0 if group["by_channel"] else None
        factor = torch.linalg.vector_norm(N, dim=over) / _positive(torch.linalg.vector_norm(R, dim=over))
        return limited_(G * factor, state, _GROWTH).mul_(group["scale"] ** 0.5)


def _apollo_shapes(p: Tensor) -> Shapes:
    return _moment_shapes(p) | {"norm": ((),)}
