"""LoRA by peft: the model is frozen, and every linear layer of attention and MLP gets two thin trained matrices."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from poetx.errors import UserError, one_line
from poetx.methods.base import Method
from poetx.ops.random import seeded
from poetx.optim.build import build_optimizer
from poetx.optim.groups import param_groups


class LoRA(Method):
    """Adapters of ``lora.rank`` in the model's dtype, by ``optimizer.name``; everything else stays as it is."""

    @property
    def title(self) -> str:
        assert self.recipe.lora is not None
        return f"LoRA rank {self.recipe.lora.rank}"

    def apply_(self, model: nn.Module) -> None:
        peft, own = _peft(), self.recipe.lora
        assert own is not None
        config = peft.LoraConfig(
            r=own.rank,
            lora_alpha=own.alpha if own.alpha is not None else 2 * own.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        start = next(model.parameters()).device
        with seeded(self.recipe.train.seed, start), torch.device(start):
            try:
                peft.inject_adapter_in_model(config, model)
            except ValueError as error:  # architectures whose layers it does not adapt
                raise UserError(f"lora: {one_line(error)}; train this model by another method") from None

    def to_dense_(self, model: nn.Module) -> None:
        _peft()
        from peft.tuners.lora import LoraLayer  # pyright: ignore[reportMissingImports]

        adapters = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        for layer in adapters.values():
            cast(Any, layer).merge(safe_merge=True)
        for name, layer in adapters.items():
            if name.rpartition(".")[0] not in adapters:  # a module of several matrices (experts) has nested adapters
                model.set_submodule(name, layer.get_base_layer())
        for attribute in ("peft_config", "_hf_peft_config_loaded"):  # transformers would save adapters only
            vars(model).pop(attribute, None)

    def _optimizer(self, model: nn.Module, steps: int, options: dict[str, Any]) -> Optimizer:
        own = self.recipe.optimizer
        groups = param_groups(model, lr=own.lr, poet_lr=own.lr, weight_decay=own.weight_decay)
        return build_optimizer(groups, own.name, **options)


def _peft() -> Any:
    try:
        import peft  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("lora: needs peft; pip install 'poetx[peft]'") from None
    return peft
