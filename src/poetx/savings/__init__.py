"""Why memory drops: decoder layers that keep only their input, a loss without logits, host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poetx.lazy import lazy_names

if TYPE_CHECKING:
    from poetx.savings.activation_checkpointing import checkpoint_layers_
    from poetx.savings.chunked_loss import check_head, chunk_loss_, chunked_cross_entropy
    from poetx.savings.offload import offload_frozen_
    from poetx.savings.offload_activations import offload_activations_

__all__ = [
    "check_head",
    "checkpoint_layers_",
    "chunk_loss_",
    "chunked_cross_entropy",
    "offload_activations_",
    "offload_frozen_",
]

__getattr__ = lazy_names(
    __name__,
    {
        "poetx.savings.activation_checkpointing": ("checkpoint_layers_",),
        "poetx.savings.chunked_loss": ("check_head", "chunk_loss_", "chunked_cross_entropy"),
        "poetx.savings.offload": ("offload_frozen_",),
        "poetx.savings.offload_activations": ("offload_activations_",),
    },
)
