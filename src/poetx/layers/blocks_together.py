"""The layers of one decoder layer, which make their blocks together (:mod:`poetx.ops.together`)."""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from poetx.layers.poet import PoetLinear
from poetx.layers.walk import poet_layers
from poetx.ops.together import Taken, Together


class _Pass(NamedTuple):
    """What was made, who began it, what for, and the number of each layer that has not taken its blocks yet."""

    made: Together
    first: int
    state: tuple[Any, ...]
    waiting: dict[int, int]


class BlocksTogether:
    """Layers that make their blocks together: the first that is called in a pass makes those of all.

    A layer that a pass calls again, that is compiled, sharded or partly frozen, that has other settings than the first,
    or that an earlier pass did not call (as an expert), makes its own. The numbers are the same either way, but for the
    last bits of blocks of odd sizes, and so is what is saved for backward.
    """

    def __init__(self, layers: Sequence[PoetLinear]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._left_out: set[int] = set()
        self.forget()

    @property
    def layers(self) -> list[PoetLinear]:
        """Those that are there still."""
        return [layer for ref in self._layers if (layer := ref()) is not None]

    def forget(self) -> None:
        """Whatever was made."""
        self._now: _Pass | None = None

    def take(self, layer: PoetLinear, dtype: torch.dtype, *, again: bool) -> Taken | None:
        """What ``layer`` computes with in ``dtype``; None where it makes its own.

        ``again``: see :meth:`poetx.ops.together.Together.take`.
        """
        if torch.compiler.is_compiling() or _is_selective():
            return None
        state, now = _state(layer, dtype), self._now  # read once: another thread may begin a pass meanwhile
        if now is None or now.first == id(layer) or state != now.state:
            now = self._begun(layer, state)
        number = None if now is None else now.waiting.pop(id(layer), None)
        if now is None or number is None or not now.made.fits(number, layer.sides):
            return None
        return now.made.take(number, again=again)

    def _begun(self, first: PoetLinear, state: tuple[Any, ...]) -> _Pass | None:
        """A new pass, in which ``first`` is called first."""
        if self._now is not None and self._now.state == state:  # not an evaluation in between
            self._left_out |= {*self._now.waiting}
        self.forget()
        dtype = state[0]
        layers = [layer for layer in self.layers if _is_plain(layer) and _state(layer, dtype) == state]
        layers = [layer for layer in layers if id(layer) not in self._left_out]
        if len(layers) < 2 or not any(layer is first for layer in layers):
            return None
        have = [layer.shared_blocks for layer in layers]
        made = [pair if pair is not None and pair[0].dtype == dtype else None for pair in have]
        together = Together([layer.sides for layer in layers], first.order, dtype, made)
        waiting = {id(layer): number for number, layer in enumerate(layers)}
        now = self._now = _Pass(together, id(first), state, waiting)
        return now


@contextlib.contextmanager
def blocks_together(groups: Sequence[BlocksTogether]) -> Iterator[None]:
    """Have layers make their blocks together in all passes inside, forward and backward.

    Gradients of rotations come together, too, at the end of the group's backward. For a loop of one's own making: in it
    nobody writes rotations, a hook on one does not act on another layer's gradient, and no part of a group is
    checkpointed with a backward of its own (``use_reentrant=True``).
    """
    try:
        for group in groups:
            for layer in group.layers:
                layer.blocks_together = group
        yield
    finally:
        for group in groups:
            group.forget()
            for layer in group.layers:
                layer.blocks_together = None


def groups_of(model: nn.Module) -> list[BlocksTogether]:
    """The layers of each element of a ``ModuleList`` or ``Sequential``, the innermost: decoder layers, experts."""
    found: dict[str, list[PoetLinear]] = defaultdict(list)
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)}
    for name, layer in poet_layers(model):
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if ".".join(parts[: end - 1]) in lists:
                found[".".join(parts[:end])].append(layer)
                break
    return [BlocksTogether(layers) for layers in found.values() if len(layers) > 1]


def _state(layer: PoetLinear, dtype: torch.dtype) -> tuple[Any, ...]:
    """What layers that make their blocks together have in common."""
    trains = [skew.requires_grad for skew in layer.rotations]
    return dtype, layer.skew_in.device, layer.order, trains, torch.is_grad_enabled()


def _is_plain(layer: PoetLinear) -> bool:
    """Whether the rotations are here, whole, and of the layer itself; and both train, or neither."""
    if layer.one_sided or layer.config.mode == "weight":
        return False
    skews = [layer._parameters.get(name) for name in ("skew_in", "skew_out")]
    if any(skew is None or skew.is_meta or type(skew.data) not in (Tensor, FakeTensor) for skew in skews):
        return False
    return len({(skew.requires_grad, skew.device) for skew in skews if skew is not None}) == 1


def _is_selective() -> bool:
    """Whether activation checkpointing decides operator by operator: what is run again must ask for the same ones."""
    modes = _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else ()
    return any(type(mode).__module__ == "torch.utils.checkpoint" for mode in modes)
