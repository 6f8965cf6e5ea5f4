"""What :class:`poetx.POETX` is given, checked and put into parameter groups."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from poetx.config import PoetConfig, name_matches
from poetx.distributed.sharded import is_sharded, refuse_sharded
from poetx.errors import UserError, nearest
from poetx.layers.base import DTYPES, RotatedWeight
from poetx.layers.single_step import SingleStepLinear
from poetx.layers.walk import check_model, poet_layers, single_step_layers, warn_of_one_name
from poetx.optim.groups import dense_groups
from poetx.optim.settings import check_effect, check_group, check_numbers
from poetx.optimizer_restart import refuse_unfit
from poetx.targets import ZERO, find_targets, has_values, is_named_like_an_end, next_to_nothing, norm_per_row

#: Keys of a group of rotated matrices: its own, and those that schedulers write.
_ROTATED_KEYS = (
    "name",
    "params",
    "param_names",
    "rotate",
    "lr",
    "momentum",
    "initial_lr",
    "base_momentum",
    "max_momentum",
)


#: What saves the state of an optimizer that adds nothing to it.
_PLAIN_STATE = torch.optim.Optimizer.state_dict


class Given(NamedTuple):
    """Parameter groups, and what is known of the parameters in them."""

    groups: list[dict[str, Any]]
    layers: dict[Tensor, SingleStepLinear]
    transposed: set[Tensor]  # stored [in, out]
    names: dict[Tensor, str]
    config: PoetConfig  # of parameters without a layer


def read_model(model: Any, settings: dict[str, Any], modules: dict[str, Any], angle: float, decay: Any) -> Given:
    """Groups from a model, from groups, or from parameters with or without names.

    Args:
        settings: what the caller gave of :class:`PoetConfig`, None where nothing; ``modules`` the same of an ordinary
            model alone.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    if isinstance(model, nn.Module):
        layers = dict(single_step_layers(model))
        config = PoetConfig(method="single-step", **given, **modules)
        warn_of_one_name(model)
        refuse_tied(model, layers)
        _check_layers(model, layers, given)
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        groups, transposed = _model_groups(model, layers, config, names, angle, decay)
        trained: dict[Tensor, SingleStepLinear] = {layer.weight: layer for layer in layers.values() if not layer.frozen}
        return Given(groups, trained, transposed, names, config)
    config = PoetConfig(method="single-step", **given)
    if isinstance(model, str) or not hasattr(type(model), "__iter__"):
        check_model(model)
    entries: list[Any] = list(model)
    names = {entry[1]: entry[0] for entry in entries if isinstance(entry, tuple)}
    if entries and all(isinstance(entry, dict) for entry in entries):
        groups = [dict(group, params=list(group["params"])) for group in entries]
    else:
        parameters = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
        groups = _bare_groups(parameters, names, modules["exclude_modules"], angle, decay)
    return Given(_without_zeros(groups, names), {}, set(), names, config)


def _check_layers(model: nn.Module, layers: dict[str, SingleStepLinear], given: dict[str, Any]) -> None:
    for name, other in poet_layers(model):
        if not other.frozen:
            raise UserError(
                f"POETX: {name} was converted with method='poet-x', whose rotations need poetx.param_groups, another "
                "optimizer and merge_every; convert all layers by one method, or freeze this one"
            )
    for name, layer in layers.items():
        if layer.frozen:
            continue
        for key, value in given.items():
            if value != (own := getattr(layer.config, key)):
                raise UserError(
                    f"POETX: {key}={value!r}, but {name} was converted with {own!r}; leave it out, or convert with it"
                )
        if layer.trainer is not None and layer.trainer() is not None:
            raise UserError(
                f"POETX: another one trains {name} already; call its close() first "
                "(a Trainer's is trainer.optimizer.optimizer)"
            )


def refuse_tied(model: nn.Module, layers: dict[str, SingleStepLinear]) -> None:
    """Refuse weights tied to another parameter after ``convert_``, which would get no gradient or be trained twice."""
    rotated = {name: layer for name, layer in layers.items() if not layer.frozen and has_values(layer.weight)}
    memory = {layer.weight.data_ptr(): (name, layer) for name, layer in rotated.items()}
    for place, module in model.named_modules() if memory else ():
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.numel() or not has_values(parameter):
                continue
            name, layer = memory.get(parameter.data_ptr(), ("", module))
            if layer is not module:
                tied = f"{place}.{key}".lstrip(".")
                raise UserError(
                    f"POETX: {tied} is tied to {name}.weight, which rotates; tie them before poetx.convert_, which "
                    "leaves tied weights as they are"
                )


def refuse_sharded_since(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Refuse a model whose parameters ``fully_shard`` has put others in place of since its optimizer was built."""
    if any(is_sharded(p) for group in groups for p in group["params"]):
        return
    if name := next((name for name, p in model.named_parameters() if is_sharded(p)), None):
        raise UserError(
            f"POETX: {name} was sharded after POETX was built, which holds what was there before; build it after "
            "fully_shard"
        )


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
    if layers and not modules:
        raise UserError(
            f"POETX: all {len(layers)} converted layers are frozen, so nothing would be rotated; unfreeze some before "
            "POETX is built, or use torch.optim.AdamW on the rest"
        )
    if not layers:
        refuse_sharded(model.parameters(), "POETX")
        targets = find_targets(model, config, replaced=False)
        modules = list(targets.layers.values())
        zeros: list[Any] = [module for module, reason in targets.reasons.items() if reason == ZERO]
        _say_zeros([names[module.weight] for module in zeros])
    rotated = [module.weight for module in modules]
    ids = {id(p) for p in rotated} | {id(layer.weight) for layer in layers.values()}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    transposed = {m.weight for m in modules if not isinstance(m, (nn.Linear, SingleStepLinear))}  # Conv1D
    return _groups(rotated, rest, angle, decay), transposed


def _groups(
    rotated: Sequence[Tensor], rest: Sequence[Tensor], angle: float, decay: float | None
) -> list[dict[str, Any]]:
    """``"rotated"``, and the rest as :func:`poetx.param_groups` parts it."""
    groups: list[dict[str, Any]] = [{"name": "rotated", "params": rotated, "lr": angle, "rotate": True}]
    return [*groups[: len(rotated)], *dense_groups(rest, weight_decay=decay)]


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
        return p.ndim == 2 and not (is_named_like_an_end(name) or name_matches(name.rpartition(".")[0], exclude))

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
    """Give matrices that no rotation moves to the dense optimizer, as in a model."""
    rotated = [p for group in groups if group.get("rotate") for p in group["params"]]
    norms = {p: norm_per_row(p) for p in rotated if p.ndim >= 2 and p.numel() and has_values(p)}
    zeros = next_to_nothing(norms)
    if not zeros:
        return groups
    _say_zeros([names.get(p, f"a parameter of shape {tuple(p.shape)}") for p in zeros])
    ids = set(map(id, zeros))
    for group in groups:
        if group.get("rotate"):
            group["params"] = [p for p in group["params"] if id(p) not in ids]
    groups = [group for group in groups if group["params"]]
    dense = next((group for group in groups if group.get("name") == "decay"), None)
    if dense is None:
        return [*groups, {"name": "decay", "params": zeros}]
    dense["params"] = [*dense["params"], *zeros]
    return groups


def _say_zeros(names: list[str]) -> None:
    if not names:
        return
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    text = f"POETX: {', '.join(names[:4])}{more}: all zeros, which no rotation moves; the dense optimizer trains them"
    warnings.warn(text, stacklevel=6)


def check_dense(optimizer: Any, groups: list[dict[str, Any]]) -> None:
    """Refuse what ``dense_optimizer`` made where :class:`POETX` could not step it or would lose a part of its state."""
    kind = type(optimizer).__name__
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise UserError(
            f"POETX: dense_optimizer made a {kind}, which is no torch.optim.Optimizer, or only wraps one, as Lookahead "
            "does: what it keeps itself would be in no state_dict; give what is inside"
        )
    refuse_unfit(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).state_dict is not _PLAIN_STATE:
        raise UserError(
            f"POETX: dense_optimizer made a {kind}, which has a state_dict of its own, which POETX would not save; use "
            "an optimizer whose state is by parameter, such as AdamW"
        )
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise UserError(
            f"POETX: dense_optimizer made a {kind} with maximize=True, but matrices descend; negate the loss"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) not in held for group in groups for p in group["params"]):
        raise UserError(
            f"POETX: dense_optimizer made a {kind} that leaves out parameters; it must take the groups it is given, as "
            "lambda groups: torch.optim.AdamW(groups) does"
        )


def check_groups(
    groups: list[dict[str, Any]], layers: Mapping[Tensor, SingleStepLinear], *, own_optimizer: bool
) -> None:
    """Refuse parameters that cannot be rotated, numbers outside their range, and slips in the keys of groups.

    Args:
        layers: whose weights are rotated, which may be sharded by rows.
        own_optimizer: the rest goes to an optimizer of the user's own, which may have keys of its own.
    """
    rotated = [group for group in groups if group.get("rotate")]
    if not rotated:
        known = [key for group in groups for key in group if key != "rotate"]
        guess = next((f" ({key!r} is not)" for key in known if nearest(key, ("rotate",), cutoff=0.8)), "")
        raise UserError(
            f"POETX: no group has 'rotate': True{guess}, so nothing would be rotated; use torch.optim.AdamW"
        )
    for group in groups:
        known = _ROTATED_KEYS if group.get("rotate") else ("rotate",) if own_optimizer else None
        check_group(group, "POETX", known)
        if group.get("rotate"):
            check_effect(group, "POETX", _ROTATED_KEYS)
            if "lr" in group and not group["lr"] < 0.5:
                check_numbers({"angle": group["lr"]})
    for p in itertools.chain.from_iterable(group["params"] for group in rotated):
        refuse_sharded([p], "POETX", rows=p in layers)
        if p.ndim not in (2, 3) or p.dtype not in DTYPES:
            raise UserError(
                f"POETX: cannot rotate a parameter of shape {tuple(p.shape)} and {p.dtype}; matrices (or stacks of "
                "them) in float32 or bfloat16 only"
            )
