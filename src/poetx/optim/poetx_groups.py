"""What :class:`poetx.POETX` is given, checked and put into parameter groups."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from poetx.config import PoetConfig, name_matches
from poetx.errors import UserError
from poetx.layers.single_step import RotatedWeight, SingleStepLinear
from poetx.layers.walk import single_step_layers
from poetx.targets import ZERO, find_targets

#: Root mean square of a matrix below which rotating it would leave it where it is: R·0·P = 0.
_ZERO = 1e-8
#: Entry of a saved group: the state of its parameters that require no gradient, by name.
_ROTATIONS = "rotations"
#: What data parallelism, compilation and checkpointing put into names.
_WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module")
#: Parts of the names of embeddings and output heads.
_NOT_LINEAR = ("embed", "wte", "wpe", "lm_head")


class Given(NamedTuple):
    """Parameter groups, and what is known of the parameters in them."""

    groups: list[dict[str, Any]]
    layers: dict[Tensor, SingleStepLinear]
    transposed: set[Tensor]  # stored [in, out]
    names: dict[Tensor, str]
    config: PoetConfig


def read_model(model: Any, settings: dict[str, Any], modules: dict[str, Any], angle: float, decay: Any) -> Given:
    """Groups from a model, from groups, or from parameters with or without names.

    Args:
        settings: what the caller gave of :class:`PoetConfig`, None where nothing; ``modules`` the same of an ordinary
            model alone.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    if isinstance(model, nn.Module):
        layers = dict(single_step_layers(model))
        config = _of_layers(layers, given) if layers else PoetConfig(method="single-step", **given, **modules)
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        groups, transposed = _model_groups(model, layers, config, names, angle, decay)
        trained: dict[Tensor, SingleStepLinear] = {layer.weight: layer for layer in layers.values() if not layer.frozen}
        return Given(_without_zeros(groups, names), trained, transposed, names, config)
    config = PoetConfig(method="single-step", **given)
    entries = list(model)
    names = {entry[1]: entry[0] for entry in entries if isinstance(entry, tuple)}
    if entries and all(isinstance(entry, dict) for entry in entries):
        groups = [dict(group, params=list(group["params"])) for group in entries]
    else:
        parameters = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
        groups = _bare_groups(parameters, names, modules["exclude_modules"], angle, decay)
    return Given(_without_zeros(groups, names), {}, set(), names, config)


def _of_layers(layers: dict[str, SingleStepLinear], given: dict[str, Any]) -> PoetConfig:
    config = next(iter(layers.values())).config
    for key, value in given.items():
        if value != getattr(config, key):
            raise UserError(
                f"POETX: {key}={value!r}, but the model was converted with {getattr(config, key)!r}; leave it out, or "
                "convert with it"
            )
    for name, layer in layers.items():
        if layer.trainer is not None and layer.trainer() is not None and not layer.frozen:
            raise UserError(f"POETX: another one trains {name} already; call its close() first")
    return config


def _model_groups(
    model: nn.Module,
    layers: dict[str, SingleStepLinear],
    config: PoetConfig,
    names: dict[Tensor, str],
    angle: float,
    decay: float | None,
) -> tuple[list[dict[str, Any]], set[Tensor]]:
    """Groups "rotated", "decay" (matrices) and "no_decay" (vectors); and which rotated weights are stored [in, out]."""
    modules: list[Any] = [layer for layer in layers.values() if not layer.frozen]
    if not layers:
        targets = find_targets(model, config, replaced=False)
        modules = list(targets.layers.values())
        zeros: list[Any] = [module for module, reason in targets.reasons.items() if reason == ZERO]
        if zeros:
            _say_zeros([names[module.weight] for module in zeros])
    rotated = [module.weight for module in modules]
    ids = {id(p) for p in rotated} | {id(layer.weight) for layer in layers.values()}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    transposed = {m.weight for m in modules if not isinstance(m, (nn.Linear, SingleStepLinear))}  # Conv1D
    return _groups(rotated, rest, angle, decay), transposed


def _groups(
    rotated: Sequence[Tensor], rest: Sequence[Tensor], angle: float, decay: float | None
) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [{"name": "rotated", "params": rotated, "lr": angle, "rotate": True}]
    decayed = {} if decay is None else {"weight_decay": decay}
    groups.append({"name": "decay", "params": [p for p in rest if p.ndim >= 2], **decayed})
    groups.append({"name": "no_decay", "params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _bare_groups(
    parameters: list[Any], names: dict[Tensor, str], exclude: Any, angle: float, decay: float | None
) -> list[dict[str, Any]]:
    """As for a model, as far as parameters alone can tell: matrices are rotated, by their names not embeddings."""
    if not all(isinstance(p, Tensor) for p in parameters):
        raise UserError("POETX: give a model, its parameters, or parameter groups")
    if any(isinstance(p, RotatedWeight) for p in parameters):
        raise UserError("POETX: these are parameters of a converted model, whose layers feed POETX; give the model")

    def rotates(p: Tensor) -> bool:
        name = names.get(p, "")
        outside = any(part in name.lower() for part in _NOT_LINEAR) or name_matches(name.rpartition(".")[0], exclude)
        return p.ndim == 2 and not outside

    trained = [p for p in parameters if p.requires_grad]
    if not names:
        warnings.warn(
            f"POETX: bare parameters do not tell embeddings and output heads from layers, so all "
            f"{sum(map(rotates, trained))} matrices are rotated; give the model: POETX(model)",
            stacklevel=4,
        )
    rotated = [p for p in trained if rotates(p)]
    return _groups(rotated, [p for p in trained if not rotates(p)], angle, decay)


def _without_zeros(groups: list[dict[str, Any]], names: dict[Tensor, str]) -> list[dict[str, Any]]:
    """Matrices of zeros, which no rotation moves, go to the dense optimizer."""

    def is_zero(p: Tensor) -> bool:
        if p.is_meta or p.ndim < 2 or not p.numel() or isinstance(p, RotatedWeight) or type(p.detach()) is not Tensor:
            return False
        norms = torch.linalg.vector_norm(p.detach(), dim=(-2, -1), dtype=torch.float64)
        return bool((norms < _ZERO * (p.shape[-2] * p.shape[-1]) ** 0.5).any())

    zeros = []
    for group in groups:
        if group.get("rotate"):
            found = {id(p) for p in group["params"] if is_zero(p)}
            zeros += [p for p in group["params"] if id(p) in found]
            group["params"] = [p for p in group["params"] if id(p) not in found]
    if not zeros:
        return groups
    _say_zeros([names.get(p, f"a parameter of shape {tuple(p.shape)}") for p in zeros])
    groups = [group for group in groups if group["params"]]
    dense = next((group for group in groups if group.get("name") == "decay"), None)
    if dense is None:
        return [*groups, {"name": "decay", "params": zeros}]
    dense["params"] = [*dense["params"], *zeros]
    return groups


def _say_zeros(names: list[str]) -> None:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    text = f"POETX: {', '.join(names[:4])}{more}: all zeros, which no rotation moves; the dense optimizer trains them"
    warnings.warn(text, stacklevel=6)


def check(momentum: float, angle: float, norm_growth: float) -> None:
    """Raise :class:`UserError` on numbers outside their range."""
    if not 0 <= momentum < 1:
        raise UserError(f"momentum={momentum!r}: must be at least 0 and below 1")
    if not 0 < angle < 0.5:
        raise UserError(f"angle={angle!r}: radians a step, between 0 and 0.5 (0.012 is usual)")
    if not 0 <= norm_growth < 1:
        raise UserError(f"norm_growth={norm_growth!r}: at least 0 and below 1 (8 / steps is usual)")


def check_parameters(groups: list[dict[str, Any]]) -> None:
    """Raise :class:`UserError` on parameters that cannot be rotated."""
    tensors = sys.modules.get("torch.distributed.tensor")
    if not any(group.get("rotate") for group in groups):
        raise UserError("POETX: no group has 'rotate': True, so nothing would be rotated; use torch.optim.AdamW")
    for p in itertools.chain.from_iterable(group["params"] for group in groups if group.get("rotate")):
        if tensors is not None and isinstance(p, tensors.DTensor):
            raise UserError(
                f"POETX: a parameter of shape {tuple(p.shape)} is a DTensor; a block is rotated as a whole, so sharded "
                "weights are not supported; use DistributedDataParallel"
            )
        if p.ndim not in (2, 3) or p.dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise UserError(
                f"POETX: cannot rotate a parameter of shape {tuple(p.shape)} and {p.dtype}; matrices (or stacks of "
                "them) in float32 or bfloat16 only"
            )


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
    for key in sorted(fresh.keys() | state.keys()):
        there, here = (_kind(kept.get(key)) for kept in (state, fresh))
        if there != here and not (key == "before" and there == "missing"):
            raise UserError(
                f"POETX: the state of {name} was saved with other blocks, partitions or momentum_dtype "
                f"(rotation_dtype): {key} is {there} there, {here} here; use the settings it was trained with, or "
                "start anew"
            )
    return state


def _kind(value: Any) -> str:
    if isinstance(value, Tensor) and value.ndim:
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return "missing" if value is None else "a number"


def batches(matrices: Iterable[Any], elements: int) -> Iterable[list[Any]]:
    """Matrices of one kind whose blocks go through one batched iteration: of so many elements, or one matrix."""
    kinds: dict[tuple[Any, ...], list[Any]] = {}
    for matrix in matrices:
        side, p = matrix.side, matrix.parameter
        kinds.setdefault((side, matrix.sizes(side)[1], p.dtype, p.device), []).append(matrix)
    for alike in kinds.values():
        batch, size = [], 0
        for matrix in alike:
            more = matrix.blocks(matrix.side) * matrix.sizes(matrix.side)[1] ** 2
            if batch and size + more > elements:
                yield batch
                batch, size = [], 0
            batch.append(matrix)
            size += more
        yield batch
