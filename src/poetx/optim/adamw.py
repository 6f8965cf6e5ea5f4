"""AdamW whose moments are float32, bfloat16 or 8 bits, all with updates in float32."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from poetx.distributed.sharded import is_sharded, local
from poetx.errors import UserError, nearest
from poetx.ops.dispatch import use_triton
from poetx.ops.random import Within
from poetx.ops.side import block_count
from poetx.optim.saved_kinds import Kind, Shapes
from poetx.optim.sliced import LARGEST, SlicedOptimizer, compute_dtype, first_element, flat, own_slices, wide, write_

STATE_DTYPES = ("same", "float32", "bfloat16", "int8")
EPS_MODES = ("corrected", "uncorrected")
#: Elements that share one scale in the 8-bit state.
BLOCK = 256
#: Parameters below this size keep float32 state: there is nothing to save.
_SMALL = 4096
# Code c stands for scale · (c / codes)^power: steps finer towards zero. The moments of one block spread over
# decades; the second one is divided by, so it gets the wider range and never rounds to zero.
_CODES = {"exp_avg": (127, 3), "exp_avg_sq": (255, 4)}


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
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"state_dtype": state_dtype, "eps_mode": eps_mode}, seed=seed)
        for group in self.param_groups:
            for name, choices in (("state_dtype", STATE_DTYPES), ("eps_mode", EPS_MODES)):
                if group[name] not in choices:
                    guess = nearest(str(group[name]), choices)
                    raise UserError(f"{name}={group[name]!r}: must be one of {', '.join(choices)}{guess}")
            if group["state_dtype"] == "int8" and any(map(is_sharded, group["params"])):
                raise UserError(
                    f"state_dtype='int8': {BLOCK} neighbours share a scale, and shards end among them; use "
                    "state_dtype='bfloat16' under fully_shard"
                )

    def _update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        kind = group["state_dtype"]
        if kind == "same":
            kind = "bfloat16" if parameter.dtype == torch.bfloat16 else "float32"
        if parameter.numel() < _SMALL:
            kind = "float32"
        if "exp_avg" not in state:
            for moment in _CODES:
                _initialize(state, moment, parameter, kind)
        numbers = _numbers(group, state["step"])
        if not local(parameter).numel():  # another rank has all of its rows
            return
        if use_triton(parameter):
            from poetx.ops.triton import adamw as kernel

            if kernel.can_step(parameter):
                moments = (flat(state["exp_avg"]), flat(state["exp_avg_sq"]))
                scales = (state["exp_avg_scale"], state["exp_avg_sq_scale"]) if "exp_avg_scale" in state else None
                place = {"seed": self._noise_seed(parameter, state["step"]), "first": first_element(parameter)}
                kernel.step_(local(parameter), local(grad), moments, scales, numbers, bound=LARGEST, **place)
                return
        own, weight, grad = local(parameter), flat(parameter), flat(grad)
        for here, noise in own_slices(parameter, self._noise(parameter, state["step"])):
            _update_slice(weight[here], grad[here], state, here, numbers, noise)
        if not own.is_contiguous():
            own.copy_(weight.view(own.shape))


def _shapes(parameter: Tensor) -> Shapes:
    """Moments are flat, and of a sharded parameter, or one that was sharded when they were saved, of its shape."""
    size = parameter.numel()
    scales = dict.fromkeys((f"{moment}_scale" for moment in _CODES), ((block_count(size, BLOCK),),))
    return dict.fromkeys(_CODES, ((size,), tuple(parameter.shape))) | scales


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
    m = _load(state, "exp_avg", here, dtype).lerp_(grad, by.rest1)
    _store_(state, "exp_avg", here, m, noise)
    v = _load(state, "exp_avg_sq", here, dtype).mul_(by.beta2).addcmul_(grad, grad, value=by.rest2)
    _store_(state, "exp_avg_sq", here, v, noise)
    del grad
    denominator = v.div_(by.correction2).sqrt_().add_(by.eps)
    value = weight.to(dtype, copy=True).mul_(by.decay)
    value.addcdiv_(m, denominator, value=-by.rate)
    write_(weight, value, noise)


def _initialize(state: dict[str, Any], moment: str, parameter: Tensor, kind: str) -> None:
    size, device = parameter.numel(), parameter.device
    if kind == "int8":
        dtype = torch.int8 if moment == "exp_avg" else torch.uint8
        state[moment] = torch.zeros(size, dtype=dtype, device=device)
        state[f"{moment}_scale"] = torch.zeros(block_count(size, BLOCK), device=device)
    else:
        dtype = torch.bfloat16 if kind == "bfloat16" else compute_dtype(parameter)
        whole = not is_sharded(parameter)
        state[moment] = (
            torch.zeros(size, dtype=dtype, device=device) if whole else torch.zeros_like(parameter, dtype=dtype)
        )


def _load(state: dict[str, Any], moment: str, here: slice, dtype: torch.dtype) -> Tensor:
    """A fresh tensor of the moment's values in this slice, which begins where a block does."""
    stored, scale = flat(state[moment])[here], state.get(f"{moment}_scale")
    if scale is None:
        return stored.to(dtype, copy=True)
    codes, power = _CODES[moment]
    ratio = stored.to(dtype).div_(codes)
    value = ratio.abs().pow_(power).mul_(ratio.sign())
    return _scaled_(value, scale[here.start // BLOCK :])


def _scaled_(value: Tensor, scale: Tensor) -> Tensor:
    """``value`` times its block's scale, in place; the last block may be short."""
    full = value.numel() // BLOCK
    value[: full * BLOCK].view(full, BLOCK).mul_(scale[:full, None])
    if full * BLOCK < value.numel():
        value[full * BLOCK :].mul_(scale[full])
    return value


def _store_(state: dict[str, Any], moment: str, here: slice, value: Tensor, noise: torch.Generator | Within) -> None:
    stored = flat(state[moment])[here]
    if f"{moment}_scale" not in state:
        write_(stored, value, noise)
        return
    codes, power = _CODES[moment]
    scale = state[f"{moment}_scale"][here.start // BLOCK : block_count(here.stop, BLOCK)]
    assert not isinstance(noise, Within)  # refused for shards
    padded = torch.nn.functional.pad(value.abs(), (0, -value.numel() % BLOCK))
    scale.copy_(padded.view(-1, BLOCK).amax(1))
    ratio = _scaled_(value.abs(), torch.where(scale > 1e-37, 1 / scale, 0.0))
    low = ratio.pow(1 / power).mul_(codes).floor_().clamp_(0, codes - 1)
    below = (low / codes).pow_(power)
    above = (low + 1).div_(codes).pow_(power)
    chance = torch.rand(low.shape, dtype=low.dtype, device=low.device, generator=noise)
    low += chance < (ratio - below) / (above - below)
    if moment == "exp_avg_sq":
        low = torch.where(ratio > 0, low.clamp_min_(1), low)
    stored.copy_(low.mul_(value.sign()))
