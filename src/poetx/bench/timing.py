"""What every benchmark shares: interleaved timing, and a JSON-lines row that says where it came from."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from poetx.errors import UserError
from poetx.files import unwritten
from poetx.train.environment import commit, device_name

#: Relative error that a candidate may have, by dtype. float32 leaves room for TF32, which is then said in the row.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2}


def provenance(device: torch.device) -> dict[str, Any]:
    """Commit, device, versions and date: the part of a row that makes the rest of it evidence."""
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit() or "unknown",
        "device": device_name(device) + threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "float32_products": torch.get_float32_matmul_precision(),
    }


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add one JSON line a row to ``path``, which is made with its directory where it is not there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise unwritten(path, error) from None


#: What a GPU spins before a call whose launches are to be queued by then: 5 ms at 2 GHz, more than a host needs.
_HEAD_START_CYCLES = 10_000_000


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    device: torch.device,
    warmup: int = 2,
    queued: bool = False,
) -> dict[str, list[float]]:
    """Milliseconds of every call, the candidates taking turns (A B C A B C …) so that noise hits all alike.

    On a GPU between two events of the stream, after whatever came before has finished: what the host needs to launch
    a call counts where the GPU would be faster. With ``queued`` it does not: the launches wait in the queue by then.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + warmup):
        for name, call in candidates.items():
            elapsed = milliseconds(call, device, queued=queued)
            if turn >= warmup:
                times[name].append(elapsed)
    return times


def milliseconds(call: Callable[[], object], device: torch.device, *, queued: bool = False) -> float:
    """Of one call: between CUDA events on a GPU (of a queue that is full, with ``queued``), by the clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if queued:
        torch.cuda._sleep(_HEAD_START_CYCLES)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most memory that ``call`` had allocated above what was there before it; None but on a GPU."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 4)


def gate(what: str, got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Stop before anything is timed.

    Raises:
        UserError: a relative error beyond :data:`TOLERANCE` for ``dtype``.
    """
    wanted = want.detach()
    error = float((got.detach().to(want.dtype) - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if not error < TOLERANCE[dtype]:
        raise UserError(
            f"{what} is wrong: relative error {error:.1e}, {TOLERANCE[dtype]:.0e} allowed for "
            f"{str(dtype).removeprefix('torch.')}; nothing was timed"
        )
