"""The kernel of AdamW's step against its plain twin, in the interpreter and on a GPU."""

from __future__ import annotations

import contextlib
import pickle

import pytest
import torch
from torch import nn

from helpers import relative_error
from poetx.errors import UserError
from poetx.ops.dispatch import use_kernels
from poetx.optim import AdamW

pytest.importorskip("triton", reason="the kernels need triton, which exists for Linux only")
from kernel_helpers import compiled_for, interpreted, on_each_generation

on_each = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
#: No multiple of a block of 256 nor of a program's 1024 elements; 4096 and more have narrow state.
SHAPE = (43, 97)


def kernels_on(device: str):
    return interpreted() if device == "cpu" else use_kernels("triton")


def steps(device: str, kernels: contextlib.AbstractContextManager, count: int = 3, **settings):
    dtype = settings.pop("dtype", torch.float32)
    generator = torch.Generator().manual_seed(1)
    parameter = nn.Parameter(torch.randn(SHAPE, generator=generator).to(device, dtype))
    optimizer = AdamW([parameter], lr=1e-2, **settings)
    with kernels:
        for number in range(count):
            gradient = torch.randn(SHAPE, generator=generator) * 4.0**-number
            parameter.grad = gradient.to(device, dtype)
            optimizer.step()
    return parameter.detach().cpu(), {k: v.cpu() for k, v in optimizer.state[parameter].items() if k != "step"}


@on_each
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.3, "eps": 1e-3, "eps_mode": "uncorrected"}])
def test_what_is_not_rounded_is_the_same(settings, device):
    kernel, own = steps(device, kernels_on(device), state_dtype="float32", **settings)
    twin, theirs = steps(device, use_kernels("torch"), state_dtype="float32", **settings)
    assert relative_error(kernel, twin) < 1e-6
    for name in theirs:
        assert relative_error(own[name], theirs[name]) < 1e-6


@on_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", ["bfloat16", "int8"])
def test_what_is_rounded_is_one_of_two_neighbours_and_the_same_every_time(state, dtype, device):
    first = steps(device, kernels_on(device), 1, state_dtype=state, dtype=dtype)
    again = steps(device, kernels_on(device), 1, state_dtype=state, dtype=dtype)
    twin = steps(device, use_kernels("torch"), 1, state_dtype=state, dtype=dtype)
    assert torch.equal(first[0], again[0])
    for name, value in twin[1].items():
        assert torch.equal(first[1][name], again[1][name])
        assert first[1][name].dtype == value.dtype
        if "scale" in name:
            torch.testing.assert_close(first[1][name], value, rtol=1e-5, atol=0)
        elif state == "int8":  # codes that are neighbours
            assert (first[1][name].int() - value.int()).abs().max() <= 1
            assert (first[1][name] == value).float().mean() > 0.4
        else:
            torch.testing.assert_close(first[1][name], value, rtol=2**-7, atol=0)
    torch.testing.assert_close(first[0], twin[0], rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@on_each
def test_parts_are_rounded_as_the_whole(device):
    from poetx.ops.triton import adamw as kernel

    size, numbers = 5000, (0.1, 0.999, 0.001, 0.001, 1e-8, 1.0, 0.01)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(size, generator=generator).to(device)
    tensors = [torch.ones(size, device=device, dtype=torch.bfloat16) for _ in range(3)]
    parts = [tensor.clone() for tensor in tensors]
    with kernels_on(device):
        kernel.step_([kernel.Update(tensors[0], grad, (tensors[1], tensors[2]), None, 7)], numbers, bound=1e30)
        for here in (slice(0, 1701), slice(1701, size)):
            weight, *moments = (tensor[here] for tensor in parts)
            part = kernel.Update(weight, grad[here], tuple(moments), None, 7, here.start)
            kernel.step_([part], numbers, bound=1e30)
    for whole, part in zip(tensors, parts, strict=True):
        assert torch.equal(whole, part)


@on_each
@pytest.mark.parametrize(("state", "close"), [("bfloat16", 0.002), ("int8", 0.01)])
def test_rounding_has_no_bias(state, close, device):
    """The mean of a moment over a thousand small moves, each less than half a step of the state."""
    count = 12 if device == "cpu" else 1000
    parameter = nn.Parameter(torch.zeros(SHAPE, device=device))
    optimizer = AdamW([parameter], lr=0.0, betas=(0.9, 0.999), state_dtype=state)
    with kernels_on(device):
        for _ in range(count):
            parameter.grad = torch.ones(SHAPE, device=device)
            optimizer.step()
    moment = optimizer.state[parameter]["exp_avg_sq"].float()
    if state == "int8":
        moment = (moment / 255) ** 4 * optimizer.state[parameter]["exp_avg_sq_scale"].repeat_interleave(256)[
            : moment.numel()
        ]
    assert float(moment.mean()) == pytest.approx(1 - 0.999**count, rel=close)


@on_each
def test_a_gradient_that_is_not_finite_is_seen_and_a_huge_one_is_bounded(device):
    for bad, finite in ((float("nan"), False), (float("inf"), False), (1e30, True)):
        parameter = nn.Parameter(torch.ones(SHAPE, device=device))
        parameter.grad = torch.zeros(SHAPE, device=device)
        parameter.grad[3, 5] = bad
        with kernels_on(device):
            AdamW([parameter], lr=1e-2, weight_decay=0.0, state_dtype="float32").step()
        assert bool(parameter[3, 5].isfinite()) == finite
        assert parameter.isfinite().sum() == parameter.numel() - (not finite)


#: Norms, rotations with a multiple of 16 elements and without, and one that is more than a program's.
MANY = [(64,), (3, 120), (5000,), (17,), (64, 96), (1025,), (2, 2080)]


def steps_of_many(device: str, alone: bool, **settings):
    """Three steps of parameters of two dtypes and two groups, one of which has no gradient at first."""
    generator = torch.Generator().manual_seed(2)
    dtypes = [torch.bfloat16 if number % 3 == 1 else torch.float32 for number in range(len(MANY))]
    tensors = [torch.randn(shape, generator=generator) for shape in MANY]
    parameters = [nn.Parameter(t.to(device, dtype)) for t, dtype in zip(tensors, dtypes, strict=True)]
    groups = [{"params": parameters[:4]}, {"params": parameters[4:], "lr": 3e-2, "weight_decay": 0.2}]
    optimizer = AdamW(groups, lr=1e-2, **settings)
    with kernels_on(device), pytest.MonkeyPatch.context() as patch:
        if alone:
            patch.setattr("poetx.ops.triton.adamw._LARGEST_OF_MANY", 0)
        for number in range(3):
            for place, parameter in enumerate(parameters):
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = None if place == 2 and not number else gradient.to(parameter)
            optimizer.step()
    states = [{k: v for k, v in optimizer.state[p].items() if k != "step"} for p in parameters]
    return [p.detach().cpu() for p in parameters], [{k: v.cpu() for k, v in state.items()} for state in states]


@on_each
@pytest.mark.parametrize("state", ["float32", "bfloat16", "int8", "same"])
def test_many_in_one_launch_are_each_by_itself(state, device):
    together = steps_of_many(device, False, state_dtype=state)
    alone = steps_of_many(device, True, state_dtype=state)
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    assert all(bool(tensor.isfinite().all()) for tensor in together[0])


@pytest.mark.parametrize("copied", [False, True])
def test_a_parameter_that_is_listed_twice_is_stepped_twice(copied, monkeypatch):
    """One after the other, whatever is restarted; and gradients that have to be copied are not all copied at once."""
    from poetx.ops.triton import adamw as kernel

    found, counts = [], []
    update, step = AdamW._update, kernel.step_

    def counted(updates, *args, **settings):
        counts.append(len(updates))
        step(updates, *args, **settings)

    for at_once in (False, True):
        a, b = (nn.Parameter(torch.linspace(1, 2, 64).view(8, 8)) for _ in range(2))
        optimizer = AdamW([a], state_dtype="float32", betas=(0.5, 0.5), lr=0.1)
        optimizer.param_groups[0]["params"] = [a, b, b]
        optimizer._number_parameters()
        if at_once:
            monkeypatch.setattr(AdamW, "_update", lambda self, *args: (update(self, *args), self._finish()))
        else:
            monkeypatch.setattr(kernel, "step_", counted)
        with interpreted():
            for number in range(4):
                for p in (a, b):
                    p.grad = torch.full((8, 8), 0.5).T if copied else torch.linspace(-1, 2, 64).view(8, 8)
                if number == 2:
                    optimizer.state[b] = {}
                optimizer.step()
        monkeypatch.undo()
        found.append((a.detach(), b.detach()))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert max(counts) == (1 if copied else 2)


def test_few_launches_for_many_parameters(monkeypatch):
    from poetx.ops.triton import adamw as kernel

    grids = []
    plain = kernel.launch
    monkeypatch.setattr(
        kernel, "launch", lambda k, grid, *args, **kw: (grids.append(grid), plain(k, grid, *args, **kw))
    )
    parameters = [nn.Parameter(torch.ones(64, 16)) for _ in range(50)]
    large = nn.Parameter(torch.ones(kernel._LARGEST_OF_MANY))
    for parameter in (*parameters, large):
        parameter.grad = torch.ones_like(parameter)
    optimizer = AdamW([*parameters, large], state_dtype="float32")
    with interpreted(), monkeypatch.context() as patch:
        patch.setattr(kernel, "_step_one", lambda *args: grids.append("large"))
        optimizer.step()
    assert grids == [(50,), "large"]
    assert all(torch.equal(parameter, parameters[0]) for parameter in parameters)
    assert not torch.equal(parameters[0], torch.ones(64, 16))


def test_a_step_that_fails_half_way_takes_what_it_has_counted():
    parameters = [nn.Parameter(torch.ones(64)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    parameters[1].grad = torch.ones(64).to_sparse()
    optimizer = AdamW(parameters, state_dtype="float32")
    with interpreted(), pytest.raises(UserError, match="sparse"):
        optimizer.step()
    assert not torch.equal(parameters[0], torch.ones(64))
    assert torch.equal(parameters[2], torch.ones(64))
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    parameters[1].grad = None
    with interpreted():
        again.step()


@on_each_generation
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("state", ["float32", "bfloat16", "int8"])
def test_it_compiles(state, many, capability):
    parameters = [nn.Parameter(torch.zeros(SHAPE, dtype=torch.bfloat16)) for _ in range(1 + many)]
    for parameter in parameters:
        parameter.grad = torch.zeros(SHAPE, dtype=torch.bfloat16)
    with use_kernels("auto"), compiled_for(capability) as compiled, pytest.MonkeyPatch.context() as patch:
        patch.setattr("poetx.optim.adamw.use_triton", lambda tensor: True)
        AdamW(parameters, state_dtype=state).step()
    assert [kernel.metadata.name for kernel in compiled] == ["adamw_many_kernel" if many else "adamw_kernel"]
