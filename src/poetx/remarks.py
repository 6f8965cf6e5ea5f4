"""What a recipe asks for that will have no effect: told when the run starts, since a valid recipe may be overridden."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from poetx.recipe import OptimizerRecipe, PoetRecipe, Recipe

_OF_POET_X = ("poet_lr", "poet_betas", "poet_eps")
_ADAMW = ("betas", "eps")


def remarks(recipe: Recipe) -> list[str]:
    """One line each, for people; empty for most recipes."""
    lines = []
    unused = list(_unused(recipe))
    if unused:
        lines.append(f"without effect in this run: {', '.join(unused)}")
    steps, warmup = recipe.train.steps, recipe.optimizer.warmup_steps
    if warmup >= steps:
        lines.append(
            f"optimizer.warmup_steps={warmup} is not below train.steps={steps}: the learning rate ends at "
            f"{steps / warmup:.0%} of its peak"
        )
    return lines


def _unused(recipe: Recipe) -> Iterator[str]:
    """Dotted names of the settings that were changed from their defaults and that nothing reads."""
    optimizer, poet = recipe.optimizer, recipe.poet
    single_step = poet is not None and poet.config.method == "single-step"
    idle = [] if single_step else ["angle", "norm_growth"]
    if poet is None or single_step:
        idle += _OF_POET_X
    elif optimizer.name != "adamw":
        idle += _OF_POET_X[1:]
    names = {optimizer.base or optimizer.name} if single_step else {optimizer.name, optimizer.base}
    if "adamw" not in names:
        idle += _ADAMW
    if "sgd" not in names:
        idle.append("momentum")
    yield from (f"optimizer.{name}" for name in _changed(optimizer, OptimizerRecipe(), idle))
    if poet is not None:
        idle = ["neumann_order"] if single_step else ["partitions", "partition_kind", "spectrum"]
        yield from (f"poet.{name}" for name in _changed(poet.config, PoetRecipe().config, idle))


def _changed(settings: Any, default: Any, names: list[str]) -> list[str]:
    return [name for name in names if getattr(settings, name) != getattr(default, name)]
