"""OFTv2 (arXiv 2506.19847): the model is frozen, and a rotation of every layer's input is trained."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from torch.optim import Optimizer

from poetx.conversion_report import ConversionReport
from poetx.layers.walk import rotation_ids
from poetx.methods.base import Method, by_module
from poetx.optim.build import build_optimizer
from poetx.optim.groups import param_groups


class OFT(Method):
    """Rotations of blocks of ``poet.block_size`` neighbours, by ``optimizer.name``; nothing else trains."""

    @property
    def title(self) -> str:
        assert self.recipe.poet is not None
        config = self.recipe.poet.config
        return (
            f"OFT {f'{config.weight_format} ' if config.weight_format else ''}b={config.block_size}{by_module(config)}"
        )

    def apply_(self, model: nn.Module) -> ConversionReport | None:
        report = super().apply_(model)
        assert report is not None
        rotations = rotation_ids(model)
        for parameter in model.parameters():
            if id(parameter) not in rotations:
                parameter.requires_grad_(False)
        return dataclasses.replace(report, trainable_parameters=report.rotation_parameters)

    def _optimizer(self, model: nn.Module, steps: int, options: dict[str, Any]) -> Optimizer:
        lr = self.recipe.optimizer.lr
        return build_optimizer(param_groups(model, lr=lr, poet_lr=lr), self.recipe.optimizer.name, **options)
