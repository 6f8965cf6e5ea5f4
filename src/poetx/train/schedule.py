"""Learning rate and clip value as pure functions of the step."""

from __future__ import annotations

import math

from poetx.recipe.sections import OptimizerRecipe, PoetXKeys


def lr_factor(step: int, *, steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Factor on every peak learning rate at 0-based ``step`` of ``steps``.

    Linear warm-up that reaches 1 at the step ``warmup_steps - 1``, then a cosine that reaches ``min_ratio`` at the
    last step.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps + 1) / max(1, steps - warmup_steps)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def clip_value(optimizer: OptimizerRecipe, *, step: int, merges: int, steps_since_merge: int) -> float | None:
    """Largest allowed gradient norm at 0-based ``step``, or None for no clipping.

    After a merge the moments of the rotations are gone and the first steps are noisy, so the value climbs linearly
    from ``clip_ramp_start`` of itself over ``clip_ramp_steps`` steps (docs/method.md, at its end); only in the first
    ``clip_ramp_until`` steps of the run, and not before the first merge.
    """
    if not optimizer.clip:
        return None
    if merges == 0 or not isinstance(optimizer, PoetXKeys):
        return optimizer.clip
    ramp = optimizer.clip_ramp_steps
    if step >= optimizer.clip_ramp_until or steps_since_merge >= ramp:
        return optimizer.clip
    start = optimizer.clip_ramp_start
    return optimizer.clip * (start + (1 - start) * steps_since_merge / ramp)
