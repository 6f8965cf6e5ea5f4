"""``model.zero_grad()`` where gradients are in momenta, too, which only the optimizer reaches."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import MethodType

from torch import nn

#: By model, what its optimizer does about the gradients in its momenta.
_DROPS: weakref.WeakKeyDictionary[nn.Module, weakref.WeakMethod[Callable[[], None]]] = weakref.WeakKeyDictionary()


def zero_grad(model: nn.Module, set_to_none: bool = True) -> None:
    """As in torch, after what the model's optimizer does. A copied model has no optimizer, and this is its class's."""
    drop = _DROPS[model]() if model in _DROPS else None
    if drop is not None:
        drop()
    type(model).zero_grad(model, set_to_none)


def put_on(model: nn.Module, drop: Callable[[], None]) -> None:
    """Call ``drop``, a method, which is not kept alive, at every ``model.zero_grad()``."""
    _DROPS[model] = weakref.WeakMethod(drop)
    vars(model)["zero_grad"] = MethodType(zero_grad, model)


def take_off(model: nn.Module, drop: Callable[[], None]) -> None:
    """Undo :func:`put_on`, unless another ``drop`` has been put there since."""
    if model in _DROPS and _DROPS[model]() == drop:
        del _DROPS[model]
        vars(model).pop("zero_grad", None)
