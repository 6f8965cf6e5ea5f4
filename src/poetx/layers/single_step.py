"""``SingleStepLinear``: a plain linear layer whose backward feeds the momentum of its rotations."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from poetx.config import PoetConfig
from poetx.errors import UserError
from poetx.layers.base import recorder
from poetx.layers.hosted import HostedLinear
from poetx.ops.host import HostQueue
from poetx.ops.single_step import MomentumBuffers, cheaper_route, single_step_linear


class SingleStepLinear(HostedLinear):
    """``y = x·Wᵀ + bias`` with the weight in its own frame and no weight gradient: ``method="single-step"``.

    :class:`poetx.POETX` folds a small rotation into the weight at every step, so that the rotations are the identity
    whenever forward runs. Backward adds their gradient straight into that optimizer's momentum: no gradient tensor is
    kept, and gradients of several backward passes add up. ``backward(inputs=...)`` and ``torch.autograd.grad`` train
    nothing: they leave out what is not named to them, and give of ``weight`` what other terms than the product have. A
    term of the loss made of ``weight`` itself (a penalty) has a gradient [m, n] of it for a moment, whose share goes
    into the momentum, too.

    Parameters: ``weight`` [m, n], frozen, under the name and in the layout of ``nn.Linear``; ``bias`` [m] or None,
    trained as usual. The state dict is that of the plain layer: a ``Conv1D``'s weight is [n, m] there.

    ``requires_grad_(False)`` of the layer, of a module around it or of its weight freezes it, and ``True`` trains it
    again (by a :class:`poetx.POETX` built while it was not frozen). The weight itself never requires a gradient.

    Saved for backward: x; with ``mode="fast"`` also y, where block products of activations are cheaper than the
    weight's gradient (see :mod:`poetx.ops.single_step`). ``mode="mem"`` computes y again.

    Args:
        in_features: n, at least 1.
        out_features: m, at least 1.
        config: see :class:`poetx.PoetConfig`.
        name: with ``config.seed`` decides a fresh weight; give the dotted name in the model.
        transposed: the layer came from a ``transformers`` ``Conv1D``, which :func:`poetx.to_dense_` gives back.

    Raises:
        UserError: a dtype other than float32, bfloat16 or float64; training without a :class:`poetx.POETX`.
    """

    weight_name = "weight"
    computed_from = ("weight",)
    _version = 2  # of its state dict; 1, which plain layers have, too: a Conv1D's weight perhaps transposed

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
        config = config or PoetConfig(method="single-step", init="normalized")
        dtype = dtype or torch.get_default_dtype()
        super().__init__(in_features, out_features, config=config, name=name, transposed=transposed, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype), False)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.momentum: MomentumBuffers | None = None
        self.trainer: weakref.ref[Any] | None = None  # what of an optimizer these buffers belong to
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weight anew from (seed, name), ``init="keep"`` counting as ``"normalized"``; bias zero."""
        if self.weight.is_meta:
            return
        self.weight.copy_(self.fresh_weight())
        if self.bias is not None:
            self.bias.zero_()

    def _adopt(self, native: Tensor) -> None:
        self.check_finite(native)
        native = native.to(self.weight.dtype)
        self.weight = nn.Parameter(native.contiguous() if self.transposed else native, False)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in torch; an optimizer whose weight is replaced by another would go on turning the old one."""
        super().register_parameter(name, param)
        if name == self.weight_name:
            self.__dict__.update(momentum=None, trainer=None)

    @property
    def route(self) -> str:
        """``"tokens"`` or ``"weight"``: how backward gets the rotations' gradient, by what it costs."""
        return cheaper_route(self.out_features, self.in_features, self.block_size_out, self.block_size_in)

    @property
    def recomputed_fast_tokens(self) -> float:
        """Any number: what it keeps is its own output, which mostly the next operation keeps, too.

        A model of 8B with 32768 tokens takes 2 % more memory so, and multiplies by each weight three times, not four.
        """
        return math.inf

    @property
    def frozen(self) -> bool:
        """Whether :class:`poetx.POETX` leaves the weight alone."""
        return self.__dict__.get("_mark", (False,))[0]

    def _product(self, x: Tensor) -> Tensor:
        x = self.checked_input(x)
        tracing = recorder()
        gone = self.trainer is not None and not torch.compiler.is_compiling() and self.trainer() is None
        if self.frozen or self.momentum is None or gone or tracing or not torch.is_grad_enabled():
            if self.training and torch.is_grad_enabled() and not self.frozen:
                if tracing:
                    raise UserError(f"{self.label}: {tracing} cannot train the layer; call model.eval() before it")
                raise UserError(
                    f"{self.label}: nothing would train its weight{', as its POETX is gone' if gone else ''}; build "
                    "poetx.POETX(model, ...) after converting and unfreezing and before the forward pass, or call "
                    "model.eval()"
                )
            if self.host is not None:
                if tracing:
                    raise UserError(f"{self.label}: {tracing} finds its weight in host memory; use poetx.to_dense_")
                return self._single_step(x, None)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return nn.functional.linear(x, self.weight.detach().to(x.dtype), bias)
        self.check_needs_no_gradient(self.weight)
        return self._single_step(x, self.momentum)

    def _single_step(self, x: Tensor, momentum: MomentumBuffers | None) -> Tensor:
        return single_step_linear(
            x,
            self.frozen_weight.stored,
            self.bias,
            momentum,
            block_sizes=(self.block_size_in, self.block_size_out),
            route=self.route,
            keep_y=self.mode_for(x) == "fast",
        )

    @property
    def weight_dtype(self) -> torch.dtype:
        weight = self._parameters["weight"]
        return self._like.dtype if weight is None else weight.dtype

    def _probe(self) -> Tensor:
        return self._like if self.host is not None else super(HostedLinear, self)._probe()

    def keep_in_host_memory_(self, queue: HostQueue, device: torch.device) -> None:
        """As in any layer; :class:`poetx.POETX` is built after it, for it holds the very weight."""
        if self.trainer is not None and self.trainer() is not None:
            raise UserError(f"{self.label}: an optimizer holds its weight; call offload_frozen_ before poetx.POETX")
        self.register_buffer("_like", torch.empty(0, dtype=self.weight_dtype, device=device), persistent=False)
        super().keep_in_host_memory_(queue, device)

    def dense_weight(self) -> Tensor:
        """The weight [out_features, in_features]: itself."""
        self.check_whole()
        self.check_filled()
        return self.weight.detach()

    @contextlib.contextmanager
    def _weight_stays_rotated(self) -> Iterator[None]:
        """As in any layer; a weight that torch swaps has lost what autograd knew of it."""
        with super()._weight_stays_rotated():
            yield
        if self.trainer is not None and (trainer := self.trainer()) is not None:
            trainer.take_gradients_of_other_terms()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.transposed:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].T  # a view, which can be loaded into

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is None and f"{prefix}skew_in" in state_dict:
            raise UserError(
                f"{self.label}: the state is of method='poet-x' and holds no plain weight; convert the model with "
                "method='poet-x' to load it"
            )
        if self.transposed and weight is not None and weight.shape == (self.in_features, self.out_features):
            state_dict[f"{prefix}weight"] = weight.T.contiguous()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        # The buffers are one optimizer's state; a copy belongs to none until one is built for it.
        return {**self.__dict__, "momentum": None, "trainer": None}
