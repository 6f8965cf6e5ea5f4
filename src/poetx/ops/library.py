"""Registration of the project's operators with ``torch.library``: opaque to compilers, so one graph stays one.

An operator that a compiler cannot look into is also what keeps *mem* honest: a traced recompute would be merged with
the forward by common-subexpression elimination, and its result kept after all.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from poetx.errors import UserError

_LIBRARY = torch.library.Library("poetx", "DEF")


@dataclass
class _Transparency:
    """What is true while operators are transparent: the device that is spoken of, and tensors made once for it."""

    device: str | None
    cache: dict[Any, Any] = field(default_factory=dict)


_transparent: _Transparency | None = None


@contextlib.contextmanager
def transparent_operators(*, device_type: str | None = None) -> Iterator[None]:
    """Run the operators as the plain functions they wrap, so that a dispatch mode sees every tensor they make.

    For measuring memory on fake tensors, where an opaque operator shows its outputs only. Not for training: not
    thread-safe, and a compiler would look inside.

    Args:
        device_type: take the choices of this kind of device (sizes of slices, which products) for every tensor,
            wherever it is. What has no equivalent elsewhere is replaced by something of the same size, so only fake
            tensors may be given then. None: each tensor's own.
    """
    global _transparent
    before, _transparent = _transparent, _Transparency(device_type)
    try:
        yield
    finally:
        _transparent = before


def device_type(tensor: Tensor) -> str:
    """``tensor.device.type``, or the type that :func:`transparent_operators` was told to plan for."""
    return (_transparent and _transparent.device) or tensor.device.type


def operator(
    fake: Callable[..., Any], *, mutates: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a function as ``poetx::<its name>``, on every device; its annotations are the schema.

    The implementation runs without autocast: it decides itself which product runs in which dtype. ``fake`` takes the
    same arguments and gives the outputs' shapes and dtypes. ``mutates`` names arguments that are written. Returns a
    function that calls the registered operator.

    ``torch.utils.flop_counter.FlopCounterMode`` counts what the function multiplies.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        # Not torch.library.custom_op, whose wrappers take 0.4 ms a call beyond the dispatcher's 0.06 (two CPU cores).
        name = function.__name__.strip("_")

        @functools.wraps(function)
        def without_autocast(*args: Any) -> Any:
            device = _device_type(args)
            if device == "meta" or not torch.is_autocast_enabled(device):
                return function(*args)
            with torch.autocast(device, enabled=False):
                return function(*args)

        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates))
        _LIBRARY.impl(name, without_autocast, "CompositeExplicitAutograd")
        torch.library.register_fake(f"poetx::{name}", fake, lib=_LIBRARY)
        registered = getattr(torch.ops.poetx, name).default
        register_flop_formula(registered.overloadpacket, get_raw=True)(functools.partial(_flops, without_autocast))

        def call(*args: Any) -> Any:
            return without_autocast(*args) if _transparent is not None or _eager() else registered(*args)

        return call

    return decorate


def _device_type(args: tuple[Any, ...]) -> str:
    """Of the first tensor, or of the first that a sequence begins with: torch's own search takes 0.05 ms."""
    for arg in args:
        first = arg[0] if isinstance(arg, list | tuple) and arg else arg
        if isinstance(first, Tensor):
            return first.device.type
    raise AssertionError("an operator takes tensors")


def _flops(function: Callable[..., Any], *args: Any, out_val: Any = None) -> int:
    """FLOPs of one call, counted on fake tensors so that they do not depend on the kernel."""
    device = _device_type(args)
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, **rest: 2 * a[0] * a[1] * a[2] * b[2]}  # torch has none
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with FakeTensorMode(), transparent_operators(device_type=device), counter:
        function(*tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=t.device), args))
    return counter.get_total_flops()


def _eager() -> bool:
    """Whether nobody traces or watches: dispatching an operator that Python implements takes 0.2 ms, its work less."""
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack())


_INSTEAD = "put x @ layer.dense_weight().T + layer.bias in its place there"


def first_derivatives_only() -> None:
    """Refuse second derivatives, which an opaque operator in a backward does not have.

    Raises:
        UserError: second derivatives are wanted (``create_graph=True``).
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise UserError(f"a converted layer has no second derivatives, which create_graph=True asks for; {_INSTEAD}")


def no_transforms() -> None:
    """Refuse ``torch.func`` (grad, vmap, jvp, …), whose own message speaks of a method that no user can write.

    Raises:
        UserError: called inside such a transform.
    """
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise UserError(f"torch.func does not see through a converted layer; {_INSTEAD}")


def cached_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """``functools.cache`` for a function that makes tensors.

    Under a fake mode neither may its tensors outlive it, nor may real ones be mixed into it: they are kept until
    transparency ends. What is kept is an ordinary tensor even where it is first asked for in inference mode.
    """
    real: dict[Any, Any] = {}

    @functools.wraps(function)
    def cached(*args: Any) -> Any:
        faking = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        kept = real if not faking else {} if _transparent is None else _transparent.cache
        key = (function, *args)
        if key not in kept:
            with torch.inference_mode(False):
                kept[key] = function(*args)
        return kept[key]

    return cached
