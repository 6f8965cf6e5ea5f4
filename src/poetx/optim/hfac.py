"""H-Fac (arXiv 2406.09958): factored momentum and factored scaling, O(m + n) state for an m × n matrix.

With β̂ₜ = β (1 − β^(t−1)) / (1 − β^t), so that β̂₁ = 0 at the first step:

    u ← β̂₁ u + (1 − β̂₁) G 1/n        v ← β̂₁ v + (1 − β̂₁) Gᵀ 1/m
    r ← β̂₂ r + (1 − β̂₂) (G² + ε) 1   s ← β̂₂ s + (1 − β̂₂) (G² + ε)ᵀ 1      V̂ = r sᵀ / 1ᵀr
    φ = β̂₁ (u − G1/n) / √(r/n)        ψ = β̂₁ (v − Gᵀ1/m) / √(s/m)           (constant along the other side)
    X ← X − η (½(φ + ψ) + clip(G/√V̂) + λX),   clip(U) = U / max(1, RMS(U)/d)

A vector has no second side: it keeps its second moment whole and no momentum, as in Adafactor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poetx.optim.saved_kinds import Kind, Shapes
from poetx.optim.sliced import SlicedOptimizer, compute_dtype, row_slices, wide, write_


class HFac(SlicedOptimizer):
    """Four vectors of state for a matrix.

    Args:
        params: parameters or groups, as for any torch optimizer. A tensor with more than two dimensions counts as a
            matrix of its first against all others.
        lr: η. betas: β₁, β₂. eps: ε, added to G². weight_decay: λ. clip: d, the largest RMS of the scaled gradient.
        seed: of the rounding noise of bfloat16 parameters.

    Raises:
        UserError: a value outside its range.
    """

    kind = Kind("HFac", "clip", lambda p: _shapes(p))

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-30,
        weight_decay: float = 0.0,
        *,
        clip: float = 1.0,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "clip": clip}
        super().__init__(params, defaults, seed=seed)

    def _update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        noise = self._noise(parameter, state["step"])
        if parameter.ndim < 2:
            _update_vector(parameter, grad, state, group, noise)
            return
        weight = parameter if parameter.is_contiguous() else parameter.contiguous()
        _update_matrix(weight.view(weight.shape[0], -1), grad.reshape(weight.shape[0], -1), state, group, noise)
        if weight is not parameter:
            parameter.copy_(weight)


def _shapes(p: Tensor) -> Shapes:
    m, n = (p.shape[0], p[0].numel() if len(p) else 0) if p.ndim >= 2 else (0, 0)
    return {"u": ((m,),), "v": ((n,),), "r": ((m,),), "s": ((n,),), "variance": (tuple(p.shape),)}


def _corrected(beta: float, step: int) -> float:
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)


def _update_vector(
    weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], noise: torch.Generator
) -> None:
    dtype, step = compute_dtype(weight), state["step"]
    if "variance" not in state:
        state["variance"] = torch.zeros_like(weight, dtype=dtype)
    beta2 = _corrected(group["betas"][1], step)
    grad = wide(grad, dtype)
    state["variance"].mul_(beta2).add_(grad.square() + group["eps"], alpha=1 - beta2)
    update = grad / state["variance"].sqrt()
    update /= (update.square().mean().sqrt() / group["clip"]).clamp_min(1)
    value = weight.to(dtype)
    write_(weight, value - group["lr"] * (update + group["weight_decay"] * value), noise)


def _update_matrix(
    weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], noise: torch.Generator
) -> None:
    (m, n), dtype, step = weight.shape, compute_dtype(weight), state["step"]
    if "u" not in state:
        for name, size in (("u", m), ("v", n), ("r", m), ("s", n)):
            state[name] = torch.zeros(size, dtype=dtype, device=weight.device)
    beta1, beta2 = (_corrected(beta, step) for beta in group["betas"])
    row_mean, column_mean = torch.empty_like(state["u"]), torch.zeros_like(state["v"])
    row_square, column_square = torch.empty_like(state["r"]), torch.zeros_like(state["s"])
    for here in row_slices(m, n):
        g = wide(grad[here], dtype)
        row_mean[here] = g.mean(1)
        column_mean += g.sum(0) / m
        g = g.square().add_(group["eps"])
        row_square[here] = g.sum(1)
        column_square += g.sum(0)
    state["u"].lerp_(row_mean, 1 - beta1)
    state["v"].lerp_(column_mean, 1 - beta1)
    state["r"].lerp_(row_square, 1 - beta2)
    state["s"].lerp_(column_square, 1 - beta2)
    phi = beta1 * (state["u"] - row_mean) / (state["r"] / n).sqrt()
    psi = beta1 * (state["v"] - column_mean) / (state["s"] / m).sqrt()
    # 1/√V̂ as the product of two vectors
    rows, columns = (state["r"] / state["r"].sum()).rsqrt(), state["s"].rsqrt()
    squares = torch.zeros((), dtype=dtype, device=weight.device)
    for here in row_slices(m, n):
        squares += (wide(grad[here], dtype) * rows[here, None]).mul_(columns).square_().sum()
    scale = 1 / ((squares / (m * n)).sqrt() / group["clip"]).clamp_min(1)
    for here in row_slices(m, n):
        update = (wide(grad[here], dtype) * rows[here, None]).mul_(columns).mul_(scale)
        update.add_(phi[here, None], alpha=0.5).add_(psi, alpha=0.5)
        value = weight[here].to(dtype, copy=True)
        update.add_(value, alpha=group["weight_decay"])
        write_(weight[here], value.sub_(update, alpha=group["lr"]), noise)
