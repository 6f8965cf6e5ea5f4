"""One step of AdamW on one parameter in one pass: state of any width read, updated, rounded and written.

Plain torch takes 15 kernels for bfloat16 state and 90 for 8 bits, with float32 temporaries between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from poetx.ops.triton.rounding import rounded
from poetx.ops.triton.tuning import ceil_div, launch

#: Elements that share a scale in the 8-bit state, and such blocks to a program.
_BLOCK, _BLOCKS = 256, 4


@triton.jit
def _quantized(value, scale, noise, CODES: tl.constexpr, POWER: tl.constexpr):
    """The codes of magnitudes ``value``, [blocks, BLOCK], to be read as scale · (code / CODES)^POWER; float32."""
    ratio = value * tl.where(scale > 1e-37, 1.0 / scale, 0.0)[:, None]
    root = tl.sqrt(tl.sqrt(ratio)) if POWER == 4 else tl.exp2(tl.log2(tl.maximum(ratio, 1e-37)) / 3)
    low = tl.minimum(tl.maximum(tl.floor(root * CODES), 0.0), CODES - 1.0)
    below, above = low / CODES, (low + 1) / CODES
    below = below * below * below * (below if POWER == 4 else 1.0)
    above = above * above * above * (above if POWER == 4 else 1.0)
    chance = (noise & 0xFFFFFF).to(tl.float32) * (1.0 / 16777216)
    return low + tl.where(chance < (ratio - below) / (above - below), 1.0, 0.0), ratio


@triton.jit(do_not_specialize=["seed", "first_number"])
def adamw_kernel(
    weight,
    grad,
    first,
    second,
    first_scale,
    second_scale,
    N,
    seed,
    first_number,
    bound,
    beta1_rest,
    beta2,
    beta2_rest,
    correction2,
    eps,
    decay,
    rate,
    NARROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``ROWS`` blocks of elements; NARROW: the state is of 8 bits."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    number = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = number < N
    there = number.to(tl.int64)
    g = tl.load(grad + there, mask=inside, other=0.0).to(tl.float32)
    g = tl.minimum(tl.maximum(g, -bound), bound) + (g - g)
    m = tl.load(first + there, mask=inside, other=0).to(tl.float32)
    v = tl.load(second + there, mask=inside, other=0).to(tl.float32)
    if NARROW:
        scales = row * BLOCK < N
        m, v = m / 127, v / 255
        m = m * m * m * tl.load(first_scale + row, mask=scales, other=0.0)[:, None]
        v = v * v * v * v * tl.load(second_scale + row, mask=scales, other=0.0)[:, None]
    m = m + (g - m) * beta1_rest
    v = v * beta2 + g * g * beta2_rest
    noise, noise1, noise2, _ = tl.randint4x(seed, number + first_number)  # pyright: ignore[reportGeneralTypeIssues]
    if NARROW:
        size = tl.abs(m)
        scale1, scale2 = tl.max(size, 1), tl.max(v, 1)
        code1, _ = _quantized(size, scale1, noise1, 127, 3)
        code2, ratio2 = _quantized(v, scale2, noise2, 255, 4)
        code1 = tl.where(m < 0, -code1, tl.where(m > 0, code1, 0.0))
        code2 = tl.where(ratio2 > 0, tl.maximum(code2, 1.0), 0.0)
        tl.store(first_scale + row, scale1, mask=scales)
        tl.store(second_scale + row, scale2, mask=scales)
        tl.store(first + there, code1.to(tl.int32).to(tl.int8), mask=inside)
        tl.store(second + there, code2.to(tl.int32).to(tl.uint8), mask=inside)
    else:
        tl.store(first + there, rounded(m, noise1, first.dtype.element_ty), mask=inside)
        tl.store(second + there, rounded(v, noise2, second.dtype.element_ty), mask=inside)
    value = tl.load(weight + there, mask=inside, other=0.0).to(tl.float32) * decay
    value -= rate * m / (tl.sqrt(v / correction2) + eps)
    tl.store(weight + there, rounded(value, noise, weight.dtype.element_ty), mask=inside)


def can_step(parameter: Tensor) -> bool:
    """Whether :func:`step_` takes this parameter: elements are counted in 31 bits and lie side by side."""
    return parameter.is_contiguous() and parameter.numel() < 2**31 - _BLOCK * _BLOCKS


def step_(
    parameter: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    scales: tuple[Tensor, Tensor] | None,
    numbers: Sequence[float],
    *,
    bound: float,
    seed: int,
    first: int = 0,
) -> None:
    """Update ``parameter`` and its flat moments in place; ``scales``, float32 [blocks], are those of 8-bit ones.

    Args:
        numbers: 1 − β₁, β₂, 1 − β₂, 1 − β₂ᵗ, what is added to √(v / (1 − β₂ᵗ)), 1 − lr·λ, lr / (1 − β₁ᵗ).
        bound: what is past it in ``grad`` becomes it; infinities become NaN.
        seed: of the rounding noise, 56 bits. first: the first element's place in the parameter that this is a part of.
    """
    launch(
        adamw_kernel,
        (ceil_div(parameter.numel(), _BLOCK * _BLOCKS),),
        parameter,
        *(grad.contiguous(), *moments, *(scales or moments), parameter.numel(), seed, first, bound, *numbers),
        NARROW=scales is not None,
        ROWS=_BLOCKS,
        BLOCK=_BLOCK,
    )
