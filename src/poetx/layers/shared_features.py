"""Features that several layers permute alike, so that they are gathered once for all of them or not at all."""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as modules

from poetx.errors import UserError
from poetx.ops import block_diagonal
from poetx.ops.library import first_derivatives_only, no_transforms
from poetx.ops.linear import weight_is_cheaper
from poetx.ops.rebuild import saved_tensor_hooks
from poetx.ops.side import Sides

if TYPE_CHECKING:
    from poetx.layers.poet import PoetLinear


class _Pass:
    """One forward of the module: decided at its beginning, forgotten at its end."""

    def __init__(self, *, in_force: bool, before: _Pass | None) -> None:
        self.in_force, self.before = in_force, before
        self.region = _region()
        self.frame = None if torch.compiler.is_compiling() else sys._getframe(2)  # that calls the hooks and forward
        self.written: set[int] = set()
        self.read = False
        #: What was gathered: from which tensor, in which state, the result, and who has had it.
        self.kept: tuple[Tensor, Any, Tensor, set[int]] | None = None


class SharedFeatures:
    """Features of a side that layers of one module have in common, under ``permutation="shared"``.

    Either all ``readers`` take the same tensor, and it is gathered once for them (``writers`` is empty then); or the
    ``writers`` make what the ``readers`` take, with nothing but elementwise operations between, and nothing is
    gathered: what lies between is permuted.

    In force only inside the module's own forward, which hooks on it bound, and only if the layers are where they were
    with equal permutations, and, with ``writers``, if nobody has hooked, patched or replaced anything that may look at
    the features between. If not, each layer gathers and scatters by itself, and the function is the same. Under
    ``torch.compile`` permutations that somebody has written in place since the last merge or load are not noticed, and
    nowhere those that were written by way of ``.data``. Dropout between the layers falls on other features.

    Args:
        name: dotted name of ``parent``, which stands for the layers' own in drawing the permutation.
        parent: the module whose direct children the layers are.
        readers, writers: their names in ``parent``.
    """

    def __init__(self, name: str, parent: nn.Module, readers: Sequence[str], writers: Sequence[str] = ()) -> None:
        self.name, self.readers, self.writers = name, tuple(readers), tuple(writers)
        #: In place of a side's name in drawing the permutation.
        self.purpose = "inner" if writers else "in"
        self._begin(parent)

    def _begin(self, parent: nn.Module | None) -> None:
        """``parent`` is the module from now on, as it is when it is next called."""
        self._parent: Callable[[], nn.Module | None] = _nothing if parent is None else weakref.ref(parent)
        self._made_of: Any = None
        self._looked: tuple[list[tuple[Tensor, int]], bool] = [], False
        self._running = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin(None)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedFeatures:
        copied = memo[id(self)] = copy.copy(self)
        parent = self._parent()
        copied._begin(None if parent is None else memo.get(id(parent)))  # None: a layer is copied alone
        return copied

    def watch(self) -> None:
        """Bound the module's forward by hooks, once, and remember what it is made of."""
        parent = self._parent()
        if parent is None or any(_is_of(self, hook) for hook in parent._forward_hooks.values()):
            return
        parent.register_forward_pre_hook(self._enter, with_kwargs=True)
        parent.register_forward_hook(self._leave, always_call=True)
        self._made_of = self._parts(parent)

    def is_complete(self, parent: nn.Module) -> bool:
        """Whether all of the layers are in their places."""
        return len(self._permutations(parent)) == len(self.readers) + len(self.writers)

    def _enter(self, parent: nn.Module, args: Any, kwargs: Any) -> None:
        given = [*args, *kwargs.values()]
        tried = len(given) == 1 and isinstance(given[0], Tensor) and given[0].ndim in (2, 3)
        in_force = self._is_in_force(parent) and (tried or not self.writers)
        self._running.now = _Pass(in_force=in_force, before=self._open())

    def _leave(self, parent: nn.Module, args: Any, outputs: Any) -> None:
        now = getattr(self._running, "now", None)
        self._running.now = None if now is None else now.before
        if now is not None and outputs is not None and now.written and not now.read:
            raise UserError(
                f"{self.name}: its forward handed on the permuted features of {self.writers[0]} without giving them to "
                f"{self.readers[0]}, as it did when the model was converted; convert it with permutation='random'"
            )

    def _open(self) -> _Pass | None:
        """The innermost forward of the module on this thread; what an interruption left open is not."""
        now = getattr(self._running, "now", None)
        if now is not None and now.frame is not None and not torch.compiler.is_compiling():
            frame = sys._getframe(1)
            while frame is not None and frame is not now.frame:
                frame = frame.f_back
            if frame is None:
                now = self._running.now = None
        return now

    def running(self, layer: PoetLinear, *, writes: bool = False) -> _Pass | None:
        """The module's forward on this thread, if it is in force there and one of its layers reads, or writes.

        Raises:
            UserError: features between the layers went out permuted, and now a part of the module runs by itself, as
                under activation checkpointing inside of it: the part would be run again without the rest.
        """
        now = self._open()
        if now is None or not now.in_force:
            return None
        reads_permuted = bool(self.writers) and not writes
        if now.region != _region() or (reads_permuted and len(now.written) < len(self.writers)):
            if now.written:
                raise UserError(
                    f"{self.name}: a part of its forward runs by itself (checkpointed, compiled, on another thread or "
                    "inside saved_tensors_hooks), the rest does not; convert the model with permutation='random'"
                )
            now.in_force = now.in_force and not self.writers
            return None
        if writes:
            now.written.add(id(layer))
        now.read = now.read or reads_permuted
        return now

    def _is_in_force(self, parent: nn.Module) -> bool:
        perms = self._permutations(parent)
        if len(perms) < len(self.readers) + len(self.writers):
            return False
        compiling = torch.compiler.is_compiling()
        if not compiling and self._parent() is not parent:  # a copy, or read from a file
            self._begin(parent)
        if self.writers and not self._is_untouched(parent):
            return False
        seen, result = self._looked
        same = len(perms) == len(seen) and all(perm is before for perm, (before, _) in zip(perms, seen, strict=True))
        if compiling:  # takes what the last merge or load has found of their values
            return same and result
        if same and all(_version(perm) == version for perm, version in seen):
            return result
        return self.look_again()

    def look_again(self) -> bool:
        """Find out anew whether the permutations are equal: after every merge and load."""
        parent = self._parent()
        self._looked = [], False
        if parent is not None:
            perms = self._permutations(parent)
            complete = len(perms) == len(self.readers) + len(self.writers)
            result = complete and all(_equal(perm, perms[0]) for perm in perms[1:])
            self._looked = [(perm, _version(perm)) for perm in perms], result  # at once, for who interrupts
        return self._looked[1]

    def _permutations(self, parent: nn.Module) -> list[Tensor]:
        """Of the layers that are in their places still."""
        places = [(name, "in") for name in self.readers] + [(name, "out") for name in self.writers]
        found = [(vars(parent._modules.get(name) or self), side) for name, side in places]
        return [own["_buffers"][f"perm_{side}"] for own, side in found if own.get(f"shared_{side}") is self]

    def _is_untouched(self, parent: nn.Module) -> bool:
        """Whether nothing lies between the layers, or looks there, but what was tried."""
        if any(GLOBAL_HOOKS):
            return False
        hooks = [*parent._forward_pre_hooks.values(), *parent._forward_hooks.values()]
        if not all(isinstance(getattr(hook, "__self__", None), SharedFeatures) for hook in hooks):
            return False
        if any(_is_watched(part) for child in parent._modules.values() if child for part in child.modules()):
            return False
        layers = [parent._modules[name] for name in (*self.readers, *self.writers)]
        if len({getattr(layer, "_compiled_call_impl", None) is None for layer in layers}) > 1:
            return False
        if torch.compiler.is_compiling():
            return "forward" not in vars(parent)
        parts = self._parts(parent)
        if self._made_of is None:
            self._made_of = parts
        return parts == self._made_of

    def _parts(self, parent: nn.Module) -> Any:
        """What the module is made of beside its layers, as far as a change of it might look at features."""
        own = {*self.readers, *self.writers}
        layers = [(type(part), type(part).forward) for name, part in parent._modules.items() if part and name in own]
        others = [
            part for name, child in parent._modules.items() if child and name not in own for part in child.modules()
        ]
        return layers, [
            (
                type(part),
                type(part).forward,
                [(key, id(value)) for key, value in vars(part).items() if key != "training"],
            )
            for part in (parent, *others)
            if not any(t is not None and t.numel() > 1 for t in (*part._parameters.values(), *part._buffers.values()))
        ]

    def gathered(self, now: _Pass, x: Tensor, dtype: torch.dtype, layer: PoetLinear) -> Tensor:
        """``x[..., perm]`` in ``dtype``, differentiable: the same tensor for all readers of the same x in one pass."""
        no_transforms()
        state = (_version(x), x.requires_grad, dtype)
        kept = now.kept
        if kept is None or kept[0] is not x or kept[1] != state or id(layer) in kept[3]:
            kept = (x, state, _Gather.apply(x.to(dtype), layer.perm_in), set())
        *_, made, served = kept
        served.add(id(layer))
        now.kept = kept if len(served) < len(self.readers) else None
        return made


def as_shared(layer: PoetLinear, x: Tensor, dtype: torch.dtype, mode: str) -> tuple[Tensor, Sides, Tensor | None]:
    """x in ``dtype``, the sides and the bias of a forward pass: without a permutation where others permute alike."""
    (side_in, side_out), bias = layer.sides, layer.bias
    if (shared := layer.shared_in) is not None and (now := shared.running(layer)) is not None:
        if shared.writers:
            side_in = side_in._replace(perm=None)
        elif _gathers_once(layer, x, mode):
            x, side_in = shared.gathered(now, x, dtype, layer), side_in._replace(perm=None)
    if (shared := layer.shared_out) is not None and shared.running(layer, writes=True) is not None:
        bias = None if bias is None else bias.index_select(0, layer.perm_out)
        side_out = side_out._replace(perm=None)
    return x.to(dtype), (side_in, side_out), bias


def _gathers_once(layer: PoetLinear, x: Tensor, mode: str) -> bool:
    """Whether x is gathered for all that read it: *fast* keeps what is gathered for backward, in place of x."""
    if mode != "fast" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    sizes = (layer.out_features, layer.in_features, layer.block_size_out, layer.block_size_in)
    return not weight_is_cheaper(x.numel() // layer.in_features, *sizes, mode)


def look_at_shared_features(layer: PoetLinear) -> None:
    """Find out anew whether the layer's permutations are still those of the layers it shares features with."""
    for shared in (layer.shared_in, layer.shared_out):
        if shared is not None:
            shared.look_again()


class _Gather(torch.autograd.Function):
    """``x[..., perm]``. Saves nothing."""

    @staticmethod
    def forward(ctx, x, perm):
        ctx.perm = perm
        return block_diagonal.gather(x.reshape(-1, x.shape[-1]), perm).view(x.shape)

    @staticmethod
    def backward(ctx, g):
        first_derivatives_only()
        back = block_diagonal.inverse(ctx.perm)
        return block_diagonal.gather(g.reshape(-1, g.shape[-1]), back).view(g.shape), None


#: Of every module, as ``register_module_forward_hook`` hangs them.
GLOBAL_HOOKS = (
    modules._global_forward_hooks,
    modules._global_forward_pre_hooks,
    modules._global_backward_hooks,
    modules._global_backward_pre_hooks,
)


def unwatch(module: nn.Module) -> None:
    """Take the hooks of shared features away from a module that has not all of their layers any more."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            shared = getattr(hook, "__self__", None)
            if isinstance(shared, SharedFeatures) and not shared.is_complete(module):
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)


def _is_of(shared: SharedFeatures, hook: Any) -> bool:
    return getattr(hook, "__self__", None) is shared


def _nothing() -> None:
    """As a weak reference to what is gone."""


def _region() -> Any:
    """What tells a part of a forward that is checkpointed by itself from the rest."""
    return None if torch.compiler.is_compiling() else (torch.is_grad_enabled(), saved_tensor_hooks())


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody has hooked or patched it; of our own hooks one counts what passes, and looks at no feature."""
    own = vars(module)
    hooked = own["_forward_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    foreign = [hook for hook in own["_forward_pre_hooks"].values() if not hasattr(hook, "check_average")]
    return bool(hooked or foreign or "forward" in own)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _equal(perm: Tensor, other: Tensor) -> bool:
    if perm.shape != other.shape:
        return False
    if any(p.is_meta or isinstance(p, FakeTensor) for p in (perm, other)):
        return True  # no values yet; those to come are drawn alike
    return torch.equal(perm, other.to(perm.device))
