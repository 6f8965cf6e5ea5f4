"""Pre-train and fully fine-tune language models in the memory people actually have, by POET-X."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from poetx.errors import UserError

if TYPE_CHECKING:
    from poetx.config import PoetConfig
    from poetx.convert import ConversionReport, convert_, poet_layers, to_dense_
    from poetx.layer import PoetLinear
    from poetx.materialize import materialize_
    from poetx.memory import estimate_memory, measure_memory
    from poetx.merge import MergeHandle, MergeReport, merge_, merge_every
    from poetx.optim import param_groups
    from poetx.reuse import shared_blocks
    from poetx.single_layer import SingleStepLinear
    from poetx.single_step import POETX
    from poetx.spectra import LayerSpectrum, spectrum

__version__ = "0.1.0"

__all__ = [
    "POETX",
    "ConversionReport",
    "LayerSpectrum",
    "MergeHandle",
    "MergeReport",
    "PoetConfig",
    "PoetLinear",
    "SingleStepLinear",
    "UserError",
    "convert_",
    "estimate_memory",
    "materialize_",
    "measure_memory",
    "merge_",
    "merge_every",
    "param_groups",
    "poet_layers",
    "shared_blocks",
    "spectrum",
    "to_dense_",
]

# Names are looked up when first used: `poetx --help` must not wait two seconds for torch.
_HOMES = {
    "config": ("PoetConfig",),
    "convert": ("ConversionReport", "convert_", "poet_layers", "to_dense_"),
    "layer": ("PoetLinear",),
    "materialize": ("materialize_",),
    "memory": ("estimate_memory", "measure_memory"),
    "merge": ("MergeHandle", "MergeReport", "merge_", "merge_every"),
    "optim": ("param_groups",),
    "reuse": ("shared_blocks",),
    "single_layer": ("SingleStepLinear",),
    "single_step": ("POETX",),
    "spectra": ("LayerSpectrum", "spectrum"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
