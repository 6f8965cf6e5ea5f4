"""torch's own optimizers on bfloat16 parameters: a step in float32, rounded back stochastically."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from poetx.distributed.sharded import is_sharded
from poetx.optim.saved_kinds import kind_of
from poetx.optim.sliced import SlicedOptimizer, compute_dtype, write_

#: State as large as the parameter, which is kept in its dtype, rounded like it.
_NARROW = "momentum_buffer"


class InFloat32(SlicedOptimizer):
    """``kind`` of torch on a float32 copy of one parameter after the other, written back by stochastic rounding.

    torch steps a bfloat16 parameter in bfloat16 and rounds to nearest, which loses whatever is below half a unit in the
    last place. A momentum is kept in bfloat16, rounded in the same way; other state is float32.

    Args:
        optimizer: one that steps parameters one by one: SGD, Adafactor. settings: its own.
    """

    _beta_count = None

    def __init__(self, params: Any, optimizer: type[torch.optim.Optimizer], *, seed: int = 0, **settings: Any) -> None:
        self._optimizer = optimizer
        example: Any = optimizer([nn.Parameter(torch.zeros(1, 1))], **settings)  # pyright: ignore[reportCallIssue]
        self.kind: Any = kind_of(example)
        super().__init__(params, example.defaults, seed=seed)

    def _update(self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        dtype = compute_dtype(parameter)
        copy = nn.Parameter(parameter.to(dtype, copy=True))
        copy.grad = grad.to(dtype)
        one: Any = self._optimizer([group | {"params": [copy]}])  # pyright: ignore[reportCallIssue]
        if len(state) > 1:
            kept = {key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in state.items()}
            one.state[copy] = kept | {"step": torch.tensor(state["step"] - 1.0)}
        one.step()
        noise = self._noise(parameter, state["step"])
        for key, value in one.state[copy].items():
            if key == _NARROW and value is not None:
                state[key] = torch.empty_like(parameter) if state.get(key) is None else state[key]
                write_(state[key], value, noise)
            elif key != "step":
                state[key] = value
        write_(parameter, copy.detach(), noise)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_optimizer": self._optimizer, "kind": self.kind}


def stepped_as_is(groups: Any) -> bool:
    """Whether torch's own optimizer takes these parameters: sharded ones, or none is bfloat16 or without elements."""
    return not any(
        (p.dtype == torch.bfloat16 or not p.numel()) and not is_sharded(p) for group in groups for p in group["params"]
    )
