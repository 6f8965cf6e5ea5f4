"""Inputs that need not be kept: an elementwise product whose factors autograd keeps for the product's own backward.

Every decoder layer of the Llama family ends its norms with ``weight * normalized`` and its gate with
``activation(gate) * up``, and the rotated layers read those products. Autograd keeps both factors of each, because
each is the other's derivative, so a layer that would keep the product keeps it twice over. The layer can
multiply the factors again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # type: ignore[attr-defined]


def saved_tensor_hooks() -> Any:
    """What packs and unpacks the tensors that autograd saves now; None where nobody does."""
    return None if _hooks is None else _hooks(True)


def kept_factors(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """(a, b), detached, with ``x == a * b`` to the bit, if autograd keeps both anyway; else None.

    None, too, where somebody packs what is saved (activation checkpointing, offloading: to ask for a factor would
    unpack it now), under a compiler (which decides itself what is kept), and where x was changed in place since.
    """
    if torch.compiler.is_compiling() or x._version or type(x.grad_fn).__name__ != "MulBackward0":
        return None
    if _hooks is None or saved_tensor_hooks() is not None:
        return None
    node: Any = x.grad_fn
    try:
        a, b = node._saved_self, node._saved_other
    except RuntimeError:  # that graph was used and freed, or a factor changed in place
        return None
    if a is None or b is None or torch.result_type(a, b) != x.dtype:
        return None
    return a.detach(), b.detach()


def rebuild(kept: Sequence[Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The input from what was kept of it: itself, or its two factors, cast as it was."""
    return kept[0] if len(kept) == 1 else torch.mul(*kept).to(dtype).reshape(shape)
