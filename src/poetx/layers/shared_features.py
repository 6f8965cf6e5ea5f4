"""Features that several layers permute alike, so that they are gathered once for all of them or not at all."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

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
        self.used = False
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
    ``torch.compile`` permutations that somebody has written in place since the last merge or load are not noticed.

    Args:
        name: dotted name of ``parent``, which stands for the layers' own in drawing the permutation.
        parent: the module whose direct children the layers are.
        readers, writers: their names in ``parent``.
    """

    def __init__(self, name: str, parent: nn.Module, readers: Sequence[str], writers: Sequence[str] = ()) -> None:
        self.name, self.readers, self.writers = name, tuple(readers), tuple(writers)
        #: In place of a side's name in drawing the permutation.
        self.purpose = "inner" if writers else "in"
        own = {*readers, *writers}
        self._forward = type(parent).forward
        self._others = {child: type(module) for child, module in parent._modules.items() if child not in own}
        self._parent: Callable[[], nn.Module | None] = weakref.ref(parent)
        self._looked: tuple[list[tuple[Tensor, int]], bool] = [], False
        self._running = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_parent", "_running", "_looked")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._parent, self._looked, self._running = _nothing, ([], False), threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedFeatures:
        copied = memo[id(self)] = copy.copy(self)
        if (parent := self._parent()) is not None and id(parent) in memo:  # else a layer is copied alone
            copied._parent = weakref.ref(memo[id(parent)])
        return copied

    def watch(self) -> None:
        """Bound the module's forward by hooks, once."""
        parent = self._parent()
        if parent is not None and not any(getattr(h, "__self__", None) is self for h in parent._forward_hooks.values()):
            parent.register_forward_pre_hook(self._enter)
            parent.register_forward_hook(self._leave, always_call=True)

    def unwatch(self) -> None:
        """Take the hooks away, if not all of the layers are there any more."""
        parent = self._parent()
        if parent is None or len(self._permutations(parent)) == len(self.readers) + len(self.writers):
            return
        for hooks in (parent._forward_pre_hooks, parent._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
                parent._forward_hooks_always_called.pop(key, None)

    def _enter(self, parent: nn.Module, inputs: Any) -> None:
        before = getattr(self._running, "now", None)
        self._running.now = _Pass(in_force=self._is_in_force(parent), before=before)

    def _leave(self, parent: nn.Module, inputs: Any, outputs: Any) -> None:
        now = getattr(self._running, "now", None)
        self._running.now = None if now is None else now.before

    def running(self) -> _Pass | None:
        """The module's forward on this thread, if it is in force there.

        Raises:
            UserError: features between the layers went out permuted, and now a part of the module runs by itself, as
                under activation checkpointing inside of it: the part would be run again without the rest.
        """
        now = getattr(self._running, "now", None)
        if now is None or not now.in_force:
            return None
        if now.region != _region():
            if self.writers and now.used:
                raise UserError(
                    f"{self.name}: a part of its forward is checkpointed, and would be run again without the rest; "
                    "with that, convert the model with permutation='random'"
                )
            now.in_force = now.in_force and not self.writers
            return None
        now.used = True
        return now

    def _is_in_force(self, parent: nn.Module) -> bool:
        perms = self._permutations(parent)
        if len(perms) < len(self.readers) + len(self.writers) or (self.writers and not self._is_untouched(parent)):
            return False
        if torch.compiler.is_compiling():  # takes what the last merge or load has found of their values
            return self._looked[1]
        if self._parent() is not parent:  # a copy, or read from a file
            self._parent = weakref.ref(parent)
        seen, result = self._looked
        if len(perms) == len(seen) and all(
            perm is before and _version(perm) == version for perm, (before, version) in zip(perms, seen, strict=True)
        ):
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
        own = {*self.readers, *self.writers}
        others = {child: type(module) for child, module in parent._modules.items() if child not in own}
        if others != self._others or type(parent).forward is not self._forward or "forward" in vars(parent):
            return False
        return not any(_is_watched(part) for child in parent._modules.values() if child for part in child.modules())

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
    if (shared := layer.shared_in) is not None and (now := shared.running()) is not None:
        if shared.writers:
            side_in = side_in._replace(perm=None)
        elif _gathers_once(layer, x, mode):
            x, side_in = shared.gathered(now, x, dtype, layer), side_in._replace(perm=None)
    if (shared := layer.shared_out) is not None and shared.running() is not None:
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
