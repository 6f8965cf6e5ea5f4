"""Optimizers by their names: one for everything, or one for rotations and one for the rest, as one torch optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from poetx.distributed.sharded import refuse_sharded
from poetx.errors import UserError, nearest
from poetx.optim.adamw import AdamW
from poetx.optim.combined import CombinedOptimizer
from poetx.optim.hfac import HFac
from poetx.optim.in_float32 import InFloat32, stepped_as_is
from poetx.optim.saved_kinds import check_own
from poetx.optim.settings import OPTIMIZERS, check_group, check_numbers
from poetx.optim.smmf import SMMF

#: Settings of one optimizer, where none are given.
_USUAL: dict[str, Any] = {
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "eps_mode": "corrected",
    "state_dtype": "auto",
    "momentum": 0.0,
}

_OF_TORCH: dict[str, Any] = {"sgd": torch.optim.SGD, "adafactor": torch.optim.Adafactor}


def build_optimizer(
    groups: Sequence[dict[str, Any]],
    name: str = "adamw",
    *,
    dense_optimizer: str | None = None,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_mode: str = "corrected",
    momentum: float = 0.0,
    state_dtype: str = "auto",
    foreach: bool | None = None,
    base: str | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer ``name`` over ``groups``; if ``dense_optimizer`` is given, that one takes all but rotations.

    Args:
        groups: as :func:`poetx.param_groups` makes them; what a group sets itself goes before the arguments here.
        name: of :data:`poetx.optim.OPTIMIZERS`.
        dense_optimizer: likewise; None: ``name`` takes everything.
        betas: AdamW's.
        eps: AdamW's.
        momentum: SGD's.
        foreach: of torch's AdamW.
        eps_mode: AdamW's; ``"uncorrected"`` is how the POET papers add it (:class:`poetx.optim.AdamW`).
        state_dtype: of AdamW's moments. ``"auto"``: the parameter's, and bfloat16 parameters and their moments are
            rounded stochastically (:class:`poetx.optim.AdamW`): ``torch.optim.AdamW`` rounds to nearest and loses
            every step below half a unit in the last place, so at a rate of 1e-3 a norm's weight never leaves 1.
            So do SGD and Adafactor, whose steps of bfloat16 are made in float32 (:mod:`poetx.optim.in_float32`).
            ``"same"``: the parameter's, by torch's own AdamW. ``"float32"``, ``"bfloat16"``, ``"int8"``.
        base: the former name of ``dense_optimizer``.

    Raises:
        UserError: a name that does not exist, a number outside its range, ``dense_optimizer`` for groups without
            rotations, settings of an optimizer that is not built, sharded parameters. The optimizer refuses to load
            the state of another one.
    """
    if base is not None:
        text = "base= is called dense_optimizer= now and goes with the next release"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        dense_optimizer = dense_optimizer or base

    def ours(chosen: Sequence[dict[str, Any]]) -> bool:
        """Whether AdamW over these groups takes what torch's does not have."""
        if any(group.get("eps_mode", eps_mode) != "corrected" or "state_dtype" in group for group in chosen):
            return True
        narrow = any(p.dtype == torch.bfloat16 for group in chosen for p in group["params"])
        return state_dtype != "same" and (narrow or state_dtype not in ("auto", "float32"))

    def make(kind: str, chosen: Sequence[dict[str, Any]], seed: int) -> torch.optim.Optimizer:
        optimizer = make_kind(kind, chosen, seed)
        for group in chosen:
            for key in sorted(_USUAL.keys() & group.keys() - optimizer.defaults.keys()):
                if group[key] != _USUAL[key]:
                    raise UserError(
                        f"build_optimizer: {key}={group[key]!r} in the group {group.get('name', '')!r} is no setting "
                        f"of {kind}, which steps it, and would have no effect; leave it out"
                    )
        if type(optimizer).__module__.startswith("torch.optim"):
            optimizer.register_load_state_dict_pre_hook(check_own)
        return optimizer

    def make_kind(kind: str, chosen: Sequence[dict[str, Any]], seed: int) -> torch.optim.Optimizer:
        if kind == "adamw" and not ours(chosen):
            return torch.optim.AdamW(chosen, lr=lr, betas=betas, eps=eps, foreach=foreach)
        if kind == "adamw":
            kept = "same" if state_dtype == "auto" else state_dtype
            return AdamW(chosen, lr=lr, betas=betas, eps=eps, eps_mode=eps_mode, state_dtype=kept, seed=seed)
        if kind in _OF_TORCH:
            own = {"lr": lr} | ({"momentum": momentum} if kind == "sgd" else {})
            if kind == "adafactor":
                refuse_sharded((p for group in chosen for p in group["params"]), "Adafactor")
            if stepped_as_is(chosen):
                return _OF_TORCH[kind](chosen, **own)
            return InFloat32(chosen, _OF_TORCH[kind], seed=seed, **own)
        return SMMF(chosen, lr=lr, seed=seed) if kind == "smmf" else HFac(chosen, lr=lr, seed=seed)

    for kind in (name, dense_optimizer or name):
        if kind not in OPTIMIZERS:
            raise UserError(f"optimizer {kind!r}: must be one of {', '.join(OPTIMIZERS)}{nearest(kind, OPTIMIZERS)}")
    check_numbers({"lr": lr, "betas": betas, "eps": eps, "momentum": momentum})
    given = {"betas": betas, "eps": eps, "eps_mode": eps_mode, "state_dtype": state_dtype, "momentum": momentum}
    for key, value in given.items():
        owner = "sgd" if key == "momentum" else "adamw"
        if owner not in (name, dense_optimizer) and value != _USUAL[key]:
            raise UserError(f"build_optimizer: {key}={value!r} is {owner}'s, and would have no effect; leave it out")
    groups = groups if isinstance(groups, Sequence) else list(groups) if isinstance(groups, Iterable) else [groups]
    for group in groups:  # the very groups, not copies: POETX hands out its own
        if not isinstance(group, dict):
            raise UserError(
                f"build_optimizer: groups holds a {type(group).__name__}, not parameter groups; give "
                "poetx.param_groups(model, lr=..., poet_lr=...), or [{'params': model.parameters()}]"
            )
        group["params"] = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
        check_group(group, "build_optimizer")
        refuse_sharded(group["params"], "build_optimizer", rows=True)
    rotations = [group for group in groups if group.get("name") == "rotations"]
    rest = [group for group in groups if group.get("name") != "rotations"]
    if dense_optimizer is None or dense_optimizer == name:
        # float32 rotations beside bfloat16 embeddings: many small tensors, which torch steps all at once.
        differ = name == "adamw" and state_dtype in ("auto", "same") and ours(rotations) != ours(rest)
        if not (rotations and rest and differ):
            return make(name, groups, 0)
    if not rotations:
        raise UserError(
            f"dense_optimizer={dense_optimizer}: the model has no rotations, whose optimizer {name} would be; use "
            f"name={dense_optimizer!r}"
        )
    if not rest:
        return make(name, groups, 0)
    return CombinedOptimizer(make(name, rotations, 0), make(dense_optimizer or name, rest, 1))
