"""The dense baselines: every parameter trains, by one optimizer, or matrices by a rival of POET-X beside AdamW."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from poetx.methods.base import Method
from poetx.optim.baselines.rules import RULES, matrices_and_rest, with_matrix_rate
from poetx.optim.build import build_optimizer
from poetx.optim.groups import param_groups
from poetx.recipe.sections import AdamWKeys, EndKeys, LowRankKeys, MatrixKeys


class Dense(Method):
    """All trainable parameters by ``optimizer.name``, matrices decayed and vectors not."""

    @property
    def title(self) -> str:
        own = self.recipe.optimizer
        dtype = own.state_dtype if isinstance(own, AdamWKeys) else "auto"
        state = f", {dtype} state" if dtype not in ("auto", "same") else ""
        name = RULES[own.name].title if own.name in RULES else own.name
        return f"dense baseline ({name}{state}{', autocast' if self.recipe.train.autocast else ''})"

    def _optimizer(self, model: nn.Module, steps: int, options: dict[str, Any]) -> Optimizer:
        own = self.recipe.optimizer
        groups = param_groups(model, lr=own.lr, poet_lr=own.lr, weight_decay=own.weight_decay)
        assert isinstance(own, MatrixKeys)
        if own.name not in RULES:
            groups = groups if own.matrix_lr is None else with_matrix_rate(model, groups, own.matrix_lr)
            return build_optimizer(groups, own.name, **options)
        low_rank = {"rank": own.rank, "gap": own.subspace_gap} if isinstance(own, LowRankKeys) else {}
        ends = {"end_lr": own.end_lr} if isinstance(own, EndKeys) else {}
        rates = {"lr": own.lr, "matrix_lr": own.matrix_lr, "weight_decay": own.weight_decay}
        return matrices_and_rest(model, groups, own.name, **rates, **ends, rest=options, **low_rank)
