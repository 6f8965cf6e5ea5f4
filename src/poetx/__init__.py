"""Pre-train and fully fine-tune language models in the memory people actually have, by POET-X."""

from poetx.config import PoetConfig
from poetx.convert import ConversionReport, convert_, poet_layers, to_dense_
from poetx.errors import UserError
from poetx.layer import PoetLinear
from poetx.merge import MergeHandle, MergeReport, merge_, merge_every
from poetx.optim import param_groups
from poetx.spectrum import LayerSpectrum, spectrum

__version__ = "0.1.0"

__all__ = [
    "ConversionReport",
    "LayerSpectrum",
    "MergeHandle",
    "MergeReport",
    "PoetConfig",
    "PoetLinear",
    "UserError",
    "convert_",
    "merge_",
    "merge_every",
    "param_groups",
    "poet_layers",
    "spectrum",
    "to_dense_",
]
