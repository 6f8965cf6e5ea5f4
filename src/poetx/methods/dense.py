"""The dense baselines: every parameter trains, by AdamW, SGD, Adafactor, SMMF, HFac, or by Muon beside AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from poetx.methods.base import Method, end_weights
from poetx.optim.build import CombinedOptimizer, build_optimizer
from poetx.optim.groups import param_groups
from poetx.recipe.sections import AdamWKeys, MuonKeys


class Dense(Method):
    """All trainable parameters by ``optimizer.name``, matrices decayed and vectors not."""

    @property
    def title(self) -> str:
        own = self.recipe.optimizer
        dtype = own.state_dtype if isinstance(own, AdamWKeys) else "auto"
        state = f", {dtype} state" if dtype not in ("auto", "same") else ""
        return f"dense baseline ({own.name}{state}{', autocast' if self.recipe.train.autocast else ''})"

    def _optimizer(self, model: nn.Module, steps: int, options: dict[str, Any]) -> Optimizer:
        own = self.recipe.optimizer
        groups = param_groups(model, lr=own.lr, poet_lr=own.lr, weight_decay=own.weight_decay)
        if not isinstance(own, MuonKeys):
            return build_optimizer(groups, own.name, **options)
        return muon(model, groups, lr=own.muon_lr or own.lr, weight_decay=own.weight_decay, rest=options)


def muon(
    model: nn.Module, groups: list[dict[str, Any]], *, lr: float, weight_decay: float, rest: dict[str, Any]
) -> Optimizer:
    """``torch.optim.Muon`` on the matrices between embedding and head, AdamW on those two and on vectors.

    Muon's steps are scaled to the size of AdamW's (``adjust_lr_fn="match_rms_adamw"``), so rates can be compared.

    Args:
        groups: of :func:`poetx.param_groups`. lr, weight_decay: Muon's. rest: AdamW's settings.
    """
    ends = {id(p) for p in end_weights(model)}
    matrices = [p for group in groups for p in group["params"] if p.ndim == 2 and id(p) not in ends]
    taken = {id(p) for p in matrices}
    left = [group | {"params": [p for p in group["params"] if id(p) not in taken]} for group in groups]
    left = [group for group in left if group["params"]]
    own = [{"name": "matrices", "params": matrices, "lr": lr, "weight_decay": weight_decay}]
    first = torch.optim.Muon(own, adjust_lr_fn="match_rms_adamw")
    return CombinedOptimizer(first, build_optimizer(left, "adamw", **rest)) if left else first
