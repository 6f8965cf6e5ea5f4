"""Frozen weights as objects: dense, dense with extra bits, in low precision, and each of them in host memory.

Each has, for a weight [rows, columns]: ``stored``, what forward and backward take; ``fetch()``, the weight that they
multiply by, in a wide dtype; ``precise()``, with every bit there is of it; ``write(weight, noise)``, which rounds
another weight into it, to nearest or (with ``noise``) stochastically; ``staged(weight, noise)``, which instead gives
the tensors that ``write`` would change with their new values, for :func:`poetx.ops.transaction.swap_`. Others need no
more than these and a ``kind`` in :mod:`poetx.ops.stored`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from poetx.errors import UserError
from poetx.ops.host import HostQueue
from poetx.ops.quantize import Quantized, dequantize, format_of, quantize_
from poetx.ops.random import join_bits, split_bits, stochastic_round_
from poetx.ops.stored import HOST, Stored

Pairs = list[tuple[Tensor, Tensor]]


class DenseWeight:
    """A weight in float32, bfloat16 or float64, and for bfloat16 perhaps 8 more bits in an int8 tensor.

    A view of a layer's tensors, made anew whenever it is needed.
    """

    def __init__(self, weight: Tensor, extra_bits: Tensor | None) -> None:
        self.weight = weight
        self.extra_bits = extra_bits if weight.dtype == torch.bfloat16 else None

    @property
    def stored(self) -> Stored:
        return Stored((self.weight,))

    def on(self, device: torch.device) -> DenseWeight:
        """The same weight there."""
        bits = self.extra_bits
        return DenseWeight(self.weight.to(device), None if bits is None else bits.to(device))

    def fetch(self) -> Tensor:
        return self.weight

    def precise(self) -> Tensor:
        return self.weight if self.extra_bits is None else join_bits(self.weight, self.extra_bits)

    def write(self, weight: Tensor, *, noise: torch.Generator | None) -> None:
        for target, value in self.staged(weight, noise=noise):
            target.copy_(value)

    def staged(self, weight: Tensor, *, noise: torch.Generator | None) -> Pairs:
        if self.extra_bits is not None:
            return list(zip((self.weight, self.extra_bits), split_bits(weight), strict=True))
        if noise is None or self.weight.dtype != torch.bfloat16:
            return [(self.weight, weight.detach())]
        return [(self.weight, stochastic_round_(torch.empty_like(weight, dtype=torch.bfloat16), weight, noise))]


#: What the rounding error of a weight is kept in: symmetric about zero, as it is.
RESIDUAL_FORMAT = "bipolar-int4"


class PackedWeight(nn.Module):
    """A quantized weight [rows, columns] in the layout of :mod:`poetx.ops.quantize`; a module for its buffers' sake.

    Buffers:
        codes: uint8 [rows, bytes of a row]. scale: bfloat16 [rows, ⌈columns / group_size⌉]. offset: the same, for
            ``"int8"`` and ``"int4"`` only, else None.
    A state dict also says what the codes mean, for the same shapes can mean several things: ``weight_format``, the
    format's name in ASCII, uint8, and ``group_size``, int64. An older state dict without them is taken to fit.

    Args:
        weight_format: one of :data:`poetx.config.WEIGHT_FORMATS`.
        group_size: neighbours in a row that share a scale.
        residual: keep what rounding loses in a second ``PackedWeight`` of 4 bits, :attr:`residual`, so that the
            next merge starts from the weight and not from what was left of it.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    residual: PackedWeight | None

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        weight_format: str,
        group_size: int,
        residual: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.format, self.group_size = format_of(weight_format), group_size
        self.weight_format = weight_format  # torch.distributed.checkpoint looks for what the state dict names
        empty = Quantized.empty(rows, columns, weight_format, group_size, device)
        for name in ("codes", "scale", "offset"):
            self.register_buffer(name, getattr(empty, name))
        settings = {"weight_format": RESIDUAL_FORMAT, "group_size": group_size, "device": device}
        self.residual = PackedWeight(rows, columns, **settings) if residual else None

    @property
    def quantized(self) -> Quantized:
        """The buffers as the operators take them."""
        return Quantized(self.codes, self.scale, self.offset, self.columns, self.format, self.group_size)

    @property
    def stored(self) -> Stored:
        """The buffers that forward reads."""
        tensors = (self.codes, self.scale) if self.offset is None else (self.codes, self.scale, self.offset)
        return Stored(tensors, self.format.name, self.group_size)

    def on(self, device: torch.device) -> PackedWeight:
        """The same weight there."""
        moved = copy.copy(self)
        moved._buffers = {name: None if value is None else value.to(device) for name, value in self._buffers.items()}
        if self.residual is not None:
            moved._modules = {"residual": self.residual.on(device)}
        return moved

    def fetch(self) -> Tensor:
        """The weight [rows, columns] that forward multiplies by, float32."""
        return dequantize(self.quantized)

    def precise(self) -> Tensor:
        """:meth:`fetch` with what the residual knows of it."""
        return self.fetch() if self.residual is None else self.fetch().add_(self.residual.fetch())

    def write(self, weight: Tensor, *, noise: torch.Generator | None) -> None:
        """Round ``weight`` [rows, columns] into the buffers: to nearest without ``noise``, else stochastically.

        With a residual the weight is rounded to nearest, and only its error by ``noise``.
        """
        quantize_(self.quantized, weight, noise=None if self.residual is not None else noise)
        if self.residual is not None:
            self.residual.write(self.fetch().neg_().add_(weight), noise=noise)

    def staged(self, weight: Tensor, *, noise: torch.Generator | None) -> Pairs:
        """What :meth:`write` would change, with the new values."""
        new = Quantized.empty(self.rows, self.columns, self.format.name, self.group_size, weight.device)
        quantize_(new, weight, noise=None if self.residual is not None else noise)
        pairs = [(self.codes, new.codes), (self.scale, new.scale)]
        if self.offset is not None and new.offset is not None:
            pairs.append((self.offset, new.offset))
        if self.residual is not None:
            pairs += self.residual.staged(dequantize(new).neg_().add_(weight), noise=noise)
        return pairs

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = torch.tensor(list(self.format.name.encode()), dtype=torch.uint8, device="cpu")
        destination |= {
            f"{prefix}weight_format": name,
            f"{prefix}group_size": torch.tensor(self.group_size, device="cpu"),
        }

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = {"weight_format": self.format.name, "group_size": self.group_size}
        for setting, ours in own.items():
            saved = state_dict.pop(f"{prefix}{setting}", None)
            if saved is None or saved.is_meta:
                continue
            theirs = bytes(saved.tolist()).decode() if setting == "weight_format" else int(saved)
            if theirs != ours:
                raise UserError(
                    f"{prefix.removesuffix('.')}: the state is of {setting}={theirs!r}, the layer of {ours!r}; convert "
                    f"the model with {setting}={theirs!r} to load it"
                )
        if self.residual is not None and (codes := state_dict.get(f"{prefix}codes")) is not None:
            for name, own in self.residual.named_buffers(prefix=f"{prefix}residual"):  # of an older state: no error yet
                state_dict.setdefault(name, torch.zeros(own.shape, dtype=own.dtype, device=codes.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedWeight:
        """``.to()`` and the like: the scales move, but stay bfloat16, in which every one of them is exact."""
        before = {"scale": self.scale, "offset": self.offset}
        super()._apply(fn, recurse)
        for name, value in before.items():
            if value is not None and getattr(self, name).dtype != value.dtype:
                setattr(self, name, value.to(self.codes.device))
        return self

    def extra_repr(self) -> str:
        return f"{self.rows}x{self.columns}, {self.format.name}, group_size={self.group_size}"


class HostWeight:
    """Another weight, whose tensors are in host memory and used on ``device``.

    Args:
        now: the weight as it is later, for copies ahead of their use; None once it is gone.
    """

    def __init__(
        self,
        weight: DenseWeight | PackedWeight,
        device: torch.device,
        queue: HostQueue,
        now: Callable[[], DenseWeight | PackedWeight | None],
    ) -> None:
        self.weight, self.device, self.queue, self._now = weight, device, queue, now

    @property
    def stored(self) -> Stored:
        stored, now = self.weight.stored, self._now
        self.queue.meet(stored.tensors, lambda: None if (weight := now()) is None else weight.stored.tensors)
        return stored._replace(kind=HOST + stored.kind)

    def fetch(self) -> Tensor:
        return self.weight.on(self.device).fetch()

    def brought(self) -> Tensor:
        """The weight of a single-step layer for its fold, with the next one's copy under way; not to be written."""
        return self.queue.fetch(self.stored.tensors, self.device, once=True)[0]

    def precise(self) -> Tensor:
        return self.weight.on(self.device).precise()

    def write(self, weight: Tensor, *, noise: torch.Generator | None) -> None:
        for target, value in self.staged(weight, noise=noise):
            target.copy_(value)

    def staged(self, weight: Tensor, *, noise: torch.Generator | None) -> Pairs:
        return self.weight.staged(weight, noise=noise)
