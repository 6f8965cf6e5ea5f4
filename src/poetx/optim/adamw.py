"""AdamW whose moments are float32, bfloat16 or 8 bits, all with updates in float32."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poetx.distributed.sharded import local
from poetx.errors import UserError, nearest
from poetx.ops.dispatch import use_triton
from poetx.ops.random import Within
from poetx.ops.transaction import signals_deferred
from poetx.optim.moments import check_state_dtype, load, refuse_shards, shapes_of, start_, store_, stored_dtype
from poetx.optim.saved_kinds import Kind, Shapes
from poetx.optim.sliced import LARGEST, SlicedOptimizer, compute_dtype, first_element, flat, own_slices, wide, write_

EPS_MODES = ("corrected", "uncorrected")
#: What is kept, and whether it has a sign.
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}


class AdamW(SlicedOptimizer):
    """Adam with decoupled weight decay (the update of ``torch.optim.AdamW``) and small state.

    Bytes a parameter: 8 (``"float32"``), 4 (``"bfloat16"``), 2.03 (``"int8"``: codes with one float32 scale for 256
    of them, per moment). Both narrow forms are rounded stochastically, because the second moment moves by 0.1 % of
    itself in a step, less than half a step of either. Parameters below 4096 elements keep float32 state.

    Of a parameter that ``fully_shard`` has sharded the moments are sharded like it, and each rank draws the noise of
    its own elements: weights and state are those of one process with these gradients, to the bit.

    Args:
        params: parameters or groups, as for any torch optimizer.
        state_dtype: ``"float32"``, ``"bfloat16"``, ``"int8"``, or ``"same"``, bfloat16 for bfloat16 parameters and
            float32 for wider ones; a group may set its own.
        eps_mode: ``"corrected"`` adds ε to √v̂, v̂ = v / (1 − β₂ᵗ), as torch does; ``"uncorrected"`` to √v, as the
            published POET runs do: ε √(1 − β₂ᵗ)⁻¹ in torch's form. Where gradients are near ε, the first steps after
            each merge are then smaller, a warm-up (docs/method.md, *Training as published*). A group may set its own.
        seed: of the rounding noise.

    Raises:
        UserError: a value outside its range; ``"int8"`` for sharded parameters, whose shards end within its blocks.
    """

    takes_shards = True
    kind = Kind("AdamW of poetx", "state_dtype", lambda p: _shapes(p))

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_dtype: str = "bfloat16",
        eps_mode: str = "corrected",
        seed: int = 0,
    ) -> None:
        self._waiting: dict[Tensor, tuple[Numbers, Any]] = {}  # parameters whose update the kernels are to take
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"state_dtype": state_dtype, "eps_mode": eps_mode}, seed=seed)
        for group in self.param_groups:
            mode = group["eps_mode"]
            if mode not in EPS_MODES:
                guess = nearest(str(mode), EPS_MODES)
                raise UserError(f"eps_mode={mode!r}: must be one of {', '.join(EPS_MODES)}{guess}")
            check_state_dtype(group["state_dtype"])
            refuse_shards(group["state_dtype"], group["params"])

    def _update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "exp_avg" not in state:
            for moment, signed in _SIGNED.items():
                dtype = stored_dtype(group["state_dtype"], parameter, signed=signed)
                start_(state, moment, parameter, dtype, flat=True)
        numbers = _numbers(group, state["step"])
        if not local(parameter).numel():  # another rank has all of its rows
            return
        if use_triton(parameter):
            from poetx.ops.triton import adamw as kernel

            if kernel.can_step(parameter):
                moments = (flat(state["exp_avg"]), flat(state["exp_avg_sq"]))
                scales = (state["exp_avg_scale"], state["exp_avg_sq_scale"]) if "exp_avg_scale" in state else None
                place = (self._noise_seed(parameter, state["step"]), first_element(parameter))
                if parameter in self._waiting:  # listed twice
                    self._finish()
                whole = local(grad).contiguous()
                update = kernel.Update(local(parameter), whole, moments, scales, *place)
                self._waiting[parameter] = numbers, update
                if whole is not local(grad):  # one copy at a time
                    self._finish()
                return
        own, weight, grad = local(parameter), flat(parameter), flat(grad)
        for here, noise in own_slices(parameter, self._noise(parameter, state["step"])):
            _update_slice(weight[here], grad[here], state, here, numbers, noise)
        if not own.is_contiguous():
            own.copy_(weight.view(own.shape))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._waiting = {}

    def _finish(self) -> None:
        waiting, self._waiting = self._waiting, {}
        if not waiting:
            return
        from poetx.ops.triton import adamw as kernel

        alike: dict[Numbers, list[Any]] = {}
        for numbers, update in waiting.values():
            alike.setdefault(numbers, []).append(update)
        with signals_deferred() if len(waiting) > 1 else contextlib.nullcontext():
            for numbers, updates in alike.items():
                kernel.step_(updates, numbers, bound=LARGEST)
            for parameter in waiting:
                torch.autograd.graph.increment_version(parameter)  # graphs from before it are stale


def _shapes(parameter: Tensor) -> Shapes:
    """Moments are flat, and of a sharded parameter, or one that was sharded when they were saved, of its shape."""
    codes = {key: value for name in _SIGNED for key, value in shapes_of(name, parameter.numel()).items()}
    return codes | {name: (*codes[name], tuple(parameter.shape)) for name in _SIGNED}


class Numbers(NamedTuple):
    """What step t multiplies by: the ``rests`` are 1 − β, ``correction2`` is 1 − β₂ᵗ, ``decay`` 1 − lr·λ.

    ``rate`` is lr / (1 − β₁ᵗ); ``eps`` is added to √(v / correction2).
    """

    rest1: float
    beta2: float
    rest2: float
    correction2: float
    eps: float
    decay: float
    rate: float


def _numbers(group: dict[str, Any], step: int) -> Numbers:
    beta1, beta2 = group["betas"]
    eps, correction2 = group["eps"], 1 - beta2**step
    if group.get("eps_mode") == "uncorrected":
        eps /= correction2**0.5
    decay, rate = 1 - group["lr"] * group["weight_decay"], group["lr"] / (1 - beta1**step)
    return Numbers(1 - beta1, beta2, 1 - beta2, correction2, eps, decay, rate)


def _update_slice(
    weight: Tensor, grad: Tensor, state: dict[str, Any], here: slice, by: Numbers, noise: torch.Generator | Within
) -> None:
    dtype = compute_dtype(weight)
    grad = wide(grad, dtype)
    m = load(state, "exp_avg", here, dtype).lerp_(grad, by.rest1)
    store_(state, "exp_avg", here, m, noise)
    v = load(state, "exp_avg_sq", here, dtype).mul_(by.beta2).addcmul_(grad, grad, value=by.rest2)
    store_(state, "exp_avg_sq", here, v, noise)
    del grad
    denominator = v.div_(by.correction2).sqrt_().add_(by.eps)
    value = weight.to(dtype, copy=True).mul_(by.decay)
    value.addcdiv_(m, denominator, value=-by.rate)
    write_(weight, value, noise)
