"""What the host side of every kernel shares: how float32 is multiplied, and which of a few candidates is fastest."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

T = TypeVar("T")
_REPEATS = 10
_fastest: dict[Hashable, int] = {}


def interpreted(kernel: Any) -> bool:
    """Whether this kernel runs in Triton's interpreter, which ``TRITON_INTERPRET=1`` decides when it is imported."""
    return not isinstance(kernel, JITFunction)


def float32_precision(narrow: bool) -> str:
    """How the kernels multiply float32 on a GPU, in Triton's words.

    ``"tf32"`` (10 bits of mantissa) where the result is rounded to bfloat16 anyway (``narrow``) or where
    ``torch.set_float32_matmul_precision("high")`` allows it; else ``"tf32x3"``, three TF32 products that keep about
    21 bits. Sums are float32 in either case.
    """
    return "tf32" if narrow or torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *args: Any, **settings: Any) -> None:
    """``kernel[grid](first, …)`` on the device of ``first``; nothing for a fake one.

    Untyped, as no checker sees through the decorator.
    """
    if isinstance(first, FakeTensor):
        return
    if not first.is_cuda or first.get_device() == torch.cuda.current_device():
        kernel[grid](first, *args, **settings)
        return
    with torch.cuda.device_of(first):
        kernel[grid](first, *args, **settings)


def address(tensor: Tensor) -> int:
    """Of its first element; 0 of a fake one."""
    return 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()


def on_device(rows: list[list[int]], device: torch.device) -> Tensor:
    """A table of int64, which the host does not wait for."""
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)


def tile_size(block_size: int, largest: int) -> int:
    """The power of two from 16 to ``largest`` that covers a block or divides it into tiles."""
    return min(largest, max(16, power_of_2(block_size)))


def fastest(key: Hashable, device: torch.device, candidates: Sequence[Callable[[], T]]) -> T:
    """Run the fastest of the candidates, which must give bitwise the same result; the first call for a key times them.

    Candidates that need more shared memory than the GPU has drop out. On the CPU and while a CUDA graph is being
    captured nothing can be timed: the first one runs.
    """
    choice = _fastest.get(key)
    if choice is None:
        if device.type != "cuda" or len(candidates) == 1 or torch.cuda.is_current_stream_capturing():
            return candidates[0]()
        times = [_milliseconds(candidate, device) for candidate in candidates]
        choice = _fastest[key] = min(range(len(times)), key=times.__getitem__)
    return candidates[choice]()


def _milliseconds(candidate: Callable[[], Any], device: torch.device) -> float:
    try:
        for _ in range(3):  # the first compiles
            candidate()
    except OutOfResources:
        return float("inf")
    times = []
    with torch.cuda.device(device):
        for _ in range(_REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            candidate()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return statistics.median(times)
