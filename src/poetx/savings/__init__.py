"""Why memory drops: decoder layers that keep only their input, and a loss without logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from poetx.lazy import lazy_names

if TYPE_CHECKING:
    from poetx.savings.activation_checkpointing import checkpoint_layers_
    from poetx.savings.chunked_loss import check_head, chunk_loss_, chunked_cross_entropy

__all__ = ["check_head", "checkpoint_layers_", "chunk_loss_", "chunked_cross_entropy"]

__getattr__ = lazy_names(
    __name__,
    {
        "poetx.savings.activation_checkpointing": ("checkpoint_layers_",),
        "poetx.savings.chunked_loss": ("check_head", "chunk_loss_", "chunked_cross_entropy"),
    },
)
