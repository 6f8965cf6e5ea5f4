"""What the run ran on: versions, devices, memory."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from poetx.memory.resident import resident_peak

_PACKAGES = ("poetx", "torch", "numpy", "safetensors", "transformers", "tokenizers", "triton")


def versions() -> dict[str, str]:
    """Installed versions of what matters to a run; torch's names its build, too."""
    found = {"python": platform.python_version()}
    found |= {package: _version(package) for package in _PACKAGES}
    found["torch"] = torch.__version__  # the package's metadata may leave out +cpu or +cu130
    return found


@functools.cache
def _version(package: str) -> str:
    """A package's version, which is looked up in every folder of the path once."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def commit() -> str | None:
    """The commit of the checkout that this code runs from, ``-dirty`` if it was changed; None for installed code."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        for asked in (["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--dirty", "--exclude=*"]):
            told = subprocess.run([*git, *asked], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return told.strip()


def describe(device: torch.device) -> dict[str, Any]:
    """The contents of ``environment.json``."""
    return {
        "versions": versions(),
        "commit": commit(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": device_name(device),
        "cpu_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "cuda_devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far in GiB: allocated by torch on a GPU, else the process's (0 where no system tells)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resident_peak() / 2**30
