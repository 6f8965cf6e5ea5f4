"""The state of :class:`poetx.POETX` as it is saved: for torch.distributed.checkpoint, and as older versions had it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poetx.errors import UserError

#: Entry of a saved group: the state of its parameters that require no gradient, by name.
_ROTATIONS = "rotations"
#: What data parallelism, compilation and checkpointing put into names.
_WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module")


def state_into_groups(state_dict: dict[str, Any], names: list[dict[int, str]]) -> dict[str, Any]:
    """A plain ``state_dict`` with the state of some parameters in their group, by name.

    ``torch.distributed.checkpoint`` saves the state of parameters that require no gradient, but restores it never;
    what is in a group it restores.

    Args:
        names: of every group, index and name of these parameters.
    """
    state, groups = dict(state_dict["state"]), []
    for group, names_here in zip(state_dict["param_groups"], names, strict=True):
        rotations = {name: state.pop(index) for index, name in _unwrapped(names_here).items()}
        groups.append(group | {_ROTATIONS: rotations} if rotations else group)
    return {**state_dict, "state": state, "param_groups": groups}


def state_from_groups(state_dict: dict[str, Any], names: list[list[str]]) -> dict[str, Any]:
    """The inverse, for parameters of these names by group; plain ones of older versions come back as they are.

    Raises:
        UserError: ``torch.distributed.checkpoint`` left out the state of a parameter.
    """
    state, groups = dict(state_dict["state"]), []
    for group, names_here in zip(state_dict["param_groups"], names, strict=False):
        rotations = group.get(_ROTATIONS, {})
        names_of = _unwrapped(dict(zip(group["params"], names_here, strict=False)))
        lacking = {i: name for i, name in names_of.items() if not state.get(i)}
        by_name = any(isinstance(i, str) for i in lacking)  # as torch.distributed.checkpoint gives them, not in order
        if not by_name and rotations.keys() != set(lacking.values()) and len(rotations) == len(lacking):
            rotations = dict(zip(lacking.values(), rotations.values(), strict=True))
        for i, name in lacking.items():
            if name in rotations:
                state[i] = rotations[name]
            elif by_name and (i in state or group.get("rotate")):
                raise UserError(
                    f"POETX: torch.distributed.checkpoint gave no state for {i}, which would lose its momentum; "
                    "save and load with this version of poetx, the same modules, and flatten_optimizer_state_dict=False"
                )
        groups.append({key: value for key, value in group.items() if key != _ROTATIONS})
    return {**state_dict, "state": state, "param_groups": [*groups, *state_dict["param_groups"][len(groups) :]]}


def _unwrapped(names: dict[Any, str]) -> dict[Any, str]:
    """Names as they are without wrappers, if that keeps them apart."""
    short = {i: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for i, name in names.items()}
    return short if len(set(short.values())) == len(short) else names


def current_entries(saved: dict[str, Any], fresh: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The saved state of one matrix under the names and in the shapes of ``fresh``, its state at the start.

    Older versions had a first dimension of partitions, a look-ahead named after its side, and a step without tensor.

    Raises:
        UserError: its tensors are of another kind.
    """
    state = dict(saved)
    for side in ("in", "out"):
        if f"before_{side}_0" in state:
            before = state.pop(f"before_{side}_0").flatten()
            if "before" in fresh:
                state["before"] = torch.nn.functional.pad(before, (0, fresh["before"].numel() - before.numel()))
        momentum = state.get(f"momentum_{side}")
        if isinstance(momentum, Tensor) and momentum.ndim > fresh[f"momentum_{side}"].ndim and momentum.shape[0] == 1:
            state[f"momentum_{side}"] = momentum[0]
    if isinstance(state.get("step"), (int, float)):
        state["step"] = torch.tensor(int(state["step"]))
    if "before" in state and "before" not in fresh:  # the look-ahead is off now
        del state["before"]
    for key in ("norm", "scale"):
        state.setdefault(key, fresh[key])
    kinds = [(key, _kind(state.get(key)), _kind(fresh.get(key))) for key in sorted(fresh.keys() | state.keys())]
    for key, there, here in kinds:
        if there == here or (key == "before" and there == "missing"):
            continue
        if _update(saved) != _update(fresh):
            raise UserError(
                f"POETX: the state of {name} was saved with update={_update(saved)!r}, and this one has "
                f"update={_update(fresh)!r}; use the update it was trained with, or start anew"
            )
        raise UserError(
            f"POETX: the state of {name} was saved with other blocks, partitions or momentum_dtype (rotation_dtype): "
            f"{key} is {there} there, {here} here; use the settings it was trained with, or start anew"
        )
    return state


def _update(state: dict[str, Any]) -> str:
    """Which ``update`` a momentum is of: packed rotations, or blocks."""
    blocks = [q for side in ("in", "out") if isinstance(q := state.get(f"momentum_{side}"), Tensor)]
    square = blocks and all(q.ndim >= 3 and q.shape[-1] == q.shape[-2] > 1 for q in blocks)
    return "free" if square else "rotation"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor) and value.ndim:
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return "missing" if value is None else "a number"
