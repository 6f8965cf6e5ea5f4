"""Whether a saved state is of the optimizer that it is loaded into: torch takes any, and fails at the next step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poetx.distributed.sharded import is_sharded
from poetx.errors import UserError

#: Name in a parameter's state → the shapes that it may have.
Shapes = dict[str, tuple[tuple[int, ...], ...]]


class Kind(NamedTuple):
    """An optimizer as its states show it: a setting that its groups alone have, and what it keeps of a parameter."""

    name: str
    setting: str
    shapes: Callable[[Tensor], Shapes]


def _whole(*names: str) -> Callable[[Tensor], Shapes]:
    return lambda p: dict.fromkeys(names, (tuple(p.shape),))


def _adafactor(p: Tensor) -> Shapes:
    row, column = (*p.shape[:-1], 1), (*p.shape[:-2], 1, *p.shape[-1:])
    return {"row_var": (row,), "col_var": (column,), "variance": (tuple(p.shape),)}


_ADAM = Kind("AdamW of torch", "amsgrad", _whole("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
_OF_TORCH = {
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "SGD": Kind("SGD", "dampening", _whole("momentum_buffer")),
    "Muon": Kind("Muon", "ns_steps", _whole("momentum_buffer")),
    "Adafactor": Kind("Adafactor", "beta2_decay", _adafactor),
}
#: Settings that tell whose a saved group is, for messages.
_TOLD_BY = {"growth": "SMMF", "clip": "HFac"}
_TOLD_BY |= {
    "ends": "AdamW with ends by SCALE",
    "over": "SCALE",
    "iterations": "SinkGD",
    "racs_beta": "RACS",
    "row_momentum": "RMNP",
}
_TOLD_BY |= {"ball_momentum": "MuonHyperball", "subspace_gap": "GaLore", "sketch_gap": "APOLLO"}
_TOLD_BY |= {kind.setting: kind.name for kind in _OF_TORCH.values()} | {"centered": "RMSprop", "rotate": "POETX"}
_TOLD_BY["state_dtype"] = "AdamW of poetx"  # the last: others have it as well
_WITH_STATE_DTYPE = ("over", "row_momentum", "ball_momentum", "subspace_gap", "sketch_gap", "ns_steps")


def kind_of(optimizer: torch.optim.Optimizer | None) -> Kind | None:
    """What is known of an optimizer's states: of ours and of those :func:`poetx.optim.build_optimizer` makes."""
    if type(optimizer).__module__.startswith("torch.optim"):
        return _OF_TORCH.get(type(optimizer).__name__)
    return getattr(optimizer, "kind", None)


def check_saved(
    state_dict: Mapping[str, Any], groups: Sequence[tuple[Kind | None, Mapping[str, Any]]], who: str = ""
) -> None:
    """Raise :class:`UserError` where a saved group or what was kept of a parameter is not of the kind it is here.

    Args:
        groups: those that the state is loaded into, each with the kind of the optimizer that steps it.
        who: begins the message; the kind's name unless given.
    """
    for (kind, group), saved in zip(groups, state_dict["param_groups"], strict=False):
        if kind is None:
            continue
        held = [state_dict["state"].get(number, {}) for number in saved["params"]]
        names = sorted({name for state in held for name in state} - {"step"})
        known = kind.shapes(torch.empty(0, 0, device="meta"))
        a_rival = kind.setting == "state_dtype" and any(setting in saved for setting in _WITH_STATE_DTYPE)
        if a_rival or kind.setting not in saved or any(name not in known for name in names):
            there = next((name for setting, name in _TOLD_BY.items() if setting in saved), "another optimizer")
            keeps = f" (it holds {', '.join(names)})" if names else ""
            raise UserError(
                f"{who or kind.name}: this state was saved by {there}{keeps}, and here {kind.name} steps "
                f"{group.get('name', 'the group')!r}; build that one, or start this one anew"
            )
        for index, (parameter, state) in enumerate(zip(group["params"], held, strict=False)):
            kept = kind.shapes(parameter)
            for name, shapes in kept.items():
                value = state.get(name)
                if not isinstance(value, Tensor):
                    continue
                names = group.get("param_names")
                label = names[index] if names else f"parameter {index} of {group.get('name', 'its group')!r}"
                if is_sharded(value) != is_sharded(parameter):
                    raise UserError(
                        f"{who or kind.name}: the {name} of {label} is {'' if is_sharded(value) else 'not '}sharded, "
                        "unlike the parameter; load it by torch.distributed.checkpoint.state_dict"
                    )
                if not value.is_floating_point() and f"{name}_scale" in kept.keys() - state.keys():
                    raise UserError(
                        f"{who or kind.name}: the {name} of {label} was saved as codes without their {name}_scale; "
                        "the state is damaged, start it anew"
                    )
                if tuple(value.shape) not in shapes:
                    raise UserError(
                        f"{who or kind.name}: the {name} of {label}, which is {tuple(parameter.shape)}, was saved "
                        f"as {tuple(value.shape)}, not {' or '.join(map(str, shapes))}: it is another model's"
                    )


def check_own(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """:func:`check_saved` as a hook that ``register_load_state_dict_pre_hook`` takes."""
    check_saved(state_dict, [(kind_of(optimizer), group) for group in optimizer.param_groups])
