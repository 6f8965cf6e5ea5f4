"""The paper's form of POET-X, fast, mem or on a quantized weight: rotations that are merged every few hundred steps."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from poetx.merge import merge_every
from poetx.methods.base import Method, by_module
from poetx.optim.build import build_optimizer
from poetx.optim.groups import param_groups
from poetx.recipe.sections import MergedRecipe, PoetXKeys, RotationAdamWKeys


class MergedRotations(Method):
    """Rotations by ``optimizer.name``, everything else by ``optimizer.dense_optimizer`` (the same one unless given)."""

    @property
    def title(self) -> str:
        assert self.recipe.poet is not None
        config = self.recipe.poet.config
        name = "POET, weight-centric" if config.mode == "weight" else f"POET-X {config.weight_format or config.mode}"
        return f"{name} b={config.block_size}{by_module(config)}"

    def _optimizer(self, model: nn.Module, steps: int, options: dict[str, Any]) -> Optimizer:
        own = self.recipe.optimizer
        assert isinstance(own, PoetXKeys)
        rotations: dict[str, Any] = {}
        if isinstance(own, RotationAdamWKeys):
            rotations = {"betas": own.poet_betas, "eps": own.poet_eps}
            if own.poet_eps_mode != "corrected":  # AdamW's own key: torch's groups have none
                rotations["eps_mode"] = own.poet_eps_mode
        groups = param_groups(model, lr=own.lr, poet_lr=own.poet_lr, weight_decay=own.weight_decay, **rotations)
        optimizer = build_optimizer(groups, own.name, dense_optimizer=own.dense_optimizer, **options)
        if (steps_between := self.recipe.merge_every) is not None:
            assert isinstance(self.recipe.poet, MergedRecipe)
            merge_every(optimizer, model, steps=steps_between, angle=self.recipe.poet.merge_angle)
        return optimizer
