"""Triton's interpreter for this package's kernels, in a process where triton may be imported already."""

from __future__ import annotations

import contextlib
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Every kernel, and every function that one calls, replaced by its interpreted twin; triton forced."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from poetx.ops.dispatch import use_kernels
    from poetx.ops.triton import adamw, cayley, permute, quantize, rounding, single_step

    with contextlib.suppress(ImportError):  # takes functions of the language when it is first imported
        importlib.import_module("triton.experimental.gluon")
    language = [importlib.import_module(f"triton.language{part}") for part in ("", ".random", ".standard")]
    with pytest.MonkeyPatch.context() as patch, use_kernels("triton"):
        for module in (adamw, cayley, quantize, permute, rounding, single_step, *language):
            for name, value in vars(module).copy().items():
                if isinstance(value, JITFunction):
                    patch.setattr(module, name, InterpretedFunction(value.fn))
        with _language_kept():
            yield


@contextlib.contextmanager
def _language_kept() -> Iterator[None]:
    """A function of the language that a kernel calls leaves the language as the interpreter patched it: undo that."""
    import triton.language as tl

    kept = [(place, dict(vars(place))) for place in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)]
    try:
        yield
    finally:
        for place, values in kept:
            for name, value in values.items():
                if vars(place)[name] is not value:
                    setattr(place, name, value)


@contextlib.contextmanager
def nan_filled() -> Iterator[None]:
    """``torch.empty`` and ``empty_like`` give NaN, so that what a kernel forgets to write is seen."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like"):
            make = getattr(torch, name)

            def poisoned(*args, make=make, **kwargs):
                out = make(*args, **kwargs)
                return out.fill_(float("nan") if out.is_floating_point() else -(1 << 30))

            patch.setattr(torch, name, poisoned)
        yield


class _Compiler:
    """Stands for a kernel: a launch compiles it as that launch would, and runs nothing."""

    def __init__(self, kernel, compiled: list) -> None:
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.compiled.append(self.kernel.warmup(*args, grid=grid, **kwargs))

        return launch


#: Ampere, Ada and Hopper.
on_each_generation = pytest.mark.parametrize("capability", [80, 89, 90])


@contextlib.contextmanager
def compiled_for(capability: int) -> Iterator[list]:
    """Launches compile for an NVIDIA GPU of this compute capability (90 is Hopper), without one; yields the results.

    In the end none may spill registers, or take more shared memory than GPUs of compute capability 8.6 and 8.9 have.
    """
    pytest.importorskip("triton", "3.6", reason="an older interpreter leaves the compiler patched when it has run")
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from poetx.ops.triton import adamw, cayley, permute, quantize, single_step, tuning

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return capability  # by which a kernel knows what it has compiled

        def get_current_stream(self, device):
            return 0

    compiled: list = []
    before = driver._active
    driver.set_active(Driver())  # type: ignore[arg-type]
    try:
        with pytest.MonkeyPatch.context() as patch:
            for module in (tuning, single_step):  # which has a name of its own for it
                patch.setattr(module, "interpreted", lambda kernel: False)
            for module in (adamw, cayley, quantize, permute, single_step):
                for name, value in vars(module).copy().items():
                    if isinstance(value, JITFunction) and name.endswith("_kernel"):
                        patch.setattr(module, name, _Compiler(value, compiled))
            yield compiled
    finally:
        driver._active = before
    for kernel in compiled:
        assert kernel.metadata.shared <= 99 << 10, kernel.metadata.name
        assert _stack_bytes(kernel) == 0, f"{kernel.metadata.name} spills registers on sm_{capability}"


def _stack_bytes(kernel) -> int:
    """Bytes a thread keeps in memory: registers that spilled, since no kernel has arrays of its own."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", report)
    assert found, report
    return int(found[1])
