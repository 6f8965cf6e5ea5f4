"""Features that several layers permute alike, so that they are gathered once for all of them or not at all."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from poetx.ops import block_diagonal
from poetx.ops.library import first_derivatives_only
from poetx.ops.linear import weight_is_cheaper
from poetx.ops.side import Sides

if TYPE_CHECKING:
    from poetx.layers.poet import PoetLinear


class SharedFeatures:
    """Features of a side that layers of one module have in common, under ``permutation="shared"``.

    Either all ``readers`` take the same tensor, and it is gathered once for them (``writers`` is empty then); or the
    ``writers`` make what the ``readers`` take, with nothing but elementwise operations between, and nothing is
    gathered: what lies between is permuted. In force only while all of them are where they were and their permutations
    are equal; if not, each gathers and scatters by itself, and the function is the same.

    Args:
        name: dotted name of ``parent``, which stands for the layers' own in drawing the permutation.
        parent: the module whose direct children the layers are.
        readers, writers: their names in ``parent``.
    """

    def __init__(self, name: str, parent: nn.Module, readers: Sequence[str], writers: Sequence[str] = ()) -> None:
        self.name, self.parent = name, parent
        self.readers, self.writers = tuple(readers), tuple(writers)
        #: In place of a side's name in drawing the permutation.
        self.purpose = "inner" if writers else "in"
        self.is_in_force = False
        self._seen: list[tuple[Tensor, int]] = []
        self._kept: tuple[Any, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # holds a weak reference, and an activation

    def in_force(self) -> bool:
        """Whether the layers are where they were and permute alike; looks at the values only where they changed."""
        perms = self._permutations()
        if torch.compiler.is_compiling():  # takes what the last merge or load has found of their values
            return self.is_in_force and len(perms) == len(self.readers) + len(self.writers)
        if len(perms) != len(self._seen) or any(
            perm is not seen or _version(perm) != version
            for perm, (seen, version) in zip(perms, self._seen, strict=True)
        ):
            self.look_again()
        return self.is_in_force

    def look_again(self) -> None:
        """Find out anew whether the permutations are equal: after every merge and load."""
        perms = self._permutations()
        self._seen = [(perm, _version(perm)) for perm in perms]
        complete = len(perms) == len(self.readers) + len(self.writers)
        self.is_in_force = complete and all(_equal(perm, perms[0]) for perm in perms[1:])

    def _permutations(self) -> list[Tensor]:
        """Of the layers that are in their places still."""
        sides = [(name, "in") for name in self.readers] + [(name, "out") for name in self.writers]
        layers = [(self.parent._modules.get(name), side) for name, side in sides]
        return [getattr(layer, f"perm_{side}") for layer, side in layers if self._has(layer, side)]

    def _has(self, layer: Any, side: str) -> bool:
        return getattr(layer, f"shared_{side}", None) is self

    def gathered(self, x: Tensor, dtype: torch.dtype, layer: PoetLinear) -> Tensor:
        """``x[..., perm]`` in ``dtype``, differentiable: the same tensor for all readers of the same x.

        Kept until every reader has had it, x is gone, or another x comes.
        """
        stream = torch.cuda.current_stream(x.device).stream_id if x.is_cuda else 0  # on another x' may not be there yet
        state = (_version(x), dtype, stream)
        kept = self._kept
        if kept is None or kept[0]() is not x or kept[1] != state:
            made = _Gather.apply(x.to(dtype), layer.perm_in)
            kept = (weakref.ref(x, self._forget), state, made, set())
        *_, made, served = kept
        served.add(id(layer))
        self._kept = kept if len(served) < len(self.readers) else None
        return made

    def _forget(self, reference: Any) -> None:
        if (kept := self._kept) is not None and kept[0] is reference:
            self._kept = None


def as_shared(layer: PoetLinear, x: Tensor, dtype: torch.dtype, mode: str) -> tuple[Tensor, Sides, Tensor | None]:
    """x in ``dtype``, the sides and the bias of a forward pass: without a permutation where others permute alike."""
    (side_in, side_out), bias = layer.sides, layer.bias
    if (shared := layer.shared_in) is not None and shared.in_force():
        if shared.writers:
            side_in = side_in._replace(perm=None)
        elif _gathers_once(layer, x, mode):
            x, side_in = shared.gathered(x, dtype, layer), side_in._replace(perm=None)
    if (shared := layer.shared_out) is not None and shared.in_force():
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
    """``x[..., perm]``. Saves nothing: a recomputation that finds it made packs as many tensors as the first pass."""

    @staticmethod
    def forward(ctx, x, perm):
        ctx.perm = perm
        return block_diagonal.gather(x.reshape(-1, x.shape[-1]), perm).view(x.shape)

    @staticmethod
    def backward(ctx, g):
        first_derivatives_only()
        back = block_diagonal.inverse(ctx.perm)
        return block_diagonal.gather(g.reshape(-1, g.shape[-1]), back).view(g.shape), None


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _equal(perm: Tensor, other: Tensor) -> bool:
    if perm.shape != other.shape:
        return False
    if any(p.is_meta or isinstance(p, FakeTensor) for p in (perm, other)):
        return True  # no values yet; those to come are drawn alike
    return torch.equal(perm, other.to(perm.device))
