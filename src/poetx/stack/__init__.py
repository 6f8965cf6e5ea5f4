"""Former home of what :mod:`poetx.optim` and :mod:`poetx.savings` hold now; every name warns where it has moved."""

from poetx.lazy import moved_names

__getattr__ = moved_names(
    __name__,
    {
        "poetx.optim.adamw": ("AdamW",),
        "poetx.optim": ("OPTIMIZERS", "build_optimizer"),
        "poetx.optim.combined": ("CombinedOptimizer",),
        "poetx.optim.hfac": ("HFac",),
        "poetx.optim.gradient_release": ("ReleaseHandle", "release_gradients"),
        "poetx.optim.smmf": ("SMMF",),
        "poetx.savings.activation_checkpointing": ("checkpoint_layers_",),
        "poetx.savings.chunked_loss": ("check_head", "chunk_loss_", "chunked_cross_entropy"),
    },
)
