"""Several optimizers as one torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from poetx.errors import UserError
from poetx.optim.saved_kinds import check_saved, kind_of


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers as one: one ``step()``, one ``param_groups``, one ``state`` and one ``state_dict``.

    Whatever is made for one optimizer works on all of them: schedulers (also those that cycle momentum),
    :func:`poetx.merge_every` (which resets the state of rotations alone), :func:`poetx.optim.release_gradients`,
    checkpoints. Each group says in ``"optimizer"`` which of them steps it; all of them read and write these very
    groups and this very state, given to each just before its step.

    Attributes:
        optimizers: as given. Their settings are in ``param_groups``; step this one, not them.

    Raises:
        UserError: a group added later; ValueError: a parameter that two of them hold.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers: tuple[torch.optim.Optimizer, ...] = ()
        groups = [group | {"optimizer": i} for i, o in enumerate(optimizers) for group in o.param_groups]
        # A scheduler that cycles momentum looks for one of these names in every group; who does not use it ignores it.
        names = ("betas", "momentum")
        cycled = [{name: o.defaults[name] for name in names if name in o.defaults} for o in optimizers]
        defaults = next((found for name in names for found in cycled if name in found), {})
        super().__init__(groups, defaults)
        self.optimizers = optimizers
        self._hand_out()

    def _hand_out(self) -> None:
        """Let every optimizer hold those of the current ``param_groups`` that it steps, and the current ``state``."""
        for index, optimizer in enumerate(self.optimizers):
            optimizer.param_groups = [group for group in self.param_groups if group["optimizer"] == index]
            optimizer.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Call ``closure`` once, then every optimizer's step on the groups that are its own."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._hand_out()  # released gradients replace param_groups while they step one parameter
        for optimizer in self.optimizers:
            if optimizer.param_groups:
                optimizer.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.optimizers:
            raise UserError(f"{type(self).__name__}: add groups to its optimizers before they are combined")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """As in torch, but every tensor keeps its dtype: torch would cast 8-bit codes to the parameter's.

        Raises:
            UserError: the state of other optimizers or of parameters of other shapes.
        """
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if saved.get("optimizer") != group["optimizer"]:
                kinds = " and ".join(type(optimizer).__name__ for optimizer in self.optimizers)
                raise UserError(
                    f"CombinedOptimizer: this state was not saved by {kinds} combined in this order; build what saved "
                    "it, or start anew"
                )
        check_saved(state_dict, [(kind_of(self.optimizers[g["optimizer"]]), g) for g in self.param_groups])
        super().load_state_dict(dict(state_dict))
        keep_dtypes(self, state_dict)
        self._hand_out()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"optimizers": self.optimizers}


def keep_dtypes(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Give the loaded state of ``optimizer`` the dtypes that it was saved in."""
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in zip(saved, params, strict=True):
        for key, value in state_dict["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                loaded = optimizer.state[parameter]
                loaded[key] = value.to(loaded[key].device, copy=True)
