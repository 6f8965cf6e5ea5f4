"""Low-precision storage of W': groups of neighbours in a row share a scale, codes lie densely in bytes.

For a weight w in a group with scale s (and offset o), stored as the code c (levels of every format are sorted by c):

    int8, int4       w = o + s·c                    c = 0 … 2^N − 1, o and s from the group's least and largest weight
    bipolar-intN     w = s·(2c − (2^N − 1))         odd levels, symmetric, no zero (arXiv 2409.17870); N = 2 … 8
    nf4              w = s·L_c                      16 quantiles of the normal distribution (arXiv 2305.14314)
    fp8              w = s·e4m3(c)                  s = max|w| / 448

Scales and offsets are bfloat16, rounded away from the group so that every weight lies between two levels: rounding
them costs under 1 % of the resolution, clipping would bias what is rounded stochastically. A group with a weight that
is not finite reads as not finite. Codes of N bits take N bits: as one plane of 8, 4, 2 or 1 bits for every one in N's
binary digits (N = 7: 4 + 2 + 1). In a plane of w bits, byte k of a row holds columns k, k + B, k + 2B, …,
B = ⌈n·w/8⌉, lowest bits first, so that unpacking writes runs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from poetx.ops.dispatch import SMALLEST_BLOCK, use_triton
from poetx.ops.library import cached_tensors, device_type
from poetx.ops.side import block_count

#: Smaller scales are zero: none is subnormal, and what they would scale counts as zero.
_LEAST = 1e-32
#: Weights that are worked on at once: what float32 (or int64, where a table is searched) temporaries are bounded by.
#: The noise of stochastic rounding is drawn slice by slice, so this is part of what a seed means.
_SLICE = 1 << 18
#: The same for reading, where it decides nothing but speed: a cache's worth on a CPU, few launches elsewhere.
_READ_SLICE = {"cpu": 1 << 18}
_READ_SLICE_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class Format:
    """One storage format. ``kind``: ``"affine"``, ``"bipolar"``, or ``"table"`` (nf4, fp8)."""

    name: str
    bits: int
    kind: str

    @property
    def top(self) -> float:
        """The largest level before scaling."""
        return {"nf4": 1.0, "fp8": 448.0}.get(self.name, float(2**self.bits - 1))


@functools.cache
def format_of(name: str) -> Format:
    """The format with one of the names in :data:`poetx.config.WEIGHT_FORMATS`."""
    if name in ("nf4", "fp8"):
        return Format(name, {"nf4": 4, "fp8": 8}[name], "table")
    kind, _, bits = name.rpartition("int")
    assert kind in ("", "bipolar-"), name
    return Format(name, int(bits), "bipolar" if kind else "affine")


@dataclass(frozen=True)
class Quantized:
    """A stored weight [rows, columns].

    Attributes:
        codes: uint8 [rows, row_bytes(columns, bits)].
        scale: bfloat16 [rows, ⌈columns / group_size⌉]. offset: the same, affine formats only.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    columns: int
    format: Format
    group_size: int

    @classmethod
    def empty(cls, rows: int, columns: int, name: str, group_size: int, device: torch.device | str | None) -> Quantized:
        """Uninitialized storage for a weight [rows, columns]."""
        fmt = format_of(name)
        codes = torch.empty(rows, row_bytes(columns, fmt.bits), dtype=torch.uint8, device=device)
        scale = torch.empty(rows, block_count(columns, group_size), dtype=torch.bfloat16, device=device)
        offset = torch.empty_like(scale) if fmt.kind == "affine" else None
        return cls(codes, scale, offset, columns, fmt, group_size)


# -- codes in bytes ---------------------------------------------------------------------------------------------------


def _planes(bits: int) -> Iterator[tuple[int, int]]:
    """(width, shift) of every plane, widest first; widths are 8, 4, 2 or 1."""
    shift = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            yield width, shift
            shift += width


def row_bytes(columns: int, bits: int) -> int:
    """Bytes that a row of ``columns`` codes takes."""
    return sum(-(-columns * width // 8) for width, _ in _planes(bits))


def pack(codes_RC: Tensor, bits: int) -> Tensor:
    """uint8 codes below 2^bits [R, C] → bytes [R, row_bytes(C, bits)]."""
    if bits == 8:
        return codes_RC
    planes = []
    for width, shift in _planes(bits):
        per_byte = 8 // width
        run = -(-codes_RC.shape[1] // per_byte)
        part = (codes_RC >> shift) & ((1 << width) - 1)
        part = F.pad(part, (0, run * per_byte - part.shape[1])).unflatten(1, (per_byte, run))
        plane = part[:, 0]
        for slot in range(1, per_byte):
            plane = plane | (part[:, slot] << slot * width)
        planes.append(plane)
    return torch.cat(planes, dim=1)


def unpack(bytes_RB: Tensor, columns: int, bits: int) -> Tensor:
    """The inverse of :func:`pack`: uint8 [R, columns]."""
    if bits == 8:
        return bytes_RB
    codes, start = None, 0
    for width, shift in _planes(bits):
        per_byte = 8 // width
        run = -(-columns // per_byte)
        plane = bytes_RB[:, start : start + run]
        part = plane.new_empty(plane.shape[0], per_byte, run)
        for slot in range(per_byte):
            torch.bitwise_right_shift(plane, slot * width, out=part[:, slot])
        part.bitwise_and_((1 << width) - 1)
        part = part.flatten(1)[:, :columns]
        codes = part if codes is None else codes.bitwise_or_(part << shift)
        start += run
    assert codes is not None
    return codes


# -- levels -----------------------------------------------------------------------------------------------------------


@cached_tensors
def _sorted_levels(name: str) -> tuple[Tensor, Tensor]:
    """Levels of a table format in ascending order, float32, and the code of each, uint8; on the CPU."""
    with torch.device("cpu"):
        if name == "nf4":
            # Quantiles of N(0, 1) up to this probability, 8 above zero and 7 below it, scaled to end at ±1.
            end = 1 - (1 / 30 + 1 / 32) / 2
            half = [torch.special.ndtri(torch.linspace(0.5, end, k, dtype=torch.float64)) for k in (8, 9)]
            levels = torch.cat([-half[0].flip(0), half[1][1:]]) / half[1][-1]
            return levels.float(), torch.arange(16, dtype=torch.uint8)
        codes = torch.arange(256, dtype=torch.uint8)
        values = codes.view(torch.float8_e4m3fn).float()
        keep = values.isfinite() & (codes != 0x80)  # two codes are NaN, and one zero is enough
        order = values[keep].argsort()
        return values[keep][order], codes[keep][order]


@cached_tensors
def _levels_by_code(name: str, device: torch.device) -> Tensor:
    """float32 [2^bits]: what every code of a table format stands for, 0 for codes that are never written."""
    levels, codes = _sorted_levels(name)
    with torch.device("cpu"):
        table = torch.zeros(2 ** format_of(name).bits, dtype=torch.float32)
    table[codes.long()] = levels
    return table.to(device)


def _values(codes: Tensor, fmt: Format) -> Tensor:
    """float32 levels before scaling; the scales carry bipolar codes' affine map and fp8's factor of 256."""
    if fmt.name == "fp8":
        # e4m3's exponent and mantissa where float16 has them read 2⁻⁸ of the value, subnormals included; shifting the
        # sign-extended byte puts the sign at both of the top bits. Torch's own cast is not vectorised on a CPU.
        wide = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
        return wide.view(torch.float16).float()
    if fmt.name == "nf4":
        levels = _sorted_levels("nf4")[0].to(codes.device)
        return torch.index_select(levels, 0, codes.flatten().int()).view(codes.shape)
    return codes.float()


def _nearest_level(t: Tensor, levels: Tensor) -> Tensor:
    return torch.bucketize(t, (levels[1:] + levels[:-1]) / 2)


def _random_level(t: Tensor, levels: Tensor, noise: Tensor) -> Tensor:
    low = torch.bucketize(t, levels[1:-1], right=True)
    below = levels[low]
    return low + ((t - below) > noise * (levels[low + 1] - below))


# -- to and fro -------------------------------------------------------------------------------------------------------


def _slices(rows: int, columns: int, elements: int) -> Iterator[slice]:
    step = max(1, elements // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def _up(x: Tensor) -> Tensor:
    """The least bfloat16 that is not below x."""
    near = x.bfloat16()
    return torch.where(near.float() < x, torch.nextafter(near, torch.full_like(near, float("inf"))), near)


def _flushed(scale: Tensor) -> Tensor:
    return torch.where(scale < _LEAST, torch.zeros_like(scale), scale)


def _groups(w_RC: Tensor, group_size: int) -> Tensor:
    """[R, G, group_size]; a ragged last group is filled with its last weight."""
    missing = -w_RC.shape[1] % group_size
    if missing:
        w_RC = torch.cat([w_RC, w_RC[:, -1:].expand(-1, missing)], dim=1)
    return w_RC.unflatten(1, (-1, group_size))


@torch.no_grad()
def quantize_(quantized: Quantized, weight: Tensor, *, noise: torch.Generator | None = None) -> None:
    """Write ``weight`` [rows, columns] into ``quantized``, in place.

    Args:
        noise: round up or down at random in proportion to the distance, so that the mean of what is stored is
            ``weight``; without it, to the nearest level. A generator on the weight's device.
    """
    fmt = quantized.format
    tiny = torch.finfo(torch.float32).tiny  # 0 / tiny for a group of zeros
    for rows in _slices(weight.shape[0], weight.shape[1], _SLICE):
        w = _groups(weight[rows].float(), min(quantized.group_size, weight.shape[1]))
        if quantized.offset is not None:
            low, high = w.aminmax(dim=2)
            offset = -_up(-low)
            scale = _flushed(_up((high - offset.float()) / fmt.top))
            quantized.offset[rows] = offset
            t = (w - offset.float()[..., None]) / scale.float().clamp_min(tiny)[..., None]
        else:
            scale = _flushed(_up(w.abs().amax(dim=2) / fmt.top))
            t = w / scale.float().clamp_min(tiny)[..., None]
            if fmt.kind == "bipolar":
                t = (t + fmt.top) / 2
        quantized.scale[rows] = scale
        draw = None if noise is None else torch.rand(t.shape, device=t.device, generator=noise)
        if fmt.kind == "table":
            levels, codes_of = (table.to(t.device) for table in _sorted_levels(fmt.name))
            codes = codes_of[_nearest_level(t, levels) if draw is None else _random_level(t, levels, draw)]
        else:
            codes = (t.round() if draw is None else (t + draw).floor()).clamp(0, fmt.top).to(torch.uint8)
        quantized.codes[rows] = pack(codes.flatten(1)[:, : weight.shape[1]], fmt.bits)


def _missing(fmt: Format) -> str | None:
    """What the kernel does not read."""
    one_plane = len(list(_planes(fmt.bits))) == 1
    return None if one_plane else f"{fmt.name}; the kernel takes codes of 2, 4 and 8 bits"


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The stored weight [rows, columns] in ``dtype``; the arithmetic is float32's, rounded once."""
    fmt, columns, group_size = quantized.format, quantized.columns, quantized.group_size
    out = torch.empty(quantized.codes.shape[0], columns, dtype=dtype, device=quantized.codes.device)
    if use_triton(out, SMALLEST_BLOCK, missing=_missing(fmt)):
        from poetx.ops.triton import quantize as kernels

        levels = _levels_by_code(fmt.name, out.device) if fmt.kind == "table" else None
        settings = {"group_size": group_size, "bits": fmt.bits, "top": fmt.top, "kind": fmt.kind}
        return kernels.dequantize(quantized.codes, quantized.scale, quantized.offset, levels, out, **settings)
    full = columns // group_size
    for rows in _slices(out.shape[0], columns, _READ_SLICE.get(device_type(out), _READ_SLICE_ELSEWHERE)):
        values = _values(unpack(quantized.codes[rows], columns, fmt.bits), fmt)
        scale, offset = quantized.scale[rows].float(), quantized.offset
        if fmt.kind == "bipolar":
            scale, offset = 2 * scale, -fmt.top * scale
        elif fmt.name == "fp8":
            scale = 256 * scale
        elif offset is not None:
            offset = offset[rows].float()
        head = values[:, : full * group_size].unflatten(1, (full, group_size))
        tail = values[:, full * group_size :]
        for part, groups in ((head, slice(0, full)), (tail[:, None], slice(full, None))):
            if part.numel():
                part.mul_(scale[:, groups, None])
                if offset is not None:
                    part.add_(offset[:, groups, None])
        out[rows] = values
    return out
