"""Parameter groups: which parameter gets which learning rate, decided by the module that owns it."""

from __future__ import annotations

from typing import Any

from torch import nn

from poetx.distributed.sharded import refuse_sharded
from poetx.errors import UserError
from poetx.layers.walk import poet_layers


def param_groups(
    model: nn.Module, *, lr: float, poet_lr: float, weight_decay: float = 0.0, **poet_options: Any
) -> list[dict[str, Any]]:
    """Groups for any ``torch.optim`` optimizer that cover every trainable parameter exactly once.

    - ``"rotations"``: the packed rotations, ``poet_lr``, never decayed (decay would pull them to the identity,
      which is where every merge puts them anyway); ``poet_options`` (``betas``, ``eps``, …) go here.
    - ``"decay"``: matrices, ``lr`` and ``weight_decay``.
    - ``"no_decay"``: vectors and scalars (norms, biases), ``lr`` and no decay.

    A group with nothing in it is left out. A model that was not converted has no rotations group.

    Raises:
        UserError: the model has no trainable parameter, sharded ones, or a learning rate is not positive.
    """
    refuse_sharded(model.parameters(), "param_groups")
    for name, value in (("lr", lr), ("poet_lr", poet_lr)):
        if not value > 0:
            raise UserError(f"{name}={value!r}: must be positive; freeze parameters with requires_grad_(False)")
    rotations = {id(p): p for _, layer in poet_layers(model) for p in layer.rotations if p.requires_grad}
    frozen = {id(layer.base_weight) for _, layer in poet_layers(model)}  # whatever requires_grad_(True) says
    taken = frozen | set(rotations)
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    groups = [
        {"name": "rotations", "params": list(rotations.values()), "lr": poet_lr, "weight_decay": 0.0} | poet_options,
        {"name": "decay", "params": [p for p in rest if p.ndim >= 2], "lr": lr, "weight_decay": weight_decay},
        {"name": "no_decay", "params": [p for p in rest if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise UserError("the model has no parameter that requires a gradient")
    covered = [id(p) for group in groups for p in group["params"]]
    assert sorted(covered) == sorted(id(p) for p in model.parameters() if p.requires_grad and id(p) not in frozen)
    return groups
