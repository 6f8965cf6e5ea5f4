"""Pre-train and fully fine-tune language models in the memory people actually have, by POET-X."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poetx.errors import UserError
from poetx.lazy import lazy_names

if TYPE_CHECKING:
    from poetx.config import PoetConfig
    from poetx.conversion_report import ConversionReport
    from poetx.convert import convert_, to_dense_
    from poetx.layers.poet import PoetLinear
    from poetx.layers.shared_blocks import shared_blocks
    from poetx.layers.single_step import SingleStepLinear
    from poetx.layers.walk import poet_layers
    from poetx.materialize import materialize_
    from poetx.memory.measure import measure_memory
    from poetx.merge import MergeHandle, MergeReport, merge_, merge_every
    from poetx.optim.groups import param_groups
    from poetx.optim.single_step.optimizer import POETX
    from poetx.plain_model import save_pretrained
    from poetx.planner.estimate import estimate_memory
    from poetx.spectra import LayerSpectrum, spectrum
    from poetx.training_check import check_training

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
    "check_training",
    "convert_",
    "estimate_memory",
    "materialize_",
    "measure_memory",
    "merge_",
    "merge_every",
    "param_groups",
    "poet_layers",
    "save_pretrained",
    "shared_blocks",
    "spectrum",
    "to_dense_",
]

# Looked up when first used: `poetx --help` must not wait two seconds for torch.
__getattr__ = lazy_names(
    __name__,
    {
        "poetx.config": ("PoetConfig",),
        "poetx.conversion_report": ("ConversionReport",),
        "poetx.convert": ("convert_", "to_dense_"),
        "poetx.layers.poet": ("PoetLinear",),
        "poetx.layers.shared_blocks": ("shared_blocks",),
        "poetx.layers.single_step": ("SingleStepLinear",),
        "poetx.layers.walk": ("poet_layers",),
        "poetx.materialize": ("materialize_",),
        "poetx.memory.measure": ("measure_memory",),
        "poetx.merge": ("MergeHandle", "MergeReport", "merge_", "merge_every"),
        "poetx.optim.groups": ("param_groups",),
        "poetx.optim.single_step.optimizer": ("POETX",),
        "poetx.plain_model": ("save_pretrained",),
        "poetx.planner.estimate": ("estimate_memory",),
        "poetx.spectra": ("LayerSpectrum", "spectrum"),
        "poetx.training_check": ("check_training",),
    },
    modules=("distributed", "integrations", "optim", "savings"),
)


def __dir__() -> list[str]:
    return sorted(__all__)
