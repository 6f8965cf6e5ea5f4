"""What the converted layers of both methods share: construction, conversion, which dtypes, which inputs."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from poetx.config import PoetConfig
from poetx.errors import UserError
from poetx.ops.random import stream

#: Of weights, and what products run in.
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
Layer = TypeVar("Layer", bound="ConvertedLinear")


class ConvertedLinear(nn.Module):
    """A layer in place of ``nn.Linear`` (or of a ``Conv1D``, if ``transposed``), known by its dotted name."""

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, config: PoetConfig, name: str, transposed: bool) -> None:
        super().__init__()
        self.config = config
        self.in_features, self.out_features = in_features, out_features
        self.block_size_in = min(config.block_size, in_features)
        self.block_size_out = min(config.block_size, out_features)
        self.name, self.transposed = name, transposed
        #: None: ``config.mode`` holds. Else *fast* up to so many tokens, *mem* beyond: see savings.checkpoint_layers_.
        self.fast_tokens: float | None = None

    @property
    def label(self) -> str:
        """The layer's name, for messages."""
        return self.name or type(self).__name__

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise :class:`UserError` where the layer cannot compute in ``dtype``."""
        if dtype not in DTYPES:
            raise UserError(
                f"{self.label}: {str(dtype).removeprefix('torch.')} is not supported (its range needs loss scaling); "
                "use bfloat16 or float32"
            )

    def fresh_weight(self) -> Tensor:
        """:func:`fresh_weight` of this layer."""
        return fresh_weight(self.config, self.out_features, self.in_features, self.name)

    @classmethod
    def from_linear(
        cls: type[Layer], linear: nn.Module, *, config: PoetConfig, name: str = "", weight: Tensor | None = None
    ) -> Layer:
        """Convert an ``nn.Linear`` or ``transformers`` ``Conv1D``; ``init="keep"`` preserves its function.

        The bias keeps its ``nn.Parameter`` object, so an optimizer that already holds it stays right. ``weight``
        [m, n] stands for a weight that another library has quantized.
        """
        build: Any = cls
        transposed = not isinstance(linear, nn.Linear)
        source: Tensor = linear.weight.detach() if weight is None else weight.detach()  # type: ignore[assignment]
        native = source.T if transposed else source
        m, n = native.shape
        layer: Layer = build(
            n, m, bias=False, config=config, name=name, transposed=transposed, device="meta", dtype=native.dtype
        )
        if config.init != "keep" and not native.is_meta:
            native = layer.fresh_weight().to(native.device)
        layer._adopt(native)
        layer.bias = linear.bias  # type: ignore[assignment]
        return layer.train(linear.training)

    def _adopt(self, native: Tensor) -> None:
        """Take a weight [m, n] in the native frame, perhaps on the meta device, with this layer's rest made for it."""
        raise NotImplementedError

    def mode_for(self, x: Tensor) -> str:
        """``"fast"`` or ``"mem"``: the config's mode, unless ``fast_tokens`` says up to how many tokens it is fast."""
        if self.fast_tokens is None:
            return self.config.mode
        return "fast" if x.numel() <= self.fast_tokens * self.in_features else "mem"

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, block_size={(self.block_size_in, self.block_size_out)}, mode={self.config.mode!r}"


def checked_input(x: Tensor, in_features: int, weight_dtype: torch.dtype, name: str) -> Tensor:
    """x [..., in_features] in the dtype that a layer computes in: autocast's if that is on, else the weight's.

    Raises:
        RuntimeError: another dtype without autocast, or another last size, as from ``nn.Linear``.
        UserError: float16 autocast.
    """
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # as nn.Linear does
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif x.dtype != weight_dtype:
        raise RuntimeError(
            f"{name}: input is {x.dtype}, weight is {weight_dtype}; cast one of them or use torch.autocast"
        )
    if x.shape[-1] != in_features:  # a kernel would read beyond the permutation's end
        raise RuntimeError(f"{name}: input is {tuple(x.shape)}, the last size must be {in_features}")
    if x.dtype not in DTYPES:
        raise UserError(f"{name}: {x.dtype} autocast is not supported; use bfloat16")
    return x


def fresh_weight(config: PoetConfig, out_features: int, in_features: int, name: str) -> Tensor:
    """A new weight [m, n] in the native frame, float32 on the CPU, from (seed, name) alone.

    Gaussian with every row scaled to norm ``init_scale``; for ``init="uniform"`` its orthogonal polar-like factor
    instead (QR with the signs fixed), all min(m, n) singular values ``init_scale``. Times ``residual_scale`` where the
    layer writes to the residual stream.
    """
    generator = stream(config.seed, name, 0, "weight")
    weight = torch.randn(out_features, in_features, generator=generator, device="cpu", dtype=torch.float32)
    # In place where it can be: this is the most a model costs while it is built on its quantized size.
    if config.init == "uniform":
        tall = weight if out_features >= in_features else weight.T
        factor, triangle = torch.linalg.qr(tall)
        factor = factor * triangle.diagonal().sign()
        weight = factor if out_features >= in_features else factor.T
    else:
        weight /= weight.norm(dim=1, keepdim=True)
    scale = config.init_scale * (config.residual_scale if config.writes_to_residual(name) else 1)
    return weight.mul_(scale)
