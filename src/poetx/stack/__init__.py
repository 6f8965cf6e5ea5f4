"""The memory stack: each piece usable by itself, with any model and any torch optimizer."""

from poetx.stack.adamw import AdamW
from poetx.stack.checkpointing import checkpoint_layers_
from poetx.stack.combine import OPTIMIZERS, CombinedOptimizer, build_optimizer
from poetx.stack.hfac import HFac
from poetx.stack.loss import check_head, chunk_loss_, chunked_cross_entropy
from poetx.stack.release import ReleaseHandle, release_gradients
from poetx.stack.smmf import SMMF

__all__ = [
    "OPTIMIZERS",
    "SMMF",
    "AdamW",
    "CombinedOptimizer",
    "HFac",
    "ReleaseHandle",
    "build_optimizer",
    "check_head",
    "checkpoint_layers_",
    "chunk_loss_",
    "chunked_cross_entropy",
    "release_gradients",
]
