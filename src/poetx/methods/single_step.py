"""Single-step POET-X: layers whose backward feeds a momentum, folded at every step by :class:`poetx.POETX`."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from poetx.methods.base import Method, by_module
from poetx.optim.baselines.ends import ScaledEnds
from poetx.optim.baselines.rules import OF_ENDS, ends_of
from poetx.optim.build import build_optimizer
from poetx.optim.single_step.optimizer import POETX
from poetx.recipe.sections import EndKeys, SingleStepKeys


class SingleStep(Method):
    """Matrices by POETX, everything else by ``optimizer.name``: ``scale`` for embedding and head alone."""

    @property
    def acts_in_backward(self) -> bool:
        return True

    @property
    def title(self) -> str:
        assert self.recipe.poet is not None
        config = self.recipe.poet.config
        return f"single-step POET-X {config.mode} b={config.block_size}, {config.update}{by_module(config)}"

    @property
    def without_norm(self) -> str:
        return "rotated matrices, whose step does not depend on the size of their gradient (poet.method=single-step)"

    def _optimizer(self, model: nn.Module, steps: int, options: dict[str, Any]) -> Optimizer:
        own = self.recipe.optimizer
        assert isinstance(own, SingleStepKeys)

        def of_the_rest(groups: list[dict[str, Any]]) -> Optimizer:
            if own.name != "scale":
                return build_optimizer(groups, own.name, **options)
            ends = {key: OF_ENDS["scale", end] for key, end in ends_of(model).items()}
            assert isinstance(own, EndKeys)
            return ScaledEnds(groups, ends=ends, rest=options, ratio=(own.end_lr or own.lr) / own.lr)

        return POETX(
            model,
            own.lr,
            angle=own.angle,
            norm_growth=own.norm_growth / steps,
            momentum=own.poet_momentum,
            nesterov=own.nesterov,
            weight_decay=own.weight_decay,
            dense_optimizer=of_the_rest,
        )
