"""An accelerator made of host memory: tensors of another device, with values, on a machine that has none.

PyTorch takes it for a real one: the library's branches for "not a CPU" run, a tensor left on the host fails as it would
on a GPU, and every time the host waits for a value or moves data is counted. What it cannot tell: anything about CUDA
itself, or time.
"""

from __future__ import annotations

import contextlib
import functools
import os
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import poetx
from poetx.ops.stored import HOST

NAME = "accel"
DEVICE = f"{NAME}:0"
#: Operators that a GPU takes tensors of both sides for: copies, and indices that it fetches itself.
_BOTH_SIDES = {
    "_to_copy",
    "copy_",
    "index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "single_step_backward",
    "_foreach_copy_",
}
#: Operators whose result's size depends on values, so that the host has to wait for them.
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"}

Crossings = list[str]
_crossings: Crossings | None = None
_LIBRARY = os.path.join(os.path.dirname(poetx.__file__), "")  # noqa: PTH118, PTH120 - as it is, links kept: so are frames


class OnAccelerator(Tensor):
    """A tensor whose device is the accelerator and whose values are in ``value``, on the host."""

    value: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value: Tensor) -> OnAccelerator:
        facts = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, value.shape, device=torch.device(DEVICE), **facts)
        made.value = value
        return made

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.detach()

    @data.setter
    def data(self, other: OnAccelerator) -> None:
        Tensor.data.__set__(self, other)
        self.value = other.value

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.value.untyped_storage()

    def __repr__(self) -> str:
        return f"OnAccelerator({self.value})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _HostGenerator(torch.Generator):
    """A generator for the accelerator: PyTorch can be given none from Python."""

    def __new__(cls, device: Any = "cpu") -> _HostGenerator:
        return super().__new__(cls, "cpu")


class _Factories(TorchDispatchMode):
    """Makes what is asked for on the accelerator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, OnAccelerator)]
    host = [tensor for tensor in tensors if not isinstance(tensor, OnAccelerator) and tensor.ndim]
    brings = any(isinstance(leaf, str) and leaf.startswith(HOST) for leaf in args)  # an operator of ours, from the host
    if here and host and name not in _BOTH_SIDES and not brings:
        raise RuntimeError(f"{func}: tensors on the accelerator {_shapes(here)} and on the host {_shapes(host)}")
    device = kwargs.get("device")
    lands = bool(here) if device is None else torch.device(device).type == NAME
    if name == "copy_":
        lands = isinstance(args[0], OnAccelerator)
    comes = isinstance(tensors[-1 if name == "copy_" else 0], OnAccelerator) if tensors else lands
    moved = name in ("_to_copy", "copy_") and lands != comes
    if name == "_foreach_copy_":
        moved = any(
            isinstance(a, OnAccelerator) != isinstance(b, OnAccelerator) for a, b in zip(*args[:2], strict=True)
        )
    _note(name, moved=moved, waits=bool(here) and name in _WAITING)
    if device is not None:
        kwargs = kwargs | {"device": "cpu" if lands else device}
    out = func(*_map(_on_host, args), **_map(_on_host, kwargs))
    if not lands:
        return out
    given = {id(tensor.value): tensor for tensor in here}  # in place and ``out=``: the very tensor that was given
    return _map(lambda made: _wrapped(made, given), out)


def _wrapped(made: Any, given: dict[int, OnAccelerator]) -> Any:
    if not isinstance(made, Tensor):
        return made
    return given[id(made)] if id(made) in given else OnAccelerator(made)


def _on_host(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, OnAccelerator) else leaf


def _leaves(tree: Any) -> Iterator[Any]:
    """As ``torch.utils._pytree`` does, for what operators take and give: a tenth of its time."""
    if isinstance(tree, (tuple, list, dict)):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(branch)
    else:
        yield tree


def _map(change: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _map(change, branch) for name, branch in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)([_map(change, branch) for branch in tree])
    return change(tree)


def _shapes(tensors: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


def _note(name: str, *, moved: bool, waits: bool) -> None:
    if _crossings is None or not (moved or waits):
        return
    ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(_LIBRARY)]
    _crossings.append(f"{name} at {ours[-1].filename.rpartition('/')[2]}: {ours[-1].line}" if ours else name)


@functools.cache
def _register() -> torch.library.Library:
    """Once in a process, and for good: PyTorch has no way back."""
    from torch.utils import backend_registration as registration

    class Module(registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    library = torch.library.Library("aten", "IMPL")  # what PyTorch's own C++ calls, where no mode sees it

    def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
        return OnAccelerator(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))

    def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        return OnAccelerator(torch.empty(size, dtype=dtype, device="cpu"))

    def copy_from(source, target, non_blocking=False):
        getattr(target, "value", target).copy_(getattr(source, "value", source))
        return target

    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    return library


def available() -> bool:
    """Whether this PyTorch can be given a device from Python."""
    from torch.utils import backend_registration

    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


@contextlib.contextmanager
def accelerator() -> Iterator[torch.device]:
    """Tensors can be made on, and moved to, the device that this yields. Its generators are the host's."""
    _register()
    with _Factories(), mock.patch.object(torch, "Generator", _HostGenerator):
        yield torch.device(DEVICE)


@contextlib.contextmanager
def crossings() -> Iterator[Crossings]:
    """Every wait for a value and every move between host and accelerator, by operator and by our line of code."""
    global _crossings
    before, _crossings = _crossings, []
    try:
        yield _crossings
    finally:
        _crossings = before
