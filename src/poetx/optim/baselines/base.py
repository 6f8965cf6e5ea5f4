"""What the rivals' optimizers share: a direction of a whole matrix, and a step along it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poetx.errors import UserError
from poetx.optim.moments import check_state_dtype, load, shapes_of, start_, store_, stored_dtype
from poetx.optim.saved_kinds import Shapes
from poetx.optim.sliced import SLICE, SlicedOptimizer, compute_dtype, wide, write_


class MatrixOptimizer(SlicedOptimizer):
    """W ← (1 − lr·λ) W − lr·U, with U from :meth:`_direction`, in float32 (float64 for float64) a matrix at a time.

    bfloat16 weights and momenta are rounded stochastically, as in :class:`~poetx.optim.sliced.SlicedOptimizer`. Those
    that keep matrices take ``state_dtype``, which a group may set: ``"same"`` as the weight's, ``"float32"``,
    ``"bfloat16"`` or ``"int8"``, as in :class:`poetx.optim.AdamW`: of matrices below 4096 elements float32.

    Raises:
        UserError: a parameter that is no matrix, and whatever SlicedOptimizer refuses.
    """

    _beta_count = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if "state_dtype" in self.defaults:
            check_state_dtype(param_group["state_dtype"])
        for parameter in param_group["params"]:
            if parameter.ndim != 2:
                raise UserError(
                    f"{type(self).__name__}: a parameter of shape {tuple(parameter.shape)} is no matrix; give it to "
                    "another optimizer"
                )

    def _update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        noise = self._noise(parameter, state["step"])
        dtype = compute_dtype(parameter)
        U = self._direction(wide(grad, dtype), state, group, parameter, noise)
        value = parameter.to(dtype, copy=True).mul_(1 - group["lr"] * group["weight_decay"])
        write_(parameter, value.add_(U, alpha=-group["lr"]), noise)

    def _direction(
        self, G: Tensor, state: dict[str, Any], group: dict[str, Any], parameter: Tensor, noise: torch.Generator
    ) -> Tensor:
        """U [m, n]. ``G`` is the gradient, a copy that may be written to; ``state`` has the step's number already."""
        raise NotImplementedError


def matrix_shapes(parameter: Tensor, name: str) -> Shapes:
    """What a moment of the size of ``parameter`` may be saved as: a matrix, or codes."""
    codes = shapes_of(name, parameter.numel())
    return codes | {name: (tuple(parameter.shape), *codes[name])}


def moment_dtype(parameter: Tensor, group: dict[str, Any], *, signed: bool = True) -> torch.dtype:
    """What a group's ``state_dtype`` stores a moment of ``parameter`` in; states of before had none."""
    return stored_dtype(group.get("state_dtype", "same"), parameter, signed=signed)


def moving_average(
    state: dict[str, Any],
    name: str,
    value: Tensor,
    beta: float,
    dtype: torch.dtype,
    noise: torch.Generator,
    *,
    squared: bool = False,
) -> Tensor:
    """``state[name]`` ← β·state[name] + (1 − β)·value, of ``value``² with ``squared``, kept in ``dtype``.

    Returns:
        It, a new tensor like ``value``.
    """
    if name not in state:
        start_(state, name, value, dtype)
    if f"{name}_scale" not in state:
        average = state[name].to(value.dtype, copy=True)
        average = _on_(average, value, beta, squared)
        write_(state[name], average, noise)
        return average
    average = torch.empty_like(value, memory_format=torch.contiguous_format)
    flat, news = average.view(-1), value.reshape(-1)
    for start in range(0, flat.numel(), SLICE):
        here = slice(start, min(start + SLICE, flat.numel()))
        flat[here] = _on_(load(state, name, here, value.dtype), news[here], beta, squared)
        store_(state, name, here, flat[here], noise)
    return average


def _on_(old: Tensor, new: Tensor, beta: float, squared: bool) -> Tensor:
    """``old`` one step further, in place."""
    return old.mul_(beta).addcmul_(new, new, value=1 - beta) if squared else old.lerp_(new, 1 - beta)


def limited_(U: Tensor, state: dict[str, Any], growth: float) -> Tensor:
    """``U`` scaled down, in place, where its norm is more than ``growth`` times that of the step before."""
    norm = torch.linalg.vector_norm(U)
    if "norm" in state:
        limit = state["norm"] * growth
        factor = torch.where((norm > limit) & (limit > 0), limit / norm, 1.0)
        U.mul_(factor)
        norm = norm * factor
        state["norm"].copy_(norm)
    else:
        state["norm"] = norm
    return U
