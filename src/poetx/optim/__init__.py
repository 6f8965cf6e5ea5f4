"""How weights change: parameter groups, optimizers (``single_step/``: POETX), gradients that are dropped early."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poetx.lazy import lazy_names

if TYPE_CHECKING:
    from poetx.optim.adamw import AdamW
    from poetx.optim.build import build_optimizer
    from poetx.optim.combined import CombinedOptimizer
    from poetx.optim.gradient_release import ReleaseHandle, release_gradients
    from poetx.optim.groups import param_groups
    from poetx.optim.hfac import HFac
    from poetx.optim.settings import OPTIMIZERS
    from poetx.optim.single_step.optimizer import POETX
    from poetx.optim.smmf import SMMF

__all__ = [
    "OPTIMIZERS",
    "POETX",
    "SMMF",
    "AdamW",
    "CombinedOptimizer",
    "HFac",
    "ReleaseHandle",
    "build_optimizer",
    "param_groups",
    "release_gradients",
]

__getattr__ = lazy_names(
    __name__,
    {
        "poetx.optim.adamw": ("AdamW",),
        "poetx.optim.build": ("build_optimizer",),
        "poetx.optim.combined": ("CombinedOptimizer",),
        "poetx.optim.groups": ("param_groups",),
        "poetx.optim.hfac": ("HFac",),
        "poetx.optim.gradient_release": ("ReleaseHandle", "release_gradients"),
        "poetx.optim.settings": ("OPTIMIZERS",),
        "poetx.optim.single_step.optimizer": ("POETX",),
        "poetx.optim.smmf": ("SMMF",),
    },
)
