"""What :class:`poetx.POETX` is asked to do: checked, and put into parameter groups."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from poetx.config import PoetConfig
from poetx.errors import UserError
from poetx.layers.single_step import SingleStepLinear
from poetx.targets import find_targets

_COPIES = ("before_in_", "before_out_")  # for the look-ahead, where it is on


def settings(
    layers: dict[str, SingleStepLinear], given: dict[str, Any], target_modules: Any, exclude_modules: Any
) -> PoetConfig:
    """Blocks and partitions: as the layers were converted, or as given."""
    given = {key: value for key, value in given.items() if value is not None}
    if not layers:
        given |= {"target_modules": target_modules, "exclude_modules": exclude_modules}
        return PoetConfig(method="single-step", **given)
    config = next(iter(layers.values())).config
    for key, value in given.items():
        if value != getattr(config, key):
            raise UserError(
                f"POETX: {key}={value!r}, but the model was converted with {getattr(config, key)!r}; leave it out, or "
                "convert with it"
            )
    return config


def check(resample_every: int | None, momentum: float, angle: float, norm_growth: float, config: PoetConfig) -> None:
    if resample_every is not None and (
        isinstance(resample_every, bool) or not isinstance(resample_every, int) or resample_every < 1
    ):
        raise UserError(f"resample_every={resample_every!r}: must be a whole number of at least 1")
    if resample_every is not None and config.partition_kind != "random":
        raise UserError("resample_every: structured partitions are fixed; use partition_kind='random' with it")
    if not 0 <= momentum < 1:
        raise UserError(f"momentum={momentum!r}: must be at least 0 and below 1")
    if not 0 < angle < 0.5:
        raise UserError(f"angle={angle!r}: radians a step, between 0 and 0.5 (0.012 is usual)")
    if not 0 <= norm_growth < 1:
        raise UserError(f"norm_growth={norm_growth!r}: at least 0 and below 1 (8 / steps is usual)")


def check_state(saved: dict[str, Any], fresh: dict[str, Tensor]) -> None:
    """Refuse the saved state of one matrix unless its tensors are of the kinds in ``fresh``, its state at the start."""
    copies = {key: fresh[f"momentum_{key.split('_')[1]}"][0] for key in saved if key.startswith(_COPIES)}
    wanted = {"step": 0, **fresh, **copies}
    for key in sorted((wanted | saved).keys() - {"norm", "scale"}):
        there, here = (_kind(kept.get(key)) for kept in (saved, wanted))
        if there != here:
            raise UserError(
                "POETX: this state was saved with other blocks, partitions or momentum_dtype (rotation_dtype): "
                f"{key} is {there} there, {here} here; use the settings it was trained with, or start anew"
            )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor) and value.ndim:
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return "missing" if value is None else "a number"


def model_groups(
    model: nn.Module, layers: dict[str, SingleStepLinear], config: PoetConfig, angle: float, weight_decay: float | None
) -> tuple[list[dict[str, Any]], set[Tensor]]:
    """Groups "rotated", "decay" (matrices) and "no_decay" (vectors); and which rotated weights are stored [in, out]."""
    modules: list[Any] = [layer for layer in layers.values() if not layer.frozen]
    if not layers:
        modules = list(find_targets(model, config, replaced=False).layers.values())
    rotated = [module.weight for module in modules]
    ids = {id(p) for p in rotated} | {id(layer.weight) for layer in layers.values()}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    groups: list[dict[str, Any]] = [{"name": "rotated", "params": rotated, "lr": angle, "rotate": True}]
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups.append({"name": "decay", "params": [p for p in rest if p.ndim >= 2], **decay})
    groups.append({"name": "no_decay", "params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0})
    transposed = {m.weight for m in modules if not isinstance(m, (nn.Linear, SingleStepLinear))}  # Conv1D
    return [group for group in groups if group["params"]], transposed
