"""No optimizer loses small steps of bfloat16 parameters; torch's own do what torch does, but for the rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from poetx import PoetConfig, convert_
from poetx.optim import param_groups
from poetx.optim.baselines.rules import matrices_and_rest
from poetx.optim.build import build_optimizer
from poetx.optim.in_float32 import InFloat32
from poetx.optim.settings import MATRIX_OPTIMIZERS, OPTIMIZERS

#: Between neighbours in bfloat16, where the weights of these tests are.
ULP = 2.0**-7
STEPS = 30
OF_TORCH = [
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.SGD, {}),
    (torch.optim.Adafactor, {}),
]
EACH = pytest.mark.parametrize(("kind", "settings"), OF_TORCH, ids=["sgd", "plain sgd", "adafactor"])


def moved(name: str, dtype: torch.dtype, lr: float, steps: int) -> torch.Tensor:
    """How far the weight of a layer goes against one constant gradient."""
    model = nn.Sequential(nn.Linear(64, 48)).to(dtype)
    weight = model[0].weight
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        weight.copy_(1.3 + 0.2 * torch.rand(48, 64, generator=draw).bfloat16())
    start = weight.detach().float().clone()
    groups = param_groups(model, lr=lr, poet_lr=lr)
    if name in OPTIMIZERS:
        optimizer = build_optimizer(groups, name)
    else:
        optimizer = matrices_and_rest(model, groups, name, lr=lr, matrix_lr=lr, weight_decay=0.0, rest={})
    gradient = torch.randn(48, 64, generator=draw).bfloat16().to(dtype)
    for _ in range(steps):
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach().float() - start


@pytest.mark.parametrize("name", [*OPTIMIZERS, *MATRIX_OPTIMIZERS])
def test_steps_far_below_what_bfloat16_can_show_move_the_weights_on_average(name: str) -> None:
    step = float(moved(name, torch.float32, 1e-4, STEPS).abs().mean()) / STEPS
    lr = 1e-4 * ULP / 20 / step  # a tenth of what rounding to nearest would need
    want, got = (moved(name, dtype, lr, STEPS) for dtype in (torch.float32, torch.bfloat16))
    assert float(want.abs().mean()) / STEPS < ULP / 10
    assert float((want * got).sum() / want.square().sum()) == pytest.approx(1, abs=0.2)


def stepped(optimizer: Any, parameter: nn.Parameter, gradients: list[torch.Tensor]) -> None:
    for gradient in gradients:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


@EACH
def test_in_float32_it_is_torchs_own_step(kind: Any, settings: dict[str, Any]) -> None:
    gradients = [torch.randn(6, 9) for _ in range(4)]
    start = torch.randn(6, 9)
    one, two = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    stepped(InFloat32([one], kind, lr=0.01, **settings), one, gradients)
    stepped(kind([two], lr=0.01, **settings), two, gradients)
    assert torch.equal(one, two)


@EACH
def test_saved_and_loaded_it_goes_on_to_the_bit_and_takes_what_torchs_own_saved(
    kind: Any, settings: dict[str, Any]
) -> None:
    gradients = [torch.randn(6, 9) for _ in range(6)]
    start = torch.randn(6, 9).bfloat16()

    def make() -> tuple[nn.Parameter, InFloat32]:
        parameter = nn.Parameter(start.clone())
        return parameter, InFloat32([parameter], kind, lr=0.01, seed=3, **settings)

    whole, optimizer = make()
    stepped(optimizer, whole, gradients[:3])
    saved = copy.deepcopy((whole.detach(), optimizer.state_dict()))
    momentum = optimizer.state[whole].get("momentum_buffer")
    assert momentum is None or momentum.dtype == torch.bfloat16
    stepped(optimizer, whole, gradients[3:])
    part, other = make()
    part.data.copy_(saved[0])
    other.load_state_dict(saved[1])
    stepped(other, part, gradients[3:])
    assert torch.equal(whole, part)

    plain = nn.Parameter(start.clone())
    older = kind([plain], lr=0.01, **settings)
    stepped(older, plain, gradients[:3])
    other.load_state_dict(older.state_dict())
    stepped(other, part, gradients[3:])
    assert other.state[part]["step"] == (6 if kind is torch.optim.Adafactor else 3)  # the others count none


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_elements_is_passed_over(name: str) -> None:
    """A layer of one output has an output rotation of none, whose mean torch's Adafactor divides by."""
    model = nn.Sequential(nn.Linear(8, 1))
    convert_(model, PoetConfig(block_size=4))
    optimizer = build_optimizer(param_groups(model, lr=1e-2, poet_lr=1e-2), name)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert model[0].skew_in.any()
