"""What a training step is made of: the settings whose memory :func:`poetx.memory.estimate_memory` predicts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from poetx.config import WEIGHT_FORMATS
from poetx.errors import UserError, nearest

POET_METHODS = ("mem", "fast")
SINGLE_STEP = {"single-step": "fast", "single-step-mem": "mem"}  # method: mode of its layers
METHODS = (*POET_METHODS, *SINGLE_STEP, "adamw", "adamw-mixed", "adamw-8bit", "muon", "adafactor", "lora")
#: Llama shapes by name: hidden, MLP, layers, heads, key-value heads, vocabulary; embeddings untied. All but the
#: last are the papers'; "llama-1b-12" has half of llama-1b's layers.
SHAPES = {
    "llama-60m": (512, 1280, 8, 8, 8, 32000),
    "llama-130m": (768, 2048, 12, 12, 12, 32000),
    "llama-350m": (1024, 2736, 24, 16, 16, 32000),
    "llama-1b": (2048, 5632, 24, 32, 32, 32000),
    "llama-1b-12": (2048, 5632, 12, 32, 32, 32000),
    "llama-3b": (2560, 7168, 32, 32, 32, 32000),
    "llama-8b": (4096, 14336, 32, 32, 32, 32000),
    "llama-13b": (5120, 13824, 40, 40, 40, 32000),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256),
}

_CHOICES: dict[str, tuple[Any, ...]] = {
    "method": METHODS,
    "dtype": ("bfloat16", "float32"),
    "rotation_dtype": ("float32", "bfloat16"),
    "spectrum": ("fixed", "free"),
    "optimizer_state": ("same", "bfloat16", "int8"),
    "base_optimizer": ("adamw", "adafactor", "smmf", "hfac"),
    "recompute": ("auto", "fast", "mem"),
    "device": ("cuda", "cpu"),
    "weight_format": (None, *WEIGHT_FORMATS),
}
_COUNTS = ("batch_size", "seq_len", "block_size", "partitions", "lora_rank", "group_size")


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """One training step: who trains, on how many tokens, with which savings.

    Attributes:
        method: POET-X ``"mem"`` or ``"fast"``; its ``"single-step"`` form, or ``"single-step-mem"`` with layers in mode
            *mem*; ``"adamw"`` on everything in ``dtype``; ``"adamw-mixed"``: float32
            weights and state under bfloat16 autocast; ``"adamw-8bit"``; ``"muon"`` (AdamW for embeddings, head and
            vectors); ``"adafactor"``; ``"lora"`` (needs peft).
        batch_size, seq_len: sequences in one backward pass and tokens in each.
        block_size: of POET-X. partitions, spectrum: of its single-step form.
        dtype: of the weights and of the arithmetic.
        rotation_dtype: of the packed rotations; the papers' tables have bfloat16, the library's default is float32.
        optimizer_state: of AdamW: the parameter's dtype, bfloat16 with stochastic rounding, or 8 bits.
        base_optimizer: what POET-X trains embeddings, head and norms with.
        activation_checkpointing: keep each decoder layer's input only.
        recompute: mode of POET-X's layers inside a checkpointed decoder layer: ``"fast"`` keeps x · P · W0ᵀ of each
            while that decoder layer's backward runs; ``"mem"`` does not, for one more product; ``"auto"`` is *fast*
            up to in_features tokens (:func:`poetx.savings.checkpoint_layers_`).
        chunked_loss: never the full logits.
        release_gradients: embeddings and head are updated, and their gradients freed, during backward.
        lora_rank: of ``"lora"``, on every linear layer of attention and MLP.
        device: whose allocator and kernels: sizes in steps of 512 bytes, flash attention and multi-tensor
            optimizers on ``"cuda"``; the exact bytes of tensors on ``"cpu"``.
        neumann_order: of POET-X.
        weight_format, group_size: of a quantized base (POET-XQ), for ``"mem"`` only; see :class:`poetx.PoetConfig`.
        weight_extra_bits: of ``"mem"`` and ``"fast"``: more bits of the frozen weight, for merging; see there, too.

    Raises:
        UserError: a value outside its range, or settings that exclude each other.
    """

    method: str = "mem"
    batch_size: int = 1
    seq_len: int = 1024
    block_size: int = 256
    partitions: int = 2
    spectrum: str = "fixed"
    dtype: str = "bfloat16"
    rotation_dtype: str = "float32"
    optimizer_state: str = "same"
    base_optimizer: str = "adamw"
    activation_checkpointing: bool = False
    recompute: str = "auto"
    chunked_loss: bool = False
    release_gradients: bool = False
    lora_rank: int = 160
    device: str = "cuda"
    neumann_order: int = 3
    weight_format: str | None = None
    group_size: int = 128
    weight_extra_bits: bool = False

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise UserError(
                    f"{field}={value!r}: must be one of {', '.join(map(str, choices))}"
                    + nearest(str(value), [str(choice) for choice in choices])
                )
        for field in _COUNTS:
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{field}={value!r}: must be a whole number of at least 1")
        if self.base_optimizer != "adamw" and not self.is_poet:
            raise UserError(
                f"base_optimizer={self.base_optimizer}: is for POET-X, what its rotations leave; use method='mem' "
                f"or 'fast', not {self.method!r}"
            )
        if self.optimizer_state != "same" and not self.uses_own_adamw:
            raise UserError(
                f"optimizer_state={self.optimizer_state}: is for AdamW; use method='adamw', 'mem' or 'fast', not "
                f"{self.method!r}"
            )
        if self.weight_format is not None and self.method != "mem":
            raise UserError(f"weight_format={self.weight_format}: is for method='mem', not {self.method!r}")
        if self.weight_extra_bits and self.method not in POET_METHODS:
            raise UserError(f"weight_extra_bits: is for method='mem' or 'fast', not {self.method!r}")
        if self.method == "adamw-mixed" and self.dtype != "bfloat16":
            raise UserError("dtype=float32: method='adamw-mixed' computes in bfloat16; leave dtype alone")

    @property
    def is_poet(self) -> bool:
        return self.method in (*POET_METHODS, *SINGLE_STEP)

    @property
    def label(self) -> str:
        """The name in tables: the weight's format where there is one, else the method."""
        return self.weight_format or self.method

    @property
    def uses_own_adamw(self) -> bool:
        """Whether AdamW's state may be in another dtype than its parameter."""
        return self.is_poet or self.method in ("adamw", "adamw-8bit")

    def replace(self, **changes: Any) -> TrainingSetup:
        """A copy with these settings changed."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise UserError(f"unknown setting {name!r}{nearest(name, known)}")
        return dataclasses.replace(self, **changes)


def paper(**changes: Any) -> TrainingSetup:
    """The setting of the papers' tables: everything in bfloat16, packed rotations and their state too."""
    return TrainingSetup(rotation_dtype="bfloat16").replace(**changes)


def full_stack(**changes: Any) -> TrainingSetup:
    """Every saving at once: checkpointing, chunked loss, 8-bit state, released gradients."""
    saving: dict[str, Any] = {
        "rotation_dtype": "bfloat16",
        "activation_checkpointing": True,
        "chunked_loss": True,
        "optimizer_state": "int8",
        "release_gradients": True,
    }
    return TrainingSetup(**(saving | changes))
