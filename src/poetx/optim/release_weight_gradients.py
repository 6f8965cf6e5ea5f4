"""Gradients of an ordinary model, dropped as soon as an optimizer has taken them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from poetx.errors import UserError


class _Release:
    """Holds the optimizer weakly: once that is gone, gradients stay where they are."""

    def __init__(self, absorb: Callable[[Tensor], Any]) -> None:
        self.absorb = weakref.WeakMethod(absorb)

    def __call__(self, p: Tensor) -> None:
        absorb = self.absorb()
        if absorb is not None:
            absorb(p)
            p.grad = None


def release(p: Tensor, absorb: Callable[[Tensor], Any]) -> RemovableHandle:
    """Hand the gradient of p to ``absorb``, a method, after every backward pass, and drop it.

    Raises:
        UserError: it goes to another optimizer already, which would leave none to this one.
    """
    hooks = (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()
    if any(isinstance(hook, _Release) and hook.absorb() is not None for hook in hooks):
        raise UserError("POETX: another one releases these gradients already; call its close() first")
    return p.register_post_accumulate_grad_hook(_Release(absorb))
