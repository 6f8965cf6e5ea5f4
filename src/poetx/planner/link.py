"""How fast this machine brings weights to its device and multiplies there: what plans of streamed runs rest on."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from poetx.ops.host import in_host_memory
from poetx.planner.reach import Link

#: Bytes of a copy and rows of a square product: on a GPU, and on a CPU, where both take a second or so.
_SIZES = {"cuda": (1 << 28, 8192), "cpu": (1 << 26, 1024)}


def measure_link(device: torch.device, *, repeats: int = 5) -> Link:
    """Bytes a second from locked host memory, and operations a second of a large bfloat16 product (a CPU: float32).

    The median of ``repeats`` after one to warm up; on a CPU the copy is one from memory to memory. Takes seconds, and
    half a GB.
    """
    size, _ = _SIZES.get(device.type, _SIZES["cpu"])
    source = in_host_memory(torch.zeros(size, dtype=torch.uint8), device)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    copying = _median_seconds(lambda: target.copy_(source, non_blocking=True), device, repeats)
    return Link(bandwidth=size / copying, flops=measure_products(device, repeats=repeats))


def measure_products(device: torch.device, *, repeats: int = 5) -> float:
    """The second of :func:`measure_link` alone."""
    _, rows = _SIZES.get(device.type, _SIZES["cpu"])
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a, b = (torch.ones(rows, rows, device=device, dtype=dtype) for _ in range(2))
    return 2 * rows**3 / _median_seconds(lambda: torch.mm(a, b), device, repeats)


def _median_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    def wait() -> None:
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)

    times = []
    for _ in range(repeats + 1):
        wait()
        began = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[repeats // 2]
