"""``PackedWeight``: a frozen weight in low precision, as plain buffers of integers and scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from poetx.errors import UserError
from poetx.ops.quantize import Packed, dequantize, format_of, quantize_

#: What the rounding error of a weight is kept in: symmetric about zero, as it is.
RESIDUAL_FORMAT = "bipolar-int4"


class PackedWeight(nn.Module):
    """A weight [rows, columns] stored as :mod:`poetx.ops.quantize` says. Never trained, never called.

    Buffers:
        codes: uint8 [rows, bytes of a row]. scale: bfloat16 [rows, ⌈columns / group_size⌉]. offset: the same, for
            ``"int8"`` and ``"int4"`` only, else None.
    A state dict also says whose codes they are, ``weight_format``: the format's name in ASCII, uint8. Of the same
    shapes there are several. An older state dict without it is taken to fit.

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
        empty = Packed.empty(rows, columns, weight_format, group_size, device)
        for name in ("codes", "scale", "offset"):
            self.register_buffer(name, getattr(empty, name))
        settings = {"weight_format": RESIDUAL_FORMAT, "group_size": group_size, "device": device}
        self.residual = PackedWeight(rows, columns, **settings) if residual else None

    @property
    def packed(self) -> Packed:
        """The buffers as the operators take them."""
        return Packed(self.codes, self.scale, self.offset, self.columns, self.format, self.group_size)

    def write(self, weight: Tensor, *, noise: torch.Generator | None) -> None:
        """Round ``weight`` [rows, columns] into the buffers: to nearest without ``noise``, else stochastically.

        With a residual the weight is rounded to nearest, and only its error by ``noise``.
        """
        quantize_(self.packed, weight, noise=None if self.residual is not None else noise)
        if self.residual is not None:
            self.residual.write(self.read().neg_().add_(weight), noise=noise)

    def read(self, *, precise: bool = False) -> Tensor:
        """The stored weight [rows, columns], float32: what forward multiplies by; ``precise``, with its residual."""
        weight = dequantize(self.packed)
        return weight if self.residual is None or not precise else weight.add_(self.residual.read())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight_format"] = torch.tensor(
            list(self.format.name.encode()), dtype=torch.uint8, device="cpu"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.pop(f"{prefix}weight_format", None)
        if saved is not None and not saved.is_meta and (name := bytes(saved.tolist()).decode()) != self.format.name:
            raise UserError(
                f"{prefix.removesuffix('.')}: the state is of weight_format={name!r}, the layer of "
                f"{self.format.name!r}; convert the model with weight_format={name!r} to load it"
            )
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
