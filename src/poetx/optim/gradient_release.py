"""Gradients released during backward: a large parameter is updated as soon as its gradient is there."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from poetx.distributed.ranks import rank_count, sum_
from poetx.errors import AgreedError, UserError
from poetx.optim.settings import check_numbers


def hand_over_gradient(parameter: Tensor, take: Callable[[Tensor], None]) -> RemovableHandle:
    """Call the method ``take`` with the parameter as soon as backward has its gradient, which ``take`` is to drop.

    Once the object of the method is gone, gradients stay.

    Raises:
        UserError: another one takes this gradient, which would leave none.
    """
    if is_handed_over(parameter):
        raise UserError(
            f"the gradient of a parameter of shape {tuple(parameter.shape)} is released to another optimizer already; "
            "call its close() first, or remove() of what release_gradients returned"
        )
    return parameter.register_post_accumulate_grad_hook(_HandOver(take))


def is_handed_over(parameter: Tensor) -> bool:
    """Whether somebody takes the gradient of ``parameter`` during backward, so that none is left after it."""
    hooks = (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()
    return any(isinstance(hook, _HandOver) and hook.take() is not None for hook in hooks)


class _HandOver:
    def __init__(self, take: Callable[[Tensor], None]) -> None:
        self.take = weakref.WeakMethod(take)

    def __call__(self, parameter: Tensor) -> None:
        take = self.take()
        if take is not None and parameter.grad is not None:  # None: of a layer that was not called
            take(parameter)


class ReleaseHandle:
    """What :func:`release_gradients` returns; ``remove()`` goes back to ordinary steps."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        params: list[nn.Parameter],
        max_norm: float | None,
        accumulation_steps: int,
    ) -> None:
        self._optimizer, self._max_norm, self._accumulation_steps = optimizer, max_norm, accumulation_steps
        self._params = params
        self._passes = [0] * len(params)  # since the last step
        self._number = {id(p): number for number, p in enumerate(params)}
        self._device = params[0].device if params else torch.device("cpu")
        # The undecorated step: a hook that counts steps (merging does) must not count every parameter.
        self._step: Any = getattr(type(optimizer).step, "__wrapped__", type(optimizer).step)
        self._hooks: list[Any] = [hand_over_gradient(p, self._release) for p in params]
        self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
        self._hooks.append(optimizer.register_step_post_hook(self._finish))
        # So that a gradient scaler shows itself to the step.
        self._scales = getattr(optimizer, "_step_supports_amp_scaling", False)
        vars(optimizer)["_step_supports_amp_scaling"] = True

    def reset(self) -> None:
        """Call this when a step is skipped instead of taken, so that the next backward is not refused."""
        self._passes = [0] * len(self._params)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        vars(self._optimizer)["_step_supports_amp_scaling"] = self._scales

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if getattr(optimizer, "grad_scale", None) is not None:
            raise UserError(
                "release_gradients: a gradient scaler is in use, and the released gradients were used with its factor "
                "in them; train in bfloat16, which needs none, or without releasing gradients"
            )
        for parameter, passes in zip(self._params, self._passes, strict=True):
            if 0 < passes < self._accumulation_steps and parameter.grad is not None:  # some passes did not use it
                self._use_up(parameter)

    def _finish(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._agree(-1)
        self.reset()

    def _agree(self, number: int) -> None:
        """Raise on every rank where one is at another parameter: other gradients would be added up."""
        if rank_count() == 1:
            return
        ends = torch.tensor([number, -number], device=self._device)
        torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MAX)
        if type(ends) is not Tensor:  # without values when memory is planned
            return
        high, low = ends.tolist()
        if high != -low:
            raise AgreedError(
                "release_gradients: the ranks have gradients of other parameters in this step, as where experts get no "
                "token on one of them; release those alone that every rank uses in every backward"
            )

    def _release(self, parameter: Tensor) -> None:
        number, wanted = self._number[id(parameter)], self._accumulation_steps
        if self._passes[number] == wanted:
            came = "a second backward" if wanted == 1 else f"backward {wanted + 1}"
            raise UserError(
                f"release_gradients: {came} came before optimizer.step(), but the gradient is already used and gone; "
                f"say how many there are by accumulation_steps={wanted + 1}, call reset() where a step is "
                "skipped, or do not release gradients"
            )
        self._passes[number] += 1
        if self._passes[number] == wanted:
            self._use_up(parameter)

    @torch.no_grad()
    def _use_up(self, parameter: Tensor) -> None:
        self._agree(self._number[id(parameter)])
        assert parameter.grad is not None
        sum_(parameter.grad.div_(rank_count()))
        # Nobody can skip this step later: numbers that are not finite would stay in weight and state.
        finite = torch.linalg.vector_norm(parameter.grad, math.inf).isfinite()
        parameter.grad.masked_fill_(~finite, 0)
        if self._max_norm is not None:
            torch.nn.utils.clip_grad_norm_([parameter], self._max_norm)
        self._step_alone(parameter)
        parameter.grad = None

    def _step_alone(self, parameter: Tensor) -> None:
        """The optimizer's own step, on a group of one that shares its settings and its state."""
        optimizer = self._optimizer
        groups = optimizer.param_groups
        group = next(group for group in groups if any(p is parameter for p in group["params"]))
        alone = copy.copy(group)
        alone["params"] = [parameter]
        optimizer.param_groups = [alone]
        try:
            self._step(optimizer)
        finally:
            optimizer.param_groups = groups


def release_gradients(
    optimizer: torch.optim.Optimizer,
    params: Iterable[nn.Parameter],
    *,
    accumulation_steps: int = 1,
    max_norm: float | None = None,
) -> ReleaseHandle:
    """Update these parameters inside ``backward()`` and drop each gradient at once; ``optimizer.step()`` does the rest.

    The same numbers as without it: the optimizer's own step runs on each parameter with its group's learning rate
    and its own state, so set the learning rate before backward. Parameters of other optimizers are passed over. A
    gradient that is not finite is taken for zero, because nobody can skip that step any more. In a process group each
    is averaged over the ranks first, all of which must use the same parameters in the same passes: refused on all where
    not.

    Args:
        optimizer: any torch optimizer whose step treats parameters one by one.
        params: usually the large dense ones: embeddings and head.
        accumulation_steps: backward passes before each ``optimizer.step()``. Gradients are added up and used in the
            last of them, or at the step where a pass did not reach the parameter; so with more than one every gradient
            is held between the passes, and no memory is saved. One pass more is refused when it comes.
        max_norm: clip each released gradient by its *own* norm; the norm over all gradients is not known in time.

    Raises:
        UserError: ``accumulation_steps`` below 1; gradients that are released already.
    """
    check_numbers({"max_norm": max_norm})
    if type(accumulation_steps) is not int or accumulation_steps < 1:
        raise UserError(f"accumulation_steps={accumulation_steps!r}: must be a whole number of at least 1")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    chosen = list({id(p): p for p in params if id(p) in held and p.requires_grad}.values())  # tied ones once
    return ReleaseHandle(optimizer, chosen, max_norm, accumulation_steps)
