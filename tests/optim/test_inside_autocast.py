"""A step that somebody takes inside an autocast block is the step outside of it, to the bit."""

import pytest
import torch
from torch import nn

from poetx import POETX, PoetConfig, convert_
from poetx.optim import param_groups
from poetx.optim.baselines.rules import matrices_and_rest
from poetx.optim.build import build_optimizer
from poetx.optim.settings import MATRIX_OPTIMIZERS, OPTIMIZERS

SETTINGS = {"lr": 1e-2, "matrix_lr": 1e-2, "weight_decay": 0.0, "rest": {}}


def converted(model):
    convert_(model, PoetConfig(method="single-step", block_size=8))
    return POETX(model)


BUILD = {
    "POETX": lambda model: POETX(model, block_size=8),
    "POETX, rotations": lambda model: POETX(model, block_size=8, update="rotation"),
    "POETX, converted": converted,
}
BUILD |= {  # Adafactor is torch's own, and has a product
    n: lambda m, n=n: build_optimizer(param_groups(m, lr=1e-2, poet_lr=1), n) for n in OPTIMIZERS if n != "adafactor"
}
BUILD |= {
    n: lambda m, n=n: matrices_and_rest(m, param_groups(m, lr=1e-2, poet_lr=1), n, **SETTINGS)
    for n in MATRIX_OPTIMIZERS
}


@pytest.mark.parametrize("name", BUILD)
def test_a_step_inside_is_the_step_outside(name):
    def trained(inside):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 8))
        optimizer = BUILD[name](model)
        for _ in range(3):
            model(torch.randn(6, 12)).square().sum().backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step()
            optimizer.zero_grad()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(trained(True), trained(False))
