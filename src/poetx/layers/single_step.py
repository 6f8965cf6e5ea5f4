"""``SingleStepLinear``: a plain linear layer whose backward feeds the momentum of its rotations."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from poetx.config import PoetConfig
from poetx.errors import UserError
from poetx.layers.base import ConvertedLinear
from poetx.layers.poet import DTYPES, checked_input, fresh_weight
from poetx.ops.cayley import packed_size
from poetx.ops.single_step import MomentumBuffers, cheaper_route, single_step_linear


class RotatedWeight(nn.Parameter):
    """A weight that :class:`poetx.POETX` moves: it requires no gradient, and ``requires_grad_(False)`` freezes it.

    So ``model.part.requires_grad_(False)``, which torch hands down to parameters alone, freezes such layers, too.
    """

    frozen: bool = False

    def requires_grad_(self, requires_grad: bool = True) -> RotatedWeight:
        self.frozen = not requires_grad
        return self

    @property
    def requires_grad(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        self.frozen = not requires_grad

    def __deepcopy__(self, memo: dict[int, Any]) -> RotatedWeight:
        if id(self) not in memo:
            memo[id(self)] = RotatedWeight(self.detach().clone(), requires_grad=False)
            memo[id(self)].frozen = self.frozen
        return memo[id(self)]


class SingleStepLinear(nn.Module):
    """``y = x·Wᵀ + bias`` with the weight in its own frame and no weight gradient: ``method="single-step"``.

    :class:`poetx.POETX` folds a small rotation into the weight at every step, so that the rotations are the identity
    whenever forward runs. Backward adds their gradient straight into that optimizer's momentum: no gradient tensor is
    kept, and gradients of several backward passes add up.

    Parameters: ``weight`` [m, n], frozen, under the name and in the layout of ``nn.Linear``, so that a checkpoint is
    that of the plain model; ``bias`` [m] or None, trained as usual.

    ``requires_grad_(False)`` of the layer, of a module around it or of its weight freezes it, and ``True`` trains it
    again (by a :class:`poetx.POETX` built while it was not frozen). The weight itself never requires a gradient.

    Saved for backward: x; with ``mode="fast"`` also y, where block products of activations are cheaper than the
    weight's gradient (see :mod:`poetx.ops.single_step`). ``mode="mem"`` computes y again.

    Args:
        in_features, out_features: sizes, at least 1.
        config: see :class:`poetx.PoetConfig`.
        name: with ``config.seed`` decides a fresh weight; give the dotted name in the model.
        transposed: the layer came from a ``transformers`` ``Conv1D``, which :func:`poetx.to_dense_` gives back.

    Raises:
        UserError: a dtype other than float32, bfloat16 or float64; training without a :class:`poetx.POETX`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: PoetConfig | None = None,
        name: str = "",
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or PoetConfig(method="single-step", init="normalized")
        self.in_features, self.out_features = in_features, out_features
        self.block_size_in = min(config.block_size, in_features)
        self.block_size_out = min(config.block_size, out_features)
        self.name, self.transposed = name, transposed
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        self.weight = RotatedWeight(weight, requires_grad=False)
        self._check_dtype()
        self.fast_tokens: float | None = None  # as PoetLinear's
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.momentum: MomentumBuffers | None = None
        self.trainer: weakref.ref[Any] | None = None  # what of an optimizer these buffers belong to
        self.reset_parameters()

    def _check_dtype(self) -> None:
        if self.weight.dtype not in DTYPES:
            raise UserError(
                f"{self.name or 'SingleStepLinear'}: {self.weight.dtype} is not supported (its range needs loss "
                "scaling); use bfloat16 or float32"
            )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weight anew from (seed, name), ``init="keep"`` counting as ``"normalized"``; bias zero."""
        if self.weight.is_meta:
            return
        self.weight.copy_(fresh_weight(self.config, self.out_features, self.in_features, self.name))
        if self.bias is not None:
            self.bias.zero_()

    @classmethod
    def from_linear(
        cls, linear: nn.Module, *, config: PoetConfig, name: str = "", weight: Tensor | None = None
    ) -> SingleStepLinear:
        """Convert an ``nn.Linear`` or ``transformers`` ``Conv1D``; ``init="keep"`` preserves its function.

        The bias keeps its ``nn.Parameter`` object; with ``"keep"`` the weight of an ``nn.Linear`` keeps its memory.
        ``weight`` [m, n] stands for a weight that another library has quantized.
        """
        transposed = not isinstance(linear, nn.Linear)
        source: Tensor = linear.weight.detach() if weight is None else weight.detach()  # type: ignore[assignment]
        native = source.T.contiguous() if transposed else source
        m, n = native.shape
        layer = cls(
            n, m, bias=False, config=config, name=name, transposed=transposed, device="meta", dtype=source.dtype
        )
        if config.init != "keep" and not native.is_meta:
            native = fresh_weight(config, m, n, name).to(native)
        layer.weight = RotatedWeight(native, requires_grad=False)
        layer.bias = linear.bias  # type: ignore[assignment]
        return layer.train(linear.training)

    @property
    def route(self) -> str:
        """``"tokens"`` or ``"weight"``: how backward gets the rotations' gradient, by what it costs."""
        return cheaper_route(self.out_features, self.in_features, self.block_size_out, self.block_size_in)

    @property
    def frozen(self) -> bool:
        """Whether :class:`poetx.POETX` leaves the weight alone."""
        return getattr(self.weight, "frozen", False)

    @property
    def rotation_count(self) -> int:
        """Degrees of freedom of both sides."""
        total, free = 0, self.config.update == "free"
        for size, block_size in ((self.in_features, self.block_size_in), (self.out_features, self.block_size_out)):
            full, rest = divmod(size, block_size)
            total += full * block_size**2 + rest**2 if free else full * packed_size(block_size) + packed_size(rest)
        return total

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] → y [..., out_features], in autocast's dtype if that is on, else in x's."""
        x = checked_input(x, self.in_features, self.weight.dtype, self.name or "SingleStepLinear")
        if self.frozen or self.momentum is None or not torch.is_grad_enabled():
            if self.training and torch.is_grad_enabled() and not self.frozen:
                raise UserError(
                    f"{self.name or 'SingleStepLinear'}: nothing would train its weight; build poetx.POETX(model, ...) "
                    "before the first forward pass, or call model.eval()"
                )
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return nn.functional.linear(x, self.weight.to(x.dtype), bias)
        return single_step_linear(
            x,
            self.weight,
            self.bias,
            self.momentum,
            block_sizes=(self.block_size_in, self.block_size_out),
            route=self.route,
            keep_y=ConvertedLinear.mode_for(self, x) == "fast",  # type: ignore[arg-type]
        )

    def dense_weight(self) -> Tensor:
        """The weight [out_features, in_features]: itself."""
        return self.weight.detach()

    def _apply(self, fn: Any, recurse: bool = True) -> SingleStepLinear:
        frozen = self.frozen
        super()._apply(fn, recurse)
        if not isinstance(self.weight, RotatedWeight):  # put in its place, as by to_empty
            self.weight = RotatedWeight(self.weight.data, requires_grad=False)
            self.weight.frozen = frozen
        self._check_dtype()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The buffers are one optimizer's state; a copy belongs to none until one is built for it.
        return {**self.__dict__, "momentum": None, "trainer": None}

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, block_size={(self.block_size_in, self.block_size_out)}, mode={self.config.mode!r}"
