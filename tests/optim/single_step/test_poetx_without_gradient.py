"""Without a gradient nothing moves and nothing is counted, in either form, however the forward pass is run."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers import relative_error
from poetx import POETX, PoetConfig, convert_


class TwoBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12, bias=False)

    def forward(self, x, use_b):
        x = self.a(x).tanh()
        return (self.b(x) if use_b else x).exp().mean()


def run(model, optimizer, steps, *, forward=None):
    """Branch b takes part in every third step only, there with two backward passes."""
    forward = model if forward is None else forward
    for step in steps:
        for part in range(2):
            x = torch.randn(5, 12, generator=torch.Generator().manual_seed(7 * step + part)).to(model.a.weight.dtype)
            forward(x, step % 3 == 0).backward()
        before = model.b.weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(model.b.weight, before) == (step % 3 != 0)


def start(*, converted=True, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    model = TwoBranches().to(dtype)
    narrow = {"rotation_dtype": "bfloat16"} if dtype == torch.float32 else {}
    if not converted:
        return model, POETX(model, block_size=4, **settings)
    update = {"update": settings.pop("update")} if "update" in settings else {}
    convert_(model, PoetConfig(method="single-step", block_size=4, **narrow, **update))
    return model, POETX(model, **settings)


@pytest.mark.parametrize("settings", [{}, {"update": "rotation", "nesterov": False}], ids=str)
def test_both_forms_leave_an_unused_layer_alone(settings):
    models = []
    for converted in (False, True):
        model, optimizer = start(converted=converted, **settings)
        run(model, optimizer, range(7))
        assert [optimizer.state[layer.weight]["step"] for layer in (model.a, model.b)] == [7, 3]
        models.append(model)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert relative_error(q, p) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("how", ["compiled", "checkpointed", "reentrant"])
def test_compilers_and_checkpointing_do_not_hide_a_gradient(how, dtype):
    torch._dynamo.reset()
    model, optimizer = start(dtype=dtype)
    forward = {
        "compiled": torch.compile(model, backend="aot_eager"),
        "checkpointed": lambda x, use_b: checkpoint(model, x, use_b, use_reentrant=False),
        "reentrant": lambda x, use_b: checkpoint(model, x.requires_grad_(), use_b, use_reentrant=True),
    }[how]
    run(model, optimizer, range(5), forward=forward)


def test_a_gradient_left_out_counts_as_zero():
    for converted in (False, True):
        model, optimizer = start(converted=converted)
        run(model, optimizer, range(4))
        before = copy.deepcopy(model.state_dict())
        state = optimizer.state[model.a.weight]
        momentum = state["momentum_in"].clone()
        (model(torch.randn(5, 12, dtype=torch.float64), True) * float("inf")).backward()
        optimizer.step()
        assert torch.equal(model.a.weight, before["a.weight"])
        assert torch.equal(model.b.weight, before["b.weight"])
        assert torch.equal(state["momentum_in"], 0.95 * momentum)


def test_resuming_is_bitwise():
    model, optimizer = start()
    run(model, optimizer, range(9))
    want = copy.deepcopy(model.state_dict())
    model, optimizer = start()
    run(model, optimizer, range(5))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model, optimizer = start()
    model.b(torch.randn(5, 12, dtype=torch.float64)).sum().backward()  # of what the loaded state replaces
    optimizer.load_state_dict(saved[1])
    model.load_state_dict(saved[0])
    run(model, optimizer, range(5, 9))
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())
