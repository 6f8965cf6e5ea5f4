"""One step of AdamW in one pass: state of any width read, updated, rounded and written.

Plain torch takes 15 kernels a parameter for bfloat16 state and 90 for 8 bits, with float32 temporaries between them. A
model has hundreds of small parameters, rotations and norms, whose launches would take the host longer than the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx.ops.library import cached_tensors
from poetx.ops.triton.rounding import rounded
from poetx.ops.triton.tuning import address, ceil_div, launch, on_device

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


@triton.jit
def update_rows(
    weight,
    grad,
    first,
    second,
    first_scale,
    second_scale,
    row,
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
    BLOCK: tl.constexpr,
):
    """The step of these blocks of elements; NARROW: the state is of 8 bits."""
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
    """``ROWS`` blocks of elements of one parameter to a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tensors = (weight, grad, first, second, first_scale, second_scale)
    numbers = (bound, beta1_rest, beta2, beta2_rest, correction2, eps, decay, rate)
    update_rows(*tensors, row, N, seed, first_number, *numbers, NARROW, BLOCK)


#: Columns of the table that says where the parameters of a launch are.
_WEIGHT, _GRAD, _FIRST, _SECOND, _FIRST_SCALE, _SECOND_SCALE, _NUMBER, _SEED, _FIRST_NUMBER, _PROGRAM = map(
    tl.constexpr, range(10)
)
_COLUMNS = tl.constexpr(10)


@triton.jit
def adamw_many_kernel(
    table,
    places,
    bound,
    beta1_rest,
    beta2,
    beta2_rest,
    correction2,
    eps,
    decay,
    rate,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    SIXTEENTHS: tl.constexpr,
    NARROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same of many parameters: ``places`` says for each program whose elements it steps."""
    program = tl.program_id(0)
    entry = table + tl.load(places + program) * _COLUMNS
    weight = tl.load(entry + _WEIGHT).to(tl.pointer_type(WEIGHT))  # pyright: ignore[reportArgumentType]
    grad = tl.load(entry + _GRAD).to(tl.pointer_type(GRAD))  # pyright: ignore[reportArgumentType]
    first = tl.load(entry + _FIRST).to(tl.pointer_type(FIRST))  # pyright: ignore[reportArgumentType]
    second = tl.load(entry + _SECOND).to(tl.pointer_type(SECOND))  # pyright: ignore[reportArgumentType]
    first_scale = tl.load(entry + _FIRST_SCALE).to(tl.pointer_type(tl.float32))
    second_scale = tl.load(entry + _SECOND_SCALE).to(tl.pointer_type(tl.float32))
    N = tl.load(entry + _NUMBER).to(tl.int32)
    if SIXTEENTHS:  # sizes and addresses are multiples, so that 16 bytes are moved at a time
        weight, grad, N = tl.multiple_of(weight, 16), tl.multiple_of(grad, 16), tl.multiple_of(N, 16)
        first, second = tl.multiple_of(first, 16), tl.multiple_of(second, 16)
    row = (program - tl.load(entry + _PROGRAM).to(tl.int32)) * ROWS + tl.arange(0, ROWS)
    tensors = (weight, grad, first, second, first_scale, second_scale)
    numbers = (bound, beta1_rest, beta2, beta2_rest, correction2, eps, decay, rate)
    place = (tl.load(entry + _SEED), tl.load(entry + _FIRST_NUMBER).to(tl.int32))
    update_rows(*tensors, row, N, *place, *numbers, NARROW, BLOCK)


def can_step(parameter: Tensor) -> bool:
    """Whether :func:`step_` takes this parameter: elements are counted in 31 bits and lie side by side."""
    return parameter.is_contiguous() and parameter.numel() < 2**31 - _BLOCK * _BLOCKS


class Update(NamedTuple):
    """What AdamW steps: contiguous tensors of as many elements.

    Attributes:
        weight, grad: of any shape. moments: flat, of both kinds; scales: float32 [blocks], of 8-bit moments, or None.
            weight, moments and scales are written in place.
        seed: of the rounding noise, 56 bits. first: the first element's place in the parameter that this is a part of.
    """

    weight: Tensor
    grad: Tensor
    moments: tuple[Tensor, Tensor]
    scales: tuple[Tensor, Tensor] | None
    seed: int
    first: int = 0

    @property
    def kind(self) -> tuple[object, ...]:
        """What updates of one launch have in common."""
        tensors = (self.weight, self.grad, *self.moments)
        sixteenths = self.weight.numel() % 16 == 0 and all(address(t) % 16 == 0 for t in tensors)
        return (self.weight.device, *(t.dtype for t in tensors), self.scales is None, sixteenths)


#: Larger parameters are launched by themselves: their kernels take longer than the host to launch them.
_LARGEST_OF_MANY = 1 << 22


def step_(updates: Sequence[Update], numbers: Sequence[float], *, bound: float) -> None:
    """Update weights and moments in place: small ones of a kind in one launch, with the same bits as by themselves.

    Args:
        numbers: 1 − β₁, β₂, 1 − β₂, 1 − β₂ᵗ, what is added to √(v / (1 − β₂ᵗ)), 1 − lr·λ, lr / (1 − β₁ᵗ).
        bound: what is past it in a gradient becomes it; infinities become NaN.
    """
    kinds: dict[object, list[Update]] = {}
    for number, update in enumerate(updates):
        small = update.weight.numel() < _LARGEST_OF_MANY and update.first + update.weight.numel() < 2**31
        kinds.setdefault(update.kind if small else number, []).append(update)
    for those in kinds.values():
        _step_many(those, numbers, bound) if len(those) > 1 else _step_one(those[0], numbers, bound)


def _step_one(update: Update, numbers: Sequence[float], bound: float) -> None:
    weight, grad, moments, scales, seed, first = update
    launch(
        adamw_kernel,
        (ceil_div(weight.numel(), _BLOCK * _BLOCKS),),
        weight,
        *(grad, *moments, *(scales or moments), weight.numel(), seed, first, bound, *numbers),
        NARROW=scales is not None,
        ROWS=_BLOCKS,
        BLOCK=_BLOCK,
    )


def _step_many(updates: Sequence[Update], numbers: Sequence[float], bound: float) -> None:
    sizes = tuple(update.weight.numel() for update in updates)
    rows, program = [], 0
    for update, size in zip(updates, sizes, strict=True):
        tensors = (update.weight, update.grad, *update.moments, *(update.scales or update.moments))
        rows.append([*map(address, tensors), size, update.seed, update.first, program])
        program += ceil_div(size, _BLOCK * _BLOCKS)
    first = updates[0]
    device, sixteenths = first.weight.device, first.kind[-1]
    dtypes = [t.dtype for t in (first.weight, first.grad, *first.moments)]
    settings = dict(zip(("WEIGHT", "GRAD", "FIRST", "SECOND"), (_DTYPES[dtype] for dtype in dtypes), strict=True))
    settings |= {"SIXTEENTHS": sixteenths, "NARROW": first.scales is not None, "ROWS": _BLOCKS, "BLOCK": _BLOCK}
    table = on_device(rows, device)
    launch(adamw_many_kernel, (program,), table, _places(sizes, device), bound, *numbers, **settings)


@cached_tensors
def _places(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """For each program of these sizes one after the other, int32: which of them it is for."""
    programs = [ceil_div(size, _BLOCK * _BLOCKS) for size in sizes]
    return torch.tensor([i for i, count in enumerate(programs) for _ in range(count)], dtype=torch.int32).to(device)


_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.int8: tl.int8, torch.uint8: tl.uint8}
