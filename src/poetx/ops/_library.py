"""Registration of the project's operators with ``torch.library``: opaque to compilers, so one graph stays one.

An operator that a compiler cannot look into is also what keeps *mem* honest: a traced recompute would be
merged with the forward by common-subexpression elimination, and its result kept after all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("poetx", "DEF")


def register_op(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: define ``poetx::<schema>`` with the decorated function on every device.

    The implementation runs without autocast: it decides itself which product runs in which dtype. ``fake`` gives
    the outputs' shapes and dtypes. Returns the registered operator.
    """
    name = schema.split("(")[0]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def without_autocast(*args: Any) -> Any:
            device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
            if not torch.is_autocast_enabled(device):
                return function(*args)
            with torch.autocast(device, enabled=False):
                return function(*args)

        _LIBRARY.define(schema)
        _LIBRARY.impl(name, without_autocast, "CompositeExplicitAutograd")
        torch.library.register_fake(f"poetx::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.poetx, name).default

    return decorate
