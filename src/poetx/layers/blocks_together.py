"""The layers of one decoder layer, which make their blocks together (:mod:`poetx.ops.together`)."""

from __future__ import annotations

import copy
import inspect
import sys
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from poetx.ops.together import Taken, Together

if TYPE_CHECKING:
    from poetx.layers.poet import PoetLinear

#: Passes in a row in which a layer is not called before it makes its own blocks: an expert, or what is skipped.
_MISSED = 3


class _Pass:
    """One run of the module's forward: what was made in it, until all layers have taken theirs."""

    def __init__(self, frame: Any, first: int, state: Any, layers: Sequence[PoetLinear], made: Together) -> None:
        self.frame, self.first, self.state, self.made = frame, first, state, made
        self.numbers = {id(layer): number for number, layer in enumerate(layers)}
        self.waiting = {id(layer): layer.name for layer in layers}


class BlocksTogether:
    """Layers of one module that make their blocks together, once in each run of its forward.

    The first of them that is called makes the blocks of all. A layer that is called again, from outside of the
    module's forward, on another thread or stream, compiled, sharded or partly frozen, or that has other settings than
    the first, makes its own. The numbers are the same either way, and so is what is saved for backward.

    Not part of what is saved; what is read from a file makes its blocks layer by layer.

    Args:
        parent: the module.
        places: the layers' names in it.
    """

    def __init__(self, parent: nn.Module, places: Sequence[str]) -> None:
        self.places = tuple(places)
        self._begin(parent)

    def _begin(self, parent: nn.Module | None) -> None:
        self._parent: Callable[[], nn.Module | None] = _nothing if parent is None else weakref.ref(parent)
        self._running = threading.local()
        self._missed: Counter[str] = Counter()

    def __getstate__(self) -> dict[str, Any]:
        return {"places": self.places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin(None)

    def __deepcopy__(self, memo: dict[int, Any]) -> BlocksTogether:
        copied = memo[id(self)] = copy.copy(self)
        parent = self._parent()
        copied._begin(None if parent is None else memo.get(id(parent)))  # None: a layer is copied alone
        return copied

    def take(self, layer: PoetLinear, dtype: torch.dtype, *, again: bool) -> Taken | None:
        """What ``layer`` computes with in ``dtype``; None where it makes its own.

        ``again``: see :meth:`poetx.ops.together.Together.take`.
        """
        if torch.compiler.is_compiling():
            return None
        now: _Pass | None = getattr(self._running, "now", None)
        if now is not None and not _is_running(now.frame):  # not all of its layers were called
            self._missed.update(now.waiting.values())
            now = self._running.now = None
        if now is None:
            now = self._running.now = self._made_by(layer, dtype)
        if now is None or id(layer) not in now.waiting or now.state != _state(layer, dtype):
            return None
        number = now.numbers[id(layer)]
        if not now.made.fits(number, layer.sides):
            return None
        taken = now.made.take(number, again=again)
        self._missed.pop(now.waiting.pop(id(layer)), None)
        if not now.waiting:  # no frame is held longer than it must: it holds activations
            self._running.now, self._running.done = None, (id(now.frame), now.first)
        return taken

    def _made_by(self, first: PoetLinear, dtype: torch.dtype) -> _Pass | None:
        """A run of the module's forward that ``first`` is called in, the blocks of all layers made."""
        parent = self._parent()
        frame = None if parent is None else _frame_of(parent)
        if parent is None or frame is None:
            return None
        done_in, begun_by = getattr(self._running, "done", (None, None))
        if done_in == id(frame) and begun_by != id(first):  # all were called in this run: it calls some again
            return None
        state = _state(first, dtype)
        layers = [
            layer
            for layer in self._layers(parent)
            if _is_plain(layer) and _state(layer, dtype) == state and self._missed[layer.name] < _MISSED
        ]
        if len(layers) < 2 or not any(layer is first for layer in layers):
            return None
        pairs = (layer.shared_blocks for layer in layers)
        ready = [pair for pair in pairs if pair is not None and pair[0].dtype == dtype]
        made = ready if len(ready) == len(layers) else None
        together = Together([layer.sides for layer in layers], first.order, dtype, made)
        return _Pass(frame, id(first), state, layers, together)

    def _layers(self, parent: nn.Module) -> list[PoetLinear]:
        """Those that are in their places still."""
        found = []
        for place in self.places:
            module: nn.Module | None = parent
            for name in place.split("."):
                module = None if module is None else module._modules.get(name)
            if module is not None and vars(module).get("blocks_together") is self:
                found.append(module)
        return found


def _state(layer: PoetLinear, dtype: torch.dtype) -> Any:
    """What layers that make their blocks together have in common."""
    device = layer.skew_in.device
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    trains = [skew.requires_grad for skew in layer.rotations]
    return device, stream, dtype, layer.order, trains, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _is_plain(layer: PoetLinear) -> bool:
    """Whether the rotations are here, whole, and of the layer itself; and both train, or neither."""
    if layer.one_sided or layer.config.mode == "weight" or layer._hollow:
        return False
    skews = [layer._parameters.get(name) for name in ("skew_in", "skew_out")]
    if any(skew is None or skew.is_meta or type(skew.data) not in (Tensor, FakeTensor) for skew in skews):
        return False
    return len({(skew.requires_grad, skew.device) for skew in skews if skew is not None}) == 1


def _frame_of(module: nn.Module) -> Any:
    """The frame in which the module's forward runs now, on this thread; None if it does not."""
    forwards = (inspect.unwrap(forward) for forward in (type(module).forward, module.forward))
    codes = {getattr(forward, "__code__", None) for forward in forwards} - {None}
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame


def _is_running(wanted: Any) -> bool:
    frame: Any = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None


def _nothing() -> None:
    """As a weak reference to what is gone."""


def gather_layers(model: nn.Module, layers: Iterable[tuple[str, PoetLinear]]) -> None:
    """Have the layers of each element of a ``ModuleList`` or ``Sequential`` make their blocks together."""
    places: dict[str, list[tuple[str, PoetLinear]]] = defaultdict(list)
    for name, layer in layers:
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList | nn.Sequential):
                places[".".join(parts[:end])].append((".".join(parts[end:]), layer))
                break
    for name, found in places.items():
        if len(found) > 1:
            group = BlocksTogether(model.get_submodule(name), [place for place, _ in found])
            for _, layer in found:
                layer.blocks_together = group
