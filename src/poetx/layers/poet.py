"""``PoetLinear``: a linear layer whose weight is R · W0 · P with learned orthogonal R and P."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from poetx.config import PoetConfig
from poetx.errors import UserError
from poetx.layers.base import recorder
from poetx.layers.computed_weight import ComputedWeight
from poetx.layers.hosted import HostedLinear
from poetx.layers.plain_weights import save_plain_weights_too
from poetx.layers.poet_state import ORDERS, check_state, settings_of
from poetx.layers.rebased import is_up_to_date, restart_at_next_step
from poetx.layers.shared_features import SharedFeatures, as_shared, look_at_shared_features
from poetx.layers.weights import DenseWeight, PackedWeight
from poetx.ops.block_diagonal import inverse, is_permutation
from poetx.ops.cayley import packed_size
from poetx.ops.fold import fold, largest_angle
from poetx.ops.linear import poet_linear
from poetx.ops.original import original_weight
from poetx.ops.random import stream
from poetx.ops.rebuild import kept_factors
from poetx.ops.side import Side, Sides, block_count
from poetx.ops.together import Taken
from poetx.ops.transaction import swap_


class FoldStats(NamedTuple):
    """One layer's merge in two scalars.

    angle, float32: the largest rotation angle θ that was folded, radians, as |eigenvalue| of Q. norm_ratio, float64:
    ‖W‖ after the fold over ‖W0‖, before it was corrected to 1 (or, beyond the layer's ``rounding_limit``, kept).
    """

    angle: Tensor
    norm_ratio: Tensor


class PoetLinear(HostedLinear):
    """``y = x · P · W0ᵀ · R + bias`` in the memory of its packed rotations.

    Parameters and buffers (m = out_features, n = in_features, b = block size of the side):
        base_weight [m, n]: frozen, ``W0[perm_out][:, perm_in]``: what is stored is *permuted*, hence the name.
        skew_in [⌈n/b⌉, b(b−1)/2], skew_out [⌈m/b⌉, b(b−1)/2]: packed rotations, ``config.rotation_dtype``; where b
            does not divide the side, the last row's entries beyond the shorter last block have no effect.
        bias [m] or None: outside the rotation, trained as usual.
        perm_in [n], perm_out [m]: int32; the identity with ``config.permutation="contiguous"``. merge_count: int64
            scalar. base_norm: ‖W0‖, float64 scalar.
        trained_with [2]: int64, the Neumann order (−1: exact) and the seed that the rest belongs to. A state of other
            settings is refused; an older one, without it, is taken to fit.
        residual [m, n]: int8, only where ``config.keeps_extra_bits``, of a bfloat16 weight.
        packed_weight: with ``config.weight_format``, a :class:`~poetx.layers.weights.PackedWeight` for ``base_weight``,
            which is None then; where ``config.keeps_extra_bits`` it holds its own residual.

    Args:
        in_features: n, at least 1.
        out_features: m, at least 1.
        config: see :class:`poetx.PoetConfig`.
        name: with ``config.seed`` decides the permutations; give the dotted name in the model.
        transposed: the layer came from a ``transformers`` ``Conv1D``, which :func:`poetx.to_dense_` gives back.

    Raises:
        UserError: a dtype other than float32, bfloat16 or float64.
    """

    weight_name = "base_weight"
    computed_from = ("weight", "base_weight", "skew_in", "skew_out")
    perm_in: Tensor
    perm_out: Tensor
    merge_count: Tensor
    base_norm: Tensor
    trained_with: Tensor
    residual: Tensor | None
    base_weight: Any  # an nn.Parameter, or None where packed_weight stands for it
    states_loaded: int = 0  # by load_state_dict
    #: (G_in, G_out) while :func:`poetx.shared_blocks` holds them; no part of the layer's state.
    shared_blocks: tuple[Tensor, Tensor] | None = None
    #: What the layer reads and makes in common with others, with ``config.permutation="shared"``; set by convert_.
    shared_in: SharedFeatures | None = None
    shared_out: SharedFeatures | None = None
    #: Layers with which it makes its blocks while :func:`poetx.layers.blocks_together.blocks_together` holds.
    blocks_together: Any = None

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
        config = config or PoetConfig(init="normalized")
        dtype = dtype or torch.get_default_dtype()
        super().__init__(in_features, out_features, config=config, name=name, transposed=transposed, dtype=dtype)
        shape = (out_features, in_features)
        # Empty, so that whatever moves or casts the module says which dtype and device it has, base_weight or not.
        self.register_buffer("_like", torch.empty(0, device=device, dtype=dtype), persistent=False)
        self.packed_weight: PackedWeight | None = None
        if config.weight_format is None:
            self.base_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)
        else:
            self.register_parameter("base_weight", None)
            self.packed_weight = PackedWeight(
                *shape,
                weight_format=config.weight_format,
                group_size=config.group_size,
                residual=config.keeps_extra_bits,
                device=device,
            )
        self.skew_in = self._new_skew(in_features, self.block_size_in)
        self.skew_out = self._new_skew(out_features, self.block_size_out)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        for side, size in (("perm_in", in_features), ("perm_out", out_features)):
            self.register_buffer(side, torch.empty(size, dtype=torch.int32, device=device))
        self.register_buffer("merge_count", torch.empty((), dtype=torch.int64, device=device))
        self.register_buffer("base_norm", torch.empty((), dtype=torch.float64, device=device))
        self.register_buffer("trained_with", torch.empty(2, dtype=torch.int64, device=device))
        extra_bits = config.keeps_extra_bits and dtype == torch.bfloat16 and self.packed_weight is None
        self.register_buffer("residual", torch.empty(shape, dtype=torch.int8, device=device) if extra_bits else None)
        save_plain_weights_too()
        self.reset_parameters()

    def _new_skew(self, size: int, block_size: int) -> nn.Parameter:
        dtype = torch.float64 if self.weight_dtype == torch.float64 else getattr(torch, self.config.rotation_dtype)
        shape = (block_count(size, block_size), packed_size(block_size))
        return nn.Parameter(torch.zeros(shape, device=self._like.device, dtype=dtype))

    @property
    def weight_dtype(self) -> torch.dtype:
        """What the layer computes in and :func:`poetx.to_dense_` gives back."""
        return self._like.dtype if self.base_weight is None else self.base_weight.dtype

    def _stored_weight(self) -> DenseWeight | PackedWeight:
        return self.packed_weight or DenseWeight(self.base_weight, self.residual)

    def _of_the_weight(self) -> list[tuple[dict[str, Any], str]]:
        places = [(self._parameters, "base_weight"), (self._buffers, "residual")]
        packed = self.packed_weight
        while packed is not None:
            places += [(packed._buffers, name) for name in packed._buffers]
            packed = packed.residual
        return [(tensors, name) for tensors, name in places if tensors.get(name) is not None]

    @property
    def sides(self) -> Sides:
        """Both rotations, (input, output)."""
        perm_in, perm_out = (self.perm_in, self.perm_out) if self.is_permuted else (None, None)
        return (
            Side(self.skew_in, perm_in, self.in_features, self.block_size_in),
            Side(self.skew_out, perm_out, self.out_features, self.block_size_out),
        )

    @property
    def is_permuted(self) -> bool:
        """Whether features of a block are drawn at random; if not, they are neighbours and nothing is gathered."""
        return self.config.permutation != "contiguous" and not self.one_sided

    @property
    def order(self) -> int:
        """Neumann order of the parametrization, as the operators take it."""
        return ORDERS[self.config.neumann_order]

    @property
    def rotations(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The packed parameters of both sides, ``(skew_in, skew_out)``."""
        return self.skew_in, self.skew_out

    @property
    def frozen(self) -> bool:
        """Whether neither rotation trains."""
        return not any(skew.requires_grad for skew in self.rotations)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw everything anew from (seed, name): also what ``to_empty`` needs after the meta device.

        The weight is drawn as ``config.init`` says, ``"keep"`` counting as ``"normalized"`` here, where there is
        nothing to keep. Does nothing on the meta device.
        """
        if self._like.is_meta:
            return
        self.load_dense_(self.fresh_weight().to(self._like.device))  # held by nobody else: freed once it is permuted
        if self.bias is not None:
            self.bias.zero_()

    @property
    def rounding_limit(self) -> float:
        """How far ‖W‖ can be from ‖W0‖ by rounding alone, relative; codes of few bits have no bound of use."""
        if self.packed_weight is not None:
            return math.inf
        return 1e-2 if self.weight_dtype == torch.bfloat16 else 1e-3

    def _draw_permutations(self, merge_count: int) -> list[Tensor]:
        """Fresh permutations of both sides, as they are stored; the identity unless :attr:`is_permuted`."""
        if not self.is_permuted:
            return [
                torch.arange(perm.numel(), device=perm.device, dtype=perm.dtype)
                for perm in (self.perm_in, self.perm_out)
            ]
        seed, drawn = self.config.seed, []
        sides = ("in", self.in_features, self.shared_in), ("out", self.out_features, self.shared_out)
        for side, size, shared in sides:
            name, purpose = (shared.name, shared.purpose) if shared else (self.name, side)
            generator = stream(seed, name, merge_count, purpose)
            drawn.append(torch.randperm(size, generator=generator, device="cpu").to(self.perm_in))
        return drawn

    def _adopt(self, native: Tensor) -> None:
        if not native.is_meta:
            self.to_empty(device=native.device)
            self.load_dense_(native)

    @torch.no_grad()
    def load_dense_(self, weight: Tensor) -> None:
        """Take ``weight`` [m, n] in the native frame, on this layer's device; rotations and merge count start anew, and
        with the next step what an optimizer keeps of the rotations.

        Raises:
            UserError: it holds inf or NaN. Nothing has changed then.
        """
        self.check_whole()
        self.check_finite(weight)
        if not self._hollow and any(bool(skew.any()) for skew in self.rotations):
            restart_at_next_step(self.label, self.rotations)
        self._hollow = False
        self.skew_in.zero_()
        self.skew_out.zero_()
        self.merge_count.zero_()
        self.trained_with.copy_(settings_of(self))
        for perm, fresh in zip((self.perm_in, self.perm_out), self._draw_permutations(0), strict=True):
            perm.copy_(fresh)
        if self.is_permuted:
            weight = _permuted(weight, self.perm_out, self.perm_in)
        self.frozen_weight.write(weight, noise=None)
        del weight
        self.base_norm.copy_(torch.linalg.vector_norm(self.frozen_weight.precise(), dtype=torch.float64))
        look_at_shared_features(self)

    def _product(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            save_plain_weights_too()  # transformers may be younger than the layer
        if by := recorder():
            raise UserError(f"{self.label}: {by} sees no rotations; call poetx.to_dense_(model) before it")
        mode = self.mode_for(x)
        factors = kept_factors(x) if mode == "mem" and torch.is_grad_enabled() else None
        dtype = self.input_dtype(x)
        if self.base_weight is not None:
            self.check_needs_no_gradient(self.base_weight)
        x, both, bias = as_shared(self, x, dtype, mode)
        return self._rotated(x, mode, both, bias, factors)

    def _rotated(
        self, x: Tensor, mode: str, both: Sides, bias: Tensor | None, factors: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """:meth:`forward` of a checked input; ``factors``: see :func:`poetx.ops.linear.poet_linear`."""
        if mode == "weight":
            weight = original_weight(self.base_weight.to(x.dtype), both, order=self.order)
            return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        blocks = self.shared_blocks if self.shared_blocks and self.shared_blocks[0].dtype == x.dtype else None
        weight, settings = self.frozen_weight.stored, {"order": self.order, "mode": mode, "bias": bias}

        def take(again: bool) -> Taken | None:
            group = self.blocks_together
            return None if group is None else group.take(self, x.dtype, again=again)

        return poet_linear(x, weight, both, **settings, factors=factors, blocks=blocks, take=take)

    def mode_for(self, x: Tensor) -> str:
        """As in any converted layer; *fast* would keep more of a quantized weight's layer than the format spares."""
        settled = self.packed_weight is not None or self.config.mode == "weight"
        return self.config.mode if settled else super().mode_for(x)

    def plain_weight(self) -> Tensor:
        for hook in self._forward_pre_hooks.values():
            if hasattr(hook, "check_average"):  # a MergeReminder, which knows this class
                hook.check_average(self, at_once=True)
        return super().plain_weight()

    def dense_weight(self) -> Tensor:
        """The weight [out_features, in_features] that forward acts with, float32 (float64 if stored so).

        Differentiable in the rotations. Costs 2mn(b_in + b_out) multiply-adds: for export, not for the step.
        """
        self.check_whole()
        self.check_filled()
        self.check_permutations()
        weight = fold(self.frozen_weight.fetch(), self.sides, order=self.order)
        return _permuted(weight, inverse(self.perm_out), inverse(self.perm_in)) if self.is_permuted else weight

    @property
    def weight(self) -> Tensor:
        """:meth:`dense_weight` in the stored dtype, for code that reads ``layer.weight``; slow, and read-only."""
        return ComputedWeight.of(self.dense_weight().to(self.weight_dtype))

    @weight.setter
    def weight(self, value: Any) -> None:
        self.register_parameter("weight", value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            raise UserError(f"{self.label}: weight is computed; set it with layer.load_dense_(weight)")
        super().register_parameter(name, param)

    def check_permutations(self) -> None:
        """Raise :class:`UserError` where somebody has written a permutation that is none."""
        if self._hollow:  # no values yet, which check_filled says
            return
        for name in ("perm_in", "perm_out"):
            perm = getattr(self, name)
            if isinstance(perm, FakeTensor) or torch.compiler.is_compiling() or is_permutation(perm):
                continue
            raise UserError(
                f"{self.label}: {name} was written and is no permutation any more, as by an average of models (EMA, "
                "SWA) with its buffers over a merge; load a checkpoint, and average dense weights, or train by "
                "method='single-step'"
            )

    @torch.no_grad()
    def merge_(self, *also: Callable[[], object]) -> FoldStats:
        """Fold the rotations into the weight, set them to zero, draw new permutations, count one merge.

        The rotation is the exact Cayley transform in float32, whatever the training order, so singular values
        stay. Rounding below float32 is stochastic, and since its noise adds a little to ‖W‖ each time, the folded
        weight is scaled back to ‖W0‖ first; where the norm is off by more than :attr:`rounding_limit`, somebody has
        written the weight, and its norm is ‖W0‖ from now on. This is the layer's half of a merge: :func:`poetx.merge_`
        also resets the optimizer's state, by way of ``also``.

        Computed beside what is there, which takes the stored weight's memory once more, then written in place, all of
        it: whatever interrupts or fails, the layer is as before or merged (:func:`poetx.ops.transaction.swap_`).
        """
        self.check_whole()
        self.check_filled()
        self.check_permutations()
        count = int(self.merge_count) + 1
        weight = fold(self.frozen_weight.precise(), self.sides)
        norm = torch.linalg.vector_norm(weight, dtype=torch.float64)
        self.check_finite(norm)
        ratio = norm / self.base_norm
        known = ratio.isfinite() & (ratio > 0)  # a matrix of zeros, or nearly, has no norm to go back to
        ratio = torch.where(known, ratio, 1.0)
        known &= (ratio - 1).abs() <= self.rounding_limit
        weight /= torch.where(known, ratio, 1.0)
        angle = torch.maximum(*(largest_angle(side) for side in self.sides))
        fresh = self._draw_permutations(count)
        if self.is_permuted:
            columns, rows = (
                inverse(old)[new.long()] for old, new in zip((self.perm_in, self.perm_out), fresh, strict=True)
            )
            weight = _permuted(weight, rows, columns)
        noise = stream(self.config.seed, self.name, count, "rounding", self.skew_in.device)
        pairs = self.frozen_weight.staged(weight, noise=noise)
        pairs += [(self.perm_in, fresh[0]), (self.perm_out, fresh[1])]
        pairs += [(self.base_norm, torch.where(known, self.base_norm, norm))]
        del weight
        swap_(pairs, self.skew_in.zero_, self.skew_out.zero_, lambda: self.merge_count.fill_(count), *also)
        look_at_shared_features(self)
        return FoldStats(angle, ratio)

    def train(self, mode: bool = True) -> PoetLinear:
        save_plain_weights_too()
        return super().train(mode)

    def _save_to_state_dict(self, *args: Any) -> None:
        if save_plain_weights_too() and any(frame.function == "save_pretrained" for frame in inspect.stack(0)):
            raise UserError(
                f"{self.label}: it was made before transformers was imported, so this save_pretrained would lack the "
                "plain weights; call it again"
            )
        super()._save_to_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        """A copy made inside :func:`poetx.shared_blocks` has rotations of its own, and nobody would free its blocks."""
        return {key: value for key, value in self.__dict__.items() if key not in ("shared_blocks", "blocks_together")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        save_plain_weights_too()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Refuse a state of other settings; what an older one lacks is taken to fit, or to be zero.

        The state of a plain layer is taken as :meth:`load_dense_` takes a weight; a plain weight beside the layer's own
        state (:mod:`poetx.layers.plain_weights`) is for other programs.

        ``load_state_dict(assign=True)`` brings its own device and dtype, and :attr:`_like` is in no state dict.
        """
        if (plain := state_dict.pop(f"{prefix}weight", None)) is not None and f"{prefix}skew_in" not in state_dict:
            self._take_plain(plain, state_dict, prefix, args[-1])
        check_state(self, state_dict, prefix)
        if self.residual is not None and (weight := state_dict.get(f"{prefix}base_weight")) is not None:
            state_dict.setdefault(f"{prefix}residual", torch.zeros_like(weight, dtype=torch.int8))
        if plain is None:
            is_up_to_date(self.rotations)
        self.states_loaded += 1
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._like = torch.empty(0, device=self.skew_in.device, dtype=self.weight_dtype)
        look_at_shared_features(self)

    def _take_plain(self, plain: Tensor, state_dict: dict[str, Any], prefix: str, errors: list[str]) -> None:
        """Load the ``weight`` of a plain layer and put what came of it into ``state_dict``, for the rest to find."""
        self.check_floating(plain)
        native = plain.T if self.transposed else plain
        if self.skew_in.is_meta or native.is_meta:
            raise UserError(f"{self.label}: a plain weight into a layer on the meta device; use poetx.materialize_")
        if native.shape == (self.out_features, self.in_features):
            self.load_dense_(native.to(self.skew_in.device, self.weight_dtype))
        else:
            own = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
            errors.append(
                f"size mismatch for {prefix}weight: copying a param with shape {tuple(plain.shape)} from checkpoint, "
                f"the shape in current model is {own}."
            )
        for key, value in self.state_dict().items():
            state_dict.setdefault(f"{prefix}{key}", value)

    def _move(self, fn: Callable[..., Any], recurse: bool) -> PoetLinear:
        """``.to()``, ``.bfloat16()`` and the like: the rotations and ‖W0‖ move, but are never narrowed.

        A wider weight that becomes bfloat16 keeps its extra bits where ``config.keeps_extra_bits``.
        """
        before, norm = [skew.data for skew in self.rotations], self.base_norm
        wide = None if self.base_weight is None else self.base_weight.detach()
        super()._move(fn, recurse)
        if wide is not None and self.config.keeps_extra_bits and wide.dtype != self.weight_dtype == torch.bfloat16:
            self.residual = torch.empty_like(wide, dtype=torch.int8, device=self.skew_in.device)
            with torch.no_grad():
                self.frozen_weight.write(wide.to(self.residual.device), noise=None)
        del wide
        if self.base_norm.dtype != norm.dtype:
            self.base_norm = norm.to(self.base_norm.device)
        floor = getattr(torch, self.config.rotation_dtype)
        for skew, value in zip(self.rotations, before, strict=True):
            if torch.promote_types(skew.dtype, floor) != skew.dtype:
                grad, skew.grad = skew.grad, None
                skew.data = value.to(skew.device)
                skew.grad = None if grad is None else grad.to(skew.dtype)
        return self


def _permuted(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``weight[rows][:, columns]`` in one copy."""
    return weight[rows.long()[:, None], columns.long()]
