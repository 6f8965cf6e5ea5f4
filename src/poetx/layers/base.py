"""What the converted layers of both methods share: construction, conversion, which dtypes, which inputs."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import meta_utils
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from poetx.config import PoetConfig
from poetx.distributed.sharded import is_sharded
from poetx.errors import UserError
from poetx.layers.attributes import carry_attributes
from poetx.ops.cayley import packed_size
from poetx.ops.random import stream

#: Of weights, and what products run in.
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
NOT_FINITE = "its weight or rotations, which would spread over the whole layer; load a checkpoint from before that"
Layer = TypeVar("Layer", bound="ConvertedLinear")


class RotatedWeight(nn.Parameter):
    """The weight of a converted layer: it never requires a gradient; ``requires_grad_`` records whether it is frozen.

    So ``model.part.requires_grad_(False)``, which torch hands down to parameters alone, freezes single-step layers,
    and ``model.requires_grad_(True)`` lets rotations train and leaves the weight they turn without a gradient.

    Its layer's product gives it none. What else a loss makes of it, such as a penalty, may give it one
    (:meth:`for_autograd`): the tools that ask for ``requires_grad`` are told False all the same.
    """

    _mark: list[bool]  # whether it is frozen; its layer holds the same list, since fully_shard drops the parameter

    @classmethod
    def of(cls, values: Tensor, frozen: bool = False, mark: list[bool] | None = None) -> RotatedWeight:
        weight = cls(values, requires_grad=False)
        weight._mark = [frozen] if mark is None else mark
        return weight

    @property
    def frozen(self) -> bool:
        return self._mark[0]

    @frozen.setter
    def frozen(self, frozen: bool) -> None:
        self._mark[0] = frozen

    def requires_grad_(self, requires_grad: bool = True) -> RotatedWeight:
        self.frozen = not requires_grad
        return self

    @property
    def requires_grad(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        traced = torch.compiler.is_dynamo_compiling()  # which cannot read frames
        if traced or sys._getframe(1).f_globals.get("__name__") != meta_utils.__name__:
            return False
        with self.for_autograd() as weight:  # torch.compile asks; else its backward would leave out a penalty
            return weight.requires_grad

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        self.frozen = not requires_grad

    @contextlib.contextmanager
    def for_autograd(self) -> Iterator[nn.Parameter]:
        """The weight as autograd has it, whose ``requires_grad`` is what counts there, inside the block."""
        self.__class__ = nn.Parameter  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield self
        finally:
            self.__class__ = RotatedWeight  # pyright: ignore[reportAttributeAccessIssue]

    def __deepcopy__(self, memo: dict[int, Any]) -> RotatedWeight:
        if id(self) not in memo:
            memo[id(self)] = RotatedWeight.of(self.data.clone(), mark=copy.deepcopy(self._mark, memo))
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:  # torch's makes a plain Parameter
        return RotatedWeight.of, (self.data, self.frozen, self._mark)


class _Operators(TorchDispatchMode):
    """Which operators run inside: only so does a layer know ``to_empty`` from a move."""

    def __enter__(self) -> _Operators:
        self.operators: set[Any] = set()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.add(func)
        return func(*args, **(kwargs or {}))


class _Parameters(dict[str, Any]):
    """A module's parameters, where pruning and weight norms neither take away what rotates nor look for it in vain."""

    def __init__(self, label: str = "", computed_from: tuple[str, ...] = ()) -> None:
        self.label, self.computed_from = label, computed_from

    def _refuse(self, name: object) -> None:
        if name in self.computed_from:
            raise UserError(f"{self.label}: {name} {_REPARAMETRIZED}")

    def __contains__(self, name: object) -> bool:
        compiling = torch.compiler.is_compiling()
        if not compiling and sys._getframe(1).f_globals.get("__name__") == parametrize.__name__:
            self._refuse(name)  # else torch says that there is no such parameter, or fails half-way
        return super().__contains__(name)

    def __missing__(self, name: str) -> NoReturn:
        self._refuse(name)
        raise KeyError(name)

    def __delitem__(self, name: str) -> None:
        self._refuse(name)
        super().__delitem__(name)


_REPARAMETRIZED = (
    "cannot become a function of other parameters, as pruning and parametrizations make it; apply them before "
    "poetx.convert_ or after poetx.to_dense_"
)


class ConvertedLinear(nn.Module):
    """A layer in place of ``nn.Linear`` (or of a ``Conv1D``, if ``transposed``), known by its dotted name.

    Subclasses say which parameter is the :class:`RotatedWeight`, in :attr:`weight_name`, and compute ``_product``.
    """

    weight_name: ClassVar[str]
    #: What a rotation is made of, which no function of torch (prune, parametrize, weight_norm) may put itself before.
    computed_from: ClassVar[tuple[str, ...]]
    #: Whether only the input side rotates; the output's blocks are of one feature then, which nothing turns.
    one_sided: ClassVar[bool] = False
    bias: nn.Parameter | None
    #: Whether the tensors got memory without values; see :meth:`check_filled`.
    _hollow: bool = False
    made_dense: bool = False  # by to_dense_: an optimizer that still holds this layer trains nothing

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        config: PoetConfig,
        name: str,
        transposed: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self._parameters = _Parameters(name or type(self).__name__, self.computed_from)
        self.config = config
        self.in_features, self.out_features = in_features, out_features
        self.block_size_in = min(config.block_size, in_features)
        self.block_size_out = 1 if self.one_sided else min(config.block_size, out_features)
        self.name, self.transposed = name, transposed
        #: None: ``config.mode`` holds. Else *fast* up to so many tokens, *mem* beyond: see savings.checkpoint_layers_.
        self.fast_tokens: float | None = None
        self.check_dtype(dtype)

    @property
    def label(self) -> str:
        """The layer's name, for messages."""
        return self.name or type(self).__name__

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise :class:`UserError` where the layer cannot compute in ``dtype``."""
        if dtype not in DTYPES:
            raise UserError(f"{self.label}: {unsupported(dtype)}; use bfloat16 or float32")

    def check_cast(self, fn: Callable[..., Any]) -> None:
        """:meth:`check_dtype` of what ``fn``, as ``nn.Module._apply`` takes it, would make of the weight."""
        try:
            self.check_dtype(fn(self._probe()).dtype)
        except UserError as error:  # the model that was converted asks before anything changes, one around it does not
            raise UserError(
                f"{error}. A model around the converted one may be cast in part now: cast it back"
            ) from None

    @property
    def weight_dtype(self) -> torch.dtype:
        """What the layer computes in and :func:`poetx.to_dense_` gives back."""
        return self._parameters[self.weight_name].dtype  # type: ignore[union-attr]

    @property
    def frozen(self) -> bool:
        """Whether nothing trains the layer's weight."""
        raise NotImplementedError

    @property
    def rotation_count(self) -> int:
        """Degrees of freedom of both sides, without the unused entries of ragged blocks."""
        free = self.config.method == "single-step" and self.config.update == "free"
        total = 0
        for size, block_size in ((self.in_features, self.block_size_in), (self.out_features, self.block_size_out)):
            full, rest = divmod(size, block_size)
            total += full * block_size**2 + rest**2 if free else full * packed_size(block_size) + packed_size(rest)
        return total

    def check_finite(self, *tensors: Tensor) -> None:
        """Raise :class:`UserError` where ``tensors`` hold inf or NaN, which a rotation would spread over the layer."""
        if not all(map(is_finite, tensors)):
            self.refuse_not_finite()

    def refuse_not_finite(self) -> NoReturn:
        """Raise :class:`UserError` for inf or NaN in the layer."""
        raise UserError(f"{self.label}: inf or NaN in {NOT_FINITE}")

    def check_floating(self, weight: Tensor) -> None:
        """Raise :class:`UserError` where a weight that is to be loaded is made of integers."""
        if not weight.is_floating_point():
            raise UserError(
                f"{self.label}: the weight in the state is {str(weight.dtype).removeprefix('torch.')}: codes of a "
                "quantized weight, whose scales this layer does not know; dequantize it first"
            )

    def check_filled(self) -> None:
        """Raise :class:`UserError` where ``to_empty`` gave the layer memory and nobody has written values since."""
        if not self._hollow or torch.compiler.is_compiling():
            return
        marks = self._marks()
        if any(mark.is_meta or isinstance(mark, FakeTensor) for mark, _ in marks):
            return
        if any(bool(mark.isnan() if mark.is_floating_point() else mark == value) for mark, value in marks):
            raise UserError(
                f"{self.label}: it has memory but no values since to_empty or the meta device; load a state dict, "
                "or call poetx.materialize_ on a model of the meta device, or the layer's reset_parameters()"
            )
        self._hollow = False

    def check_whole(self) -> None:
        """Raise :class:`UserError` where the parameters are sharded, and there is a part of them on this rank only."""
        if not torch.compiler.is_compiling() and any(
            is_sharded(parameter) for name, parameter in self._parameters.items() if name != "bias"
        ):
            raise UserError(
                f"{self.label}: its parameters are sharded; run the model that fully_shard was called on, merge by "
                "poetx.merge_(model), and for anything else load its full state dict into a model that is not sharded"
            )

    def _marks(self) -> list[tuple[Tensor, float]]:
        """The first element of each tensor, and what it is without values; not of codes, whose scales show it."""
        tensors = [t.detach() for t in (*self.parameters(), *self.buffers()) if t.numel() and t.dtype.itemsize > 1]
        nowhere = (math.nan if t.is_floating_point() else torch.iinfo(t.dtype).min for t in tensors)
        return [(t[(0,) * t.ndim], value) for t, value in zip(tensors, nowhere, strict=True)]

    def fresh_weight(self) -> Tensor:
        """:func:`fresh_weight` of this layer."""
        return fresh_weight(self.config, self.out_features, self.in_features, self.name)

    @classmethod
    def from_linear(
        cls: type[Layer],
        linear: nn.Module,
        *,
        config: PoetConfig,
        name: str = "",
        weight: Tensor | None = None,
        shared: Mapping[str, Any] | None = None,
    ) -> Layer:
        """Convert an ``nn.Linear`` or ``transformers`` ``Conv1D``; ``init="keep"`` preserves its function.

        Attributes that somebody set on the layer or its weight go along (:mod:`poetx.layers.attributes`), hooks do not.
        The bias keeps its ``nn.Parameter`` object, so an optimizer that already holds it stays right; a single-step
        layer keeps the memory of an ``nn.Linear``'s weight, too. ``weight`` [m, n] stands for a weight that another
        library has quantized. ``shared``: what a side ("in", "out") has in common with other layers, if anything.

        Raises:
            UserError: float16; inf or NaN in a weight that is kept.
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
        for side, features in (shared or {}).items():
            setattr(layer, f"shared_{side}", features)
        layer._adopt(native)
        layer.bias = linear.bias  # type: ignore[assignment]
        if weight is None:  # else what is there is the other library's
            carry_attributes(linear, layer)
        return layer.train(linear.training)

    def _adopt(self, native: Tensor) -> None:
        """Become the layer of this weight [m, n], in ``nn.Linear``'s layout, perhaps on the meta device.

        Called once, by :meth:`from_linear`, on a layer that was built on the meta device: everything that goes with
        the weight (permutations, rotations, norms) gets its memory and its first values here.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] → y [..., out_features], in autocast's dtype if that is on, else in x's.

        Of a nested tensor, as ``nn.TransformerEncoder`` makes of a padding mask, each part.
        """
        self.check_whole()
        self.check_filled()
        if x.is_nested:
            return torch.nested.as_nested_tensor([self._product(part) for part in x.unbind()], layout=x.layout)
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        """:meth:`forward` of a tensor that is not nested."""
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        """The weight [out_features, in_features] that forward acts with."""
        raise NotImplementedError

    @torch.no_grad()
    def plain_weight(self) -> Tensor:
        """The weight as the plain layer holds it that this one came from: its dtype, a ``Conv1D``'s [in, out]."""
        weight = self.dense_weight().to(self.weight_dtype)
        return weight.T.contiguous() if self.transposed else weight

    def _probe(self) -> Tensor:
        """An empty tensor of the weight's dtype and device."""
        return torch.empty(0, dtype=self.weight_dtype, device=self._parameters[self.weight_name].device)  # type: ignore

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in torch; what takes the weight's place (``load_state_dict(assign=True)``) is one that rotates, too."""
        self._refuse_reparametrization(name.rpartition("_")[0])  # weight_orig, weight_g, weight_v
        if name == self.weight_name and param is not None and not isinstance(param, RotatedWeight):
            former = self._parameters.get(name)
            if type(param.detach()) is Tensor:
                param = RotatedWeight.of(param.detach(), mark=getattr(former, "_mark", None))
        super().register_parameter(name, param)
        if isinstance(param, RotatedWeight):
            self.__dict__["_mark"] = param._mark

    def __delattr__(self, name: str) -> None:
        self._refuse_reparametrization(name)
        super().__delattr__(name)

    def __prepare_scriptable__(self) -> NoReturn:
        raise UserError(f"{self.label}: torch.jit.script cannot read it; call poetx.to_dense_(model) first")

    def _refuse_reparametrization(self, name: str) -> None:
        if name in self.computed_from:
            raise UserError(f"{self.label}: {name} {_REPARAMETRIZED}")

    def check_needs_no_gradient(self, weight: Tensor) -> None:
        """Raise :class:`UserError` where a gradient of the weight itself is wanted, which no backward here gives."""
        if weight.requires_grad and torch.is_grad_enabled():
            raise UserError(
                f"{self.label}: a {self.weight_name} was put in its place that requires a gradient (as by torch.func."
                "functional_call), and would get none; detach() it, or call poetx.to_dense_(model)"
            )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ConvertedLinear:
        """``.to()``, ``.bfloat16()`` and the like, refused before anything changes."""
        was_meta = self._probe().is_meta
        with _Operators() as used:
            self.check_cast(fn)
        former = self._parameters[self.weight_name]

        def plain(tensor: Tensor) -> Tensor:  # what gives back the weight itself gives no parameter to swap with
            made = fn(tensor)
            return made.detach() if isinstance(made, RotatedWeight) else made

        with self._weight_stays_rotated():
            super()._apply(plain, recurse)
        weight = self._parameters[self.weight_name]
        if weight is not former and weight is not None:  # put in its place, as by to_empty
            self._parameters[self.weight_name] = former
            self.register_parameter(self.weight_name, weight)
        if (was_meta or torch.ops.aten.empty_like.default in used.operators) and not self._probe().is_meta:
            self._hollow = True
            for mark, value in self._marks():
                mark.fill_(value)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (weight := state_dict.get(f"{prefix}{self.weight_name}")) is not None:
            self.check_floating(weight)
        with self._weight_stays_rotated():
            super()._load_from_state_dict(state_dict, prefix, *args)

    @contextlib.contextmanager
    def _weight_stays_rotated(self) -> Iterator[None]:
        """With ``torch.__future__.set_swap_module_params_on_conversion`` torch makes it a plain Parameter, in place."""
        weight: Any = self._parameters[self.weight_name]
        mark = getattr(weight, "_mark", [False])
        yield
        if type(weight) is nn.Parameter:
            weight.__class__ = RotatedWeight  # pyright: ignore[reportAttributeAccessIssue]
            weight._mark = mark  # pyright: ignore[reportAttributeAccessIssue]
            # The swap leaves the list of hooks, but drops what calls them.
            weight._post_accumulate_grad_hooks = None  # pyright: ignore[reportAttributeAccessIssue]

    def checked_input(self, x: Tensor) -> Tensor:
        """x [..., in_features] in the dtype that the layer computes in (:meth:`input_dtype`)."""
        return x.to(self.input_dtype(x))

    def input_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype that the layer computes in for x [..., in_features]: autocast's if that is on, else the weight's.

        Raises:
            RuntimeError: another dtype without autocast, or another last size, as from ``nn.Linear``.
            UserError: float16 autocast.
        """
        dtype = x.dtype
        if not x.is_meta and torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:  # as nn.Linear does
            dtype = torch.get_autocast_dtype(x.device.type)
        elif dtype != self.weight_dtype:
            raise RuntimeError(
                f"{self.label}: input is {x.dtype}, weight is {self.weight_dtype}; cast one of them or use "
                "torch.autocast"
            )
        if x.shape[-1] != self.in_features:  # a kernel would read beyond the permutation's end
            raise RuntimeError(f"{self.label}: input is {tuple(x.shape)}, the last size must be {self.in_features}")
        if dtype not in DTYPES:
            raise UserError(f"{self.label}: {dtype} autocast is not supported; use bfloat16")
        return dtype

    @property
    def recomputed_fast_tokens(self) -> float:
        """Up to how many tokens a layer in a checkpointed decoder layer is *fast*, where nobody says.

        Then what it keeps for the length of one backward, [tokens, out_features], is no larger than its weight.
        """
        return self.in_features

    def mode_for(self, x: Tensor) -> str:
        """``"fast"`` or ``"mem"``: the config's mode, unless ``fast_tokens`` says up to how many tokens it is fast."""
        if self.fast_tokens is None:
            return self.config.mode
        return "fast" if x.numel() <= self.fast_tokens * self.in_features else "mem"

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, block_size={(self.block_size_in, self.block_size_out)}, mode={self.config.mode!r}"


def unsupported(dtype: torch.dtype) -> str:
    """What to say of a dtype that is none of :data:`DTYPES`."""
    why = " (its range needs loss scaling)" if dtype == torch.float16 else ""
    return f"{str(dtype).removeprefix('torch.')} is not supported{why}"


def recorder() -> str:
    """Who records a forward pass to run it elsewhere, without the layer's backward; empty where nobody does."""
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return "torch.jit.trace"
    # Not is_exporting(), which some versions of torch.compile take for true.
    return "torch.export" if getattr(torch.compiler, "_is_exporting_flag", False) else ""


def is_finite(weight: Tensor) -> bool:
    """Whether no element is inf or NaN; waits for the device, and copies nothing."""
    if not weight.is_floating_point() or not weight.numel() or weight.is_meta or isinstance(weight, FakeTensor):
        return True
    return bool(torch.linalg.vector_norm(weight, math.inf).isfinite())


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
