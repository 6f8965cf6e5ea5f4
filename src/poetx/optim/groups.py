"""Parameter groups: which parameter gets which learning rate, decided by the module that owns it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from poetx.distributed.sharded import refuse_sharded
from poetx.errors import UserError, nearest
from poetx.layers.walk import check_model, poet_layers, warn_of_one_name
from poetx.optim.settings import check_numbers, known_settings


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
        UserError: the model has no trainable parameter, or some that are not sharded by rows; a learning rate that is
            not positive, another number outside its range, an option that no optimizer of torch or poetx has.
    """
    check_model(model)
    warn_of_one_name(model)
    refuse_sharded(model.parameters(), "param_groups", rows=True)
    for key, value in poet_options.items():
        if key not in known_settings():
            raise UserError(
                f"param_groups: {key}={value!r}: no optimizer of torch or poetx has this setting"
                f"{nearest(key, known_settings()) or '; for another one write it into groups[0] yourself'}"
            )
    if poet_options.get("maximize"):
        raise UserError("param_groups: maximize=True would be of rotations alone, the rest descends; negate the loss")
    check_numbers({"lr": lr, "poet_lr": poet_lr, "weight_decay": weight_decay} | poet_options)
    for name, value in (("lr", lr), ("poet_lr", poet_lr)):
        if not value:
            raise UserError(f"{name}={value!r}: must be positive; freeze parameters with requires_grad_(False)")
    rotations = {id(p): p for _, layer in poet_layers(model) for p in layer.rotations if p.requires_grad}
    frozen = {id(layer.base_weight) for _, layer in poet_layers(model)}  # whatever requires_grad_(True) says
    taken = frozen | set(rotations)
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    first = {"name": "rotations", "params": list(rotations.values()), "lr": poet_lr, "weight_decay": 0.0}
    groups = [first | poet_options, *dense_groups(rest, lr=lr, weight_decay=weight_decay)]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise UserError("the model has no parameter that requires a gradient")
    return groups


def dense_groups(parameters: Iterable[Tensor], *, weight_decay: float | None, **settings: Any) -> list[dict[str, Any]]:
    """Groups ``"decay"`` (matrices) and ``"no_decay"`` (vectors), each if there are any.

    Args:
        weight_decay: of the matrices; None: as the optimizer has it.
    """
    parameters = list(parameters)
    decayed = {} if weight_decay is None else {"weight_decay": weight_decay}
    matrices = {"name": "decay", "params": [p for p in parameters if p.ndim >= 2]} | settings | decayed
    vectors = {"name": "no_decay", "params": [p for p in parameters if p.ndim < 2]} | settings | {"weight_decay": 0.0}
    return [group for group in (matrices, vectors) if group["params"]]
