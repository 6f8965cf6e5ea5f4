"""``PoetLinear``: a linear layer whose weight is R · W0 · P with learned orthogonal R and P."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from poetx.config import PoetConfig
from poetx.errors import UserError
from poetx.layers.weights import PackedWeight
from poetx.ops.cayley import packed_size
from poetx.ops.fold import fold, join_bits, largest_angle, split_bits, stochastic_round_
from poetx.ops.linear import poet_linear
from poetx.ops.quantized_linear import quantized_linear
from poetx.ops.rebuild import kept_factors
from poetx.ops.reference import EXACT

_ORDERS = {3: 3, 7: 7, "exact": EXACT}
#: Of weights, and what products run in.
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def stream(seed: int, name: str, count: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on its arguments alone, so that every rank and every resumed run draws the same."""
    digest = hashlib.sha256(f"{seed}/{name}/{count}/{purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


class FoldStats(NamedTuple):
    """One layer's merge in two scalars.

    angle, float32: the largest rotation angle θ that was folded, radians, as |eigenvalue| of Q. norm_ratio, float64:
    ‖W‖ after the fold over ‖W0‖, before it was corrected to 1.
    """

    angle: Tensor
    norm_ratio: Tensor


class PoetLinear(nn.Module):
    """``y = x · P · W0ᵀ · R + bias`` in the memory of its packed rotations.

    Parameters and buffers (m = out_features, n = in_features, b = block size of the side):
        base_weight [m, n]: frozen, ``W0[perm_out][:, perm_in]``: what is stored is *permuted*, hence the name.
        skew_in [⌈n/b⌉, b(b−1)/2], skew_out [⌈m/b⌉, b(b−1)/2]: packed rotations, ``config.rotation_dtype``; where b
            does not divide the side, the last row's entries beyond the shorter last block have no effect.
        bias [m] or None: outside the rotation, trained as usual.
        perm_in [n], perm_out [m]: int32. merge_count: int64 scalar. base_norm: ‖W0‖, float64 scalar.
        residual [m, n]: int8, only with ``config.weight_extra_bits`` and a bfloat16 weight.
        packed_weight: with ``config.weight_format``, a :class:`~poetx.layers.weights.PackedWeight` for ``base_weight``,
            which is None then; with ``config.weight_extra_bits`` it holds its own residual.

    Args:
        in_features, out_features: sizes, at least 1.
        config: see :class:`poetx.PoetConfig`.
        name: with ``config.seed`` decides the permutations; give the dotted name in the model.
        transposed: the layer came from a ``transformers`` ``Conv1D``, which :func:`poetx.to_dense_` gives back.

    Raises:
        UserError: a dtype other than float32, bfloat16 or float64.
    """

    perm_in: Tensor
    perm_out: Tensor
    merge_count: Tensor
    base_norm: Tensor
    residual: Tensor | None
    base_weight: Any  # an nn.Parameter, or None where packed_weight stands for it
    _like: Tensor
    #: (G_in, G_out) while :func:`poetx.shared_blocks` holds them; no part of the layer's state.
    shared_blocks: tuple[Tensor, Tensor] | None = None

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
        self.config = config = config or PoetConfig(init="normalized")
        dtype = dtype or torch.get_default_dtype()
        if dtype not in DTYPES:
            raise UserError(
                f"{name or 'PoetLinear'}: {str(dtype).removeprefix('torch.')} is not supported (its range needs "
                "loss scaling); use bfloat16 or float32"
            )
        self.in_features, self.out_features = in_features, out_features
        self.block_size_in = min(config.block_size, in_features)
        self.block_size_out = min(config.block_size, out_features)
        self.name, self.transposed = name, transposed
        self.fast_tokens = 0  # up to so many tokens mode is fast; see poetx.savings.checkpoint_layers_
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
                residual=config.weight_extra_bits,
                device=device,
            )
        self.skew_in = self._new_skew(in_features, self.block_size_in)
        self.skew_out = self._new_skew(out_features, self.block_size_out)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        for side, size in (("perm_in", in_features), ("perm_out", out_features)):
            self.register_buffer(side, torch.empty(size, dtype=torch.int32, device=device))
        self.register_buffer("merge_count", torch.empty((), dtype=torch.int64, device=device))
        self.register_buffer("base_norm", torch.empty((), dtype=torch.float64, device=device))
        keeps_residual = config.weight_extra_bits and dtype == torch.bfloat16 and self.packed_weight is None
        self.register_buffer(
            "residual", torch.empty(shape, dtype=torch.int8, device=device) if keeps_residual else None
        )
        self.reset_parameters()

    def _new_skew(self, size: int, block_size: int) -> nn.Parameter:
        dtype = torch.float64 if self.weight_dtype == torch.float64 else getattr(torch, self.config.rotation_dtype)
        shape = (-(-size // block_size), packed_size(block_size))
        return nn.Parameter(torch.empty(shape, device=self._like.device, dtype=dtype))

    @property
    def weight_dtype(self) -> torch.dtype:
        """What the layer computes in and :func:`poetx.to_dense_` gives back; ``base_weight``'s, where there is one."""
        return self._like.dtype if self.base_weight is None else self.base_weight.dtype

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw everything anew from (seed, name): also what ``to_empty`` needs after the meta device.

        The weight is drawn as ``config.init`` says, ``"keep"`` counting as ``"normalized"`` here, where there is
        nothing to keep. Does nothing on the meta device.
        """
        if self._like.is_meta:
            return
        self._reset_rotations()
        fresh = (self.config, self.out_features, self.in_features, self.name)
        self._store(fresh_weight(*fresh).to(self._like.device))  # held by nobody else, so freed once it is permuted
        if self.bias is not None:
            self.bias.zero_()

    def _reset_rotations(self) -> None:
        self.skew_in.zero_()
        self.skew_out.zero_()
        self.merge_count.zero_()
        for perm, fresh in zip((self.perm_in, self.perm_out), self._draw_permutations(0), strict=True):
            perm.copy_(fresh)

    def _draw_permutations(self, merge_count: int) -> tuple[Tensor, Tensor]:
        return tuple(
            torch.randperm(size, generator=stream(self.config.seed, self.name, merge_count, side), device="cpu")
            for side, size in (("in", self.in_features), ("out", self.out_features))
        )  # type: ignore[return-value]

    def _store(self, native_weight: Tensor) -> None:
        """Write a weight [m, n] given in the native frame in the stored form, and note its norm."""
        weight = _permuted(native_weight, self.perm_out, self.perm_in)
        del native_weight
        self._write(weight, noise=None)
        del weight
        self.base_norm.copy_(torch.linalg.vector_norm(self._precise_weight(), dtype=torch.float64))

    def _write(self, weight: Tensor, *, noise: torch.Generator | None) -> None:
        """Round a weight [m, n], permuted already, to the stored precision: to nearest without ``noise``."""
        if self.packed_weight is not None:
            self.packed_weight.write(weight, noise=noise)
        elif self.residual is not None and self.base_weight.dtype == torch.bfloat16:
            high, low = split_bits(weight)
            self.base_weight.copy_(high)
            self.residual.copy_(low)
        elif noise is None:
            self.base_weight.copy_(weight)
        else:
            stochastic_round_(self.base_weight, weight, noise)

    def _precise_weight(self) -> Tensor:
        """W' with every bit there is of it: ``base_weight``, or a new float32 tensor."""
        if self.packed_weight is not None:
            return self.packed_weight.read(precise=True)
        if self.residual is not None and self.base_weight.dtype == torch.bfloat16:
            return join_bits(self.base_weight, self.residual)
        return self.base_weight

    @classmethod
    def from_linear(
        cls, linear: nn.Module, *, config: PoetConfig, name: str = "", weight: Tensor | None = None
    ) -> PoetLinear:
        """Convert an ``nn.Linear`` or ``transformers`` ``Conv1D``; ``init="keep"`` preserves its function.

        The bias keeps its ``nn.Parameter`` object, so an optimizer that already holds it stays right. ``weight``
        [m, n] stands for a weight that another library has quantized.
        """
        transposed = not isinstance(linear, nn.Linear)
        source: Tensor = linear.weight.detach() if weight is None else weight.detach()  # type: ignore[assignment]
        native = source.T if transposed else source
        layer = cls(
            native.shape[1],
            native.shape[0],
            bias=False,
            config=config,
            name=name,
            transposed=transposed,
            device="meta",
            dtype=native.dtype,
        )
        if not native.is_meta:
            layer.to_empty(device=native.device)
            if config.init != "keep":
                native = fresh_weight(config, layer.out_features, layer.in_features, name).to(native.device)
            layer.load_dense_(native)
        layer.bias = linear.bias  # type: ignore[assignment]
        return layer.train(linear.training)

    @torch.no_grad()
    def load_dense_(self, weight: Tensor) -> None:
        """Take ``weight`` [m, n] in the native frame, on this layer's device; rotations and merge count start anew."""
        self._reset_rotations()
        self._store(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] → y [..., out_features], in autocast's dtype if that is on, else in x's."""
        mode = "fast" if x.numel() <= self.fast_tokens * self.in_features else self.config.mode
        factors = kept_factors(x) if mode == "mem" and torch.is_grad_enabled() else None
        x = checked_input(x, self.in_features, self.weight_dtype, self.name or "PoetLinear")
        rotations = (self.skew_in, self.skew_out, self.perm_in, self.perm_out)
        settings: dict[str, Any] = {
            "block_size_in": self.block_size_in,
            "block_size_out": self.block_size_out,
            "order": self.order,
            "bias": self.bias,
            "factors": factors,
        }
        if self.packed_weight is not None:
            return quantized_linear(x, self.packed_weight.packed, *rotations, **settings)
        blocks = self.shared_blocks if self.shared_blocks and self.shared_blocks[0].dtype == x.dtype else None
        return poet_linear(x, self.base_weight, *rotations, mode=mode, blocks=blocks, **settings)

    @property
    def order(self) -> int:
        """Neumann order of the parametrization, as the operators take it."""
        return _ORDERS[self.config.neumann_order]

    @property
    def rotations(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The packed parameters of both sides, ``(skew_in, skew_out)``."""
        return self.skew_in, self.skew_out

    @property
    def rotation_count(self) -> int:
        """Degrees of freedom in the rotations: their parameters less the unused entries of ragged blocks."""
        total = 0
        for size, block_size in (
            (self.in_features, self.block_size_in),
            (self.out_features, self.block_size_out),
        ):
            full, rest = divmod(size, block_size)
            total += full * packed_size(block_size) + packed_size(rest)
        return total

    def dense_weight(self) -> Tensor:
        """The weight [out_features, in_features] that forward acts with, float32 (float64 if stored so).

        Differentiable in the rotations. Costs 2mn(b_in + b_out) multiply-adds: for export, not for the step.
        """
        weight = self.base_weight if self.packed_weight is None else self.packed_weight.read()
        return _permuted(self._folded(self.order, weight), _inverse(self.perm_out), _inverse(self.perm_in))

    @property
    def weight(self) -> Tensor:
        """:meth:`dense_weight` in the stored dtype, for code that reads ``layer.weight``; slow."""
        return self.dense_weight().to(self.weight_dtype)

    def _folded(self, order: int, weight: Tensor) -> Tensor:
        return fold(
            weight,
            self.skew_in,
            self.skew_out,
            block_size_in=self.block_size_in,
            block_size_out=self.block_size_out,
            order=order,
        )

    @torch.no_grad()
    def merge_(self) -> FoldStats:
        """Fold the rotations into the weight, set them to zero, draw new permutations, count one merge.

        The rotation is the exact Cayley transform in float32, whatever the training order, so singular values
        stay. Rounding below float32 is stochastic, and since its noise adds a little to ‖W‖ each time, the folded
        weight is scaled back to ‖W0‖ first. Everything is written in place. This is the layer's half of a merge:
        :func:`poetx.merge_` also resets the optimizer's state.
        """
        count = int(self.merge_count) + 1
        weight = self._folded(EXACT, self._precise_weight())
        ratio = torch.linalg.vector_norm(weight, dtype=torch.float64) / self.base_norm
        weight /= torch.where(ratio > 0, ratio, 1.0)
        angles = (
            largest_angle(self.skew_in, size=self.in_features, block_size=self.block_size_in),
            largest_angle(self.skew_out, size=self.out_features, block_size=self.block_size_out),
        )
        moves = []
        for perm, fresh in zip((self.perm_in, self.perm_out), self._draw_permutations(count), strict=True):
            moves.append(_inverse(perm)[fresh.to(perm.device)])
            perm.copy_(fresh)
        noise = stream(self.config.seed, self.name, count, "rounding", self.skew_in.device)
        weight = _permuted(weight, moves[1], moves[0])
        self._write(weight, noise=noise)
        self.skew_in.zero_()
        self.skew_out.zero_()
        self.merge_count.fill_(count)
        return FoldStats(torch.maximum(*angles), ratio)

    def __getstate__(self) -> dict[str, Any]:
        """A copy made inside :func:`poetx.shared_blocks` has rotations of its own, and nobody would free its blocks."""
        return {key: value for key, value in self.__dict__.items() if key != "shared_blocks"}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """``load_state_dict(assign=True)`` brings its own device and dtype, and :attr:`_like` is in no state dict."""
        super()._load_from_state_dict(*args, **kwargs)
        self._like = torch.empty(0, device=self.skew_in.device, dtype=self.weight_dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PoetLinear:
        """``.to()``, ``.bfloat16()`` and the like: the rotations and ‖W0‖ move, but are never narrowed."""
        before, norm = [skew.data for skew in self.rotations], self.base_norm
        if (dtype := fn(self._like).dtype) not in DTYPES:
            raise UserError(f"{self.name or 'PoetLinear'}: {dtype} is not supported; use bfloat16")
        super()._apply(fn, recurse)
        if self.base_norm.dtype != norm.dtype:
            self.base_norm = norm.to(self.base_norm.device)
        floor = getattr(torch, self.config.rotation_dtype)
        for skew, value in zip(self.rotations, before, strict=True):
            if torch.promote_types(skew.dtype, floor) != skew.dtype:
                grad, skew.grad = skew.grad, None
                skew.data = value.to(skew.device)
                skew.grad = None if grad is None else grad.to(skew.dtype)
        return self

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, block_size={(self.block_size_in, self.block_size_out)}, mode={self.config.mode!r}"


def _inverse(perm: Tensor) -> Tensor:
    return perm.long().argsort()


def _permuted(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``weight[rows][:, columns]`` in one copy."""
    return weight[rows.long()[:, None], columns.long()]


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
