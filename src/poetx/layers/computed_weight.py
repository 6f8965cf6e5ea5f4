"""A weight that is computed for whoever reads it, and says so where somebody writes to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from poetx.errors import UserError

_WRITES = {"__setitem__", "__set__"} | {
    f"__i{op}__" for op in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}


class ComputedWeight(Tensor):
    """A tensor that cannot be written in place, nor can its views: nobody would ever see what was written.

    Every other operation gives ordinary tensors, ``clone()`` above all.

    Raises:
        UserError: from an in-place operation, such as those of ``torch.nn.init``.
    """

    @classmethod
    def of(cls, values: Tensor) -> Tensor:
        """``values`` without a copy; an ordinary tensor under a compiler, which would have to look in here, and on the
        meta device, where models write to weights to initialize themselves and nothing can be lost."""
        return values if torch.compiler.is_compiling() or values.is_meta else values.as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        first = [*args, *kwargs.values()][0]
        writes = name in _WRITES or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
        written = [*(first if isinstance(first, (list, tuple)) else [first])] if writes else [kwargs.get("out")]
        if any(isinstance(target, cls) for target in written):
            raise UserError(
                f"{name} on layer.weight: it is computed from a frozen weight and its rotations, so writing to it is "
                "lost; set it with layer.load_dense_(weight), or write to layer.weight.clone()"
            )
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            if not isinstance(first, cls):
                return out
            memory = first.untyped_storage().data_ptr()

            def view(part: Tensor) -> Tensor:
                return part.as_subclass(cls) if part.untyped_storage().data_ptr() == memory else part

            return tree_map_only(Tensor, view, out)
