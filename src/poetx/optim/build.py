"""One door to the optimizers: one by its name, or two, rotations and everything else, behind one torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from poetx.errors import UserError, nearest
from poetx.optim.adamw import AdamW
from poetx.optim.hfac import HFac
from poetx.optim.sliced import keep_dtypes
from poetx.optim.smmf import SMMF

OPTIMIZERS = ("adamw", "sgd", "adafactor", "smmf", "hfac")


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers as one: one ``step()``, one ``param_groups``, one ``state`` and one ``state_dict``.

    So whatever is made for one optimizer works on all of them: schedulers, :func:`poetx.merge_every` (which resets the
    state of rotations alone), :func:`poetx.optim.release_gradients`, checkpoints. Each group says in ``"optimizer"``
    which of them steps it.

    Raises:
        UserError: a group added later; ValueError: a parameter that two of them hold.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        groups = [group | {"optimizer": i} for i, o in enumerate(optimizers) for group in o.param_groups]
        self.optimizers: tuple[torch.optim.Optimizer, ...] = ()
        super().__init__([{"params": group["params"]} for group in groups], {})
        self.optimizers, self.param_groups = optimizers, groups
        self._share()

    def _share(self) -> None:
        for optimizer in self.optimizers:
            optimizer.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Every optimizer's step, on the groups that are its own."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, optimizer in enumerate(self.optimizers):
            # Now, not once: whoever replaced the groups for a while (released gradients do) means these.
            optimizer.param_groups = [group for group in self.param_groups if group["optimizer"] == index]
            if optimizer.param_groups:
                optimizer.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.optimizers:
            raise UserError("CombinedOptimizer: add groups to its optimizers before they are combined")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """As in torch, but every tensor keeps its dtype: torch would cast 8-bit codes to the parameter's."""
        super().load_state_dict(dict(state_dict))
        self._share()
        keep_dtypes(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"optimizers": self.optimizers}


def build_optimizer(
    groups: Sequence[dict[str, Any]],
    name: str = "adamw",
    *,
    base: str | None = None,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.0,
    state_dtype: str = "auto",
    foreach: bool | None = None,
) -> torch.optim.Optimizer:
    """The optimizer ``name`` over ``groups``, with ``base`` for all of them but the rotations if that is given.

    Args:
        groups: as :func:`poetx.param_groups` makes them; what a group sets itself goes before the arguments here.
        name, base: of :data:`OPTIMIZERS`.
        betas, eps: AdamW's. momentum: SGD's. foreach: of torch's AdamW.
        state_dtype: of AdamW's moments. ``"auto"``: the parameter's, and bfloat16 parameters and their moments are
            rounded stochastically (:class:`poetx.optim.AdamW`): ``torch.optim.AdamW`` rounds to nearest and loses
            every step below half a unit in the last place, so at a rate of 1e-3 a norm's weight never leaves 1.
            ``"same"``: the parameter's, by torch's own AdamW. ``"float32"``, ``"bfloat16"``, ``"int8"``.

    Raises:
        UserError: a name that does not exist, or ``base`` for groups without rotations.
    """

    def make(kind: str, chosen: Sequence[dict[str, Any]], seed: int) -> torch.optim.Optimizer:
        if kind not in OPTIMIZERS:
            raise UserError(f"optimizer {kind!r}: must be one of {', '.join(OPTIMIZERS)}{nearest(kind, OPTIMIZERS)}")
        if kind == "adamw" and (state_dtype == "same" or (state_dtype in ("auto", "float32") and not _narrow(chosen))):
            return torch.optim.AdamW(chosen, lr=lr, betas=betas, eps=eps, foreach=foreach)
        if kind == "adamw":
            kept = "same" if state_dtype == "auto" else state_dtype
            return AdamW(chosen, lr=lr, betas=betas, eps=eps, state_dtype=kept, seed=seed)
        if kind == "sgd":
            return torch.optim.SGD(chosen, lr=lr, momentum=momentum)
        if kind == "adafactor":
            return torch.optim.Adafactor(chosen, lr=lr)
        return SMMF(chosen, lr=lr, seed=seed) if kind == "smmf" else HFac(chosen, lr=lr, seed=seed)

    for group in groups:  # the very groups, not copies: POETX hands out its own
        group["params"] = list(group["params"])
    rotations = [group for group in groups if group.get("name") == "rotations"]
    rest = [group for group in groups if group.get("name") != "rotations"]
    if base is None or base == name:
        # float32 rotations beside bfloat16 embeddings: many small tensors, which torch steps all at once.
        differ = name == "adamw" and state_dtype == "auto" and _narrow(rotations) != _narrow(rest)
        if not (rotations and rest and differ):
            return make(name, groups, 0)
    if not rotations:
        raise UserError(f"base={base}: the model has no rotations, whose optimizer {name} would be; use name={base!r}")
    return CombinedOptimizer(make(name, rotations, 0), make(base or name, rest, 1)) if rest else make(name, groups, 0)


def _narrow(groups: Sequence[dict[str, Any]]) -> bool:
    return any(p.dtype == torch.bfloat16 for group in groups for p in group["params"])
