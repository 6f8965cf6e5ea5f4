"""What AdamW, SMMF and HFac share: state that keeps its dtype, slices, and writing into narrow weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from poetx.distributed.sharded import is_sharded, local, own_rows, refuse_sharded
from poetx.errors import UserError
from poetx.layers.base import DTYPES
from poetx.ops.fold import without_autocast
from poetx.ops.random import Within, stochastic_round_, stream, stream_seed
from poetx.optim.combined import keep_dtypes
from poetx.optim.saved_kinds import Kind, check_own
from poetx.optim.settings import check_effect, check_group, check_numbers, known_settings

#: Elements worked on at a time, so that the temporaries of a step do not depend on the largest parameter.
SLICE = 1 << 23
#: Magnitude of a gradient's entry whose square, summed, is finite in float32.
LARGEST = torch.finfo(torch.float32).max ** 0.375


class SlicedOptimizer(torch.optim.Optimizer):
    """Goes over its parameters one by one in float32 (float64 for float64), in slices.

    bfloat16 parameters are written with stochastic rounding, because steps of 1e-3 of a weight vanish below half a
    unit in the last place; the noise depends on (seed, parameter's number, step) alone, so a resumed run draws the
    same and the global generators stay as they were.

    Raises:
        UserError: a value outside its range, a parameter of another dtype or a sharded one, a sparse gradient.
    """

    #: Zeros are the state of a parameter that was not stepped yet: how a merge resets it.
    fresh_is_zero = True
    takes_shards: ClassVar[bool] = False
    _beta_count: ClassVar[int | None] = 2  # None: an optimizer without them
    kind: ClassVar[Kind]

    def __init__(self, params: Any, defaults: dict[str, Any], *, seed: int = 0) -> None:
        check_numbers(defaults | {"seed": seed})
        self._seed = seed
        self._numbers: dict[int, int] = {}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None or parameter.numel() == 0:
                        continue
                    if parameter.grad.is_sparse:
                        raise UserError(f"{type(self).__name__}: sparse gradients are not supported; use sparse=False")
                    state = self.state[parameter]
                    state["step"] = int(state.get("step", 0)) + 1  # a tensor in what torch's optimizers saved
                    with without_autocast():
                        self._update(parameter, parameter.grad, state, group)
        finally:  # those that count the step have to take it
            self._finish()
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        """Do what :meth:`_update` has left for all parameters together."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        name = type(self).__name__
        check_group(param_group, name, (*known_settings(), *self.defaults))
        check_effect(param_group, name, self.defaults)
        if self._beta_count is not None and len(param_group["betas"]) != self._beta_count:
            raise UserError(f"betas={param_group['betas']!r}: {name} takes {self._beta_count}")
        refuse_sharded(param_group["params"], name, rows=self.takes_shards)
        for parameter in param_group["params"]:
            if parameter.dtype not in DTYPES:
                raise UserError(
                    f"{name}: a parameter of shape {tuple(parameter.shape)} is {parameter.dtype}; must be float32, "
                    "bfloat16 or float64"
                )
        self._number_parameters()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_seed": self._seed}  # torch's keeps what it knows

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number_parameters()

    def _number_parameters(self) -> None:
        # Now, not at the first step: a parameter whose gradient is released is stepped as if it were the only one.
        self._numbers = {id(p): i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}

    def _noise(self, parameter: Tensor, step: int) -> torch.Generator:
        """Of this parameter at this step: by its number among all parameters, whatever group is stepped alone."""
        return torch.Generator(parameter.device).manual_seed(self._noise_seed(parameter, step))

    def _stream(self, parameter: Tensor, count: int, purpose: str) -> torch.Generator:
        """Of this parameter, for what is drawn more rarely than at every step."""
        return stream(self._seed, str(self._numbers[id(parameter)]), count, purpose, parameter.device)

    def _noise_seed(self, parameter: Tensor, step: int) -> int:
        return stream_seed(self._seed, str(self._numbers[id(parameter)]), step, "optimizer")

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """As in torch, but every tensor keeps its dtype: torch would cast all of them to the parameter's.

        Raises:
            UserError: the state of another optimizer or of parameters of other shapes.
        """
        check_own(self, state_dict)
        super().load_state_dict(dict(state_dict))
        keep_dtypes(self, state_dict)


def compute_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def wide(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """A slice of a gradient in ``dtype``, a copy, and so small that sums of its squares are finite.

    What is past :data:`LARGEST`, 2.8e14, becomes that (state may be narrower than ``dtype``); infinities become NaN, so
    they are not hidden.
    """
    grad = grad.to(dtype)
    return grad.clamp(-LARGEST, LARGEST).add_(grad - grad)


def row_slices(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows of a matrix, of about :data:`SLICE` elements."""
    step = max(1, SLICE // max(1, columns))
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def own_slices(parameter: Tensor, noise: torch.Generator) -> Iterator[tuple[slice, torch.Generator | Within]]:
    """Slices of this rank's elements of ``parameter``, each with its noise, which is that of the whole parameter's."""
    size, first = parameter.numel(), first_element(parameter)
    last = first + local(parameter).numel()
    for start in range(0, last if first < last else 0, SLICE):
        stop = min(size, start + SLICE)
        begin, end = (min(max(edge, start), stop) for edge in (first, last))
        own = slice(max(start, first) - first, max(min(stop, last), first) - first)
        yield own, Within(noise, begin - start, stop - end) if is_sharded(parameter) else noise


def first_element(parameter: Tensor) -> int:
    """Place in the whole parameter of the first element that this rank holds."""
    return own_rows(parameter).start * (parameter.numel() // parameter.shape[0] if parameter.ndim else 1)


def flat(tensor: Tensor) -> Tensor:
    """This rank's elements, in their order, in the same memory where they lie side by side."""
    return local(tensor).reshape(-1)


def write_(target: Tensor, value: Tensor, noise: torch.Generator | Within) -> None:
    """Store ``value`` in ``target``'s dtype: bfloat16 by stochastic rounding."""
    stochastic_round_(target, value, noise)
