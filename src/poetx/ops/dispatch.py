"""Which implementation of an operator runs: one decision, taken from the tensors it is given."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from poetx.errors import UserError
from poetx.ops.library import device_type

Implementation = Literal["auto", "triton", "torch"]
#: Smaller blocks do not fill one tile of a matrix unit.
SMALLEST_BLOCK = 16
_DTYPES = (torch.float32, torch.bfloat16)
_OPERATORS = ("cayley", "permute", "dequantize", "products", "single step", "fold")
_wanted: Implementation = "auto"


@contextlib.contextmanager
def use_kernels(implementation: Implementation) -> Iterator[None]:
    """Choose the implementation of this package's operators, for a comparison or to rule a kernel out.

    Args:
        implementation: ``"auto"`` (Triton on a GPU that has it, PyTorch elsewhere), ``"torch"``, or ``"triton"``, with
            which an operator raises :class:`poetx.UserError` where it would have fallen back. Applies to the whole
            process.
    """
    if implementation not in ("auto", "triton", "torch"):
        raise UserError(f"use_kernels({implementation!r}): must be 'auto', 'triton' or 'torch'")
    global _wanted
    before, _wanted = _wanted, implementation
    try:
        yield
    finally:
        _wanted = before


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def machine_obstacle(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on this device; None where they can."""
    if not _has_triton():
        return "triton is not installed"
    if device.type == "cuda" and torch.version.cuda is not None:
        major, minor = _capability(device)
        return None if major >= 8 else f"compute capability {major}.{minor}; the kernels need 8.0"
    if device.type == "cpu":
        from poetx.ops.triton import permute, tuning

        if tuning.interpreted(permute.permute_kernel):
            return None
    return f"device {device.type}; the kernels need CUDA (or TRITON_INTERPRET=1, to try them out)"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _obstacle(tensor: Tensor, block_size: int, dtypes: tuple[torch.dtype, ...], planned: bool) -> str | None:
    if isinstance(tensor, FakeTensor) and not planned:
        return "the tensors are fake"
    if tensor.dtype not in dtypes:
        found, *taken = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *dtypes))
        return f"{found}; the kernel takes {' and '.join(taken)}"
    if block_size < SMALLEST_BLOCK:
        return f"blocks of {block_size}; the kernels take {SMALLEST_BLOCK} and more"
    return None if planned and _has_triton() else machine_obstacle(tensor.device)


def use_triton(
    tensor: Tensor,
    block_size: int = SMALLEST_BLOCK,
    *,
    dtypes: tuple[torch.dtype, ...] = _DTYPES,
    missing: str | None = None,
    on_fakes: bool = False,
) -> bool:
    """Whether the Triton kernels take a tensor like this one: a call asks once.

    Args:
        dtypes: what the kernel in question takes.
        missing: what the kernels do not compute, if it is that.
        on_fakes: what is around the kernel allocates the same for fake tensors, on which a launch does nothing: they
            count as those of the device that memory is planned for.

    Raises:
        UserError: they were asked for by :func:`use_kernels` and cannot.
    """
    planned = on_fakes and device_type(tensor) == "cuda" and isinstance(tensor, FakeTensor)
    if _wanted == "torch" or (_wanted == "auto" and tensor.device.type != "cuda" and not planned):
        return False
    reason = missing or _obstacle(tensor, block_size, dtypes, planned)
    if reason is not None and _wanted == "triton":
        raise UserError(f"use_kernels('triton'): {reason}; use 'auto' or 'torch'")
    return reason is None


def kernel_report() -> list[tuple[str, str]]:
    """(operator, which implementation runs on this machine and why), for ``poetx env``."""
    reason = machine_obstacle(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    if reason is not None:
        return [(name, f"PyTorch ({reason})") for name in _OPERATORS]
    import triton

    fits = f"Triton {triton.__version__}; PyTorch for float64 and for blocks below {SMALLEST_BLOCK}"
    return [
        ("cayley", f"{fits}, for the exact transform"),
        ("permute", f"Triton {triton.__version__}; PyTorch for float64 and for rows of more than 64 KiB"),
        ("dequantize", f"Triton {triton.__version__}; PyTorch for float64 and for codes of 3, 5, 6 and 7 bits"),
        ("products", "cuBLAS on strided views of the blocks"),
        ("single step", fits),
        ("fold", "PyTorch (float32 products whatever the settings; once per merge)"),
    ]
