"""Moments in narrow numbers: what each optimizer keeps, how far that is from float32, states on disk."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from builders import Tiny
from poetx.errors import UserError
from poetx.methods import convert_model, method_of
from poetx.models import build_model
from poetx.optim import AdamW, moments
from poetx.optim.baselines.base import moving_average
from poetx.optim.baselines.hyperball import MuonHyperball
from poetx.optim.baselines.low_rank import Apollo, GaLore
from poetx.optim.baselines.muon import Muon
from poetx.optim.baselines.normalized import RMNP, Scale

SHAPE = (64, 96)
KEEPS_MOMENTS: dict[str, Callable[..., Any]] = {
    "scale": lambda p, **s: Scale(p, 0.02, momentum=0.9, **s),
    "rmnp": lambda p, **s: RMNP(p, 0.02, **s),
    "muon": lambda p, **s: Muon(p, 0.02, **s),
    "hyperball": lambda p, **s: MuonHyperball(p, 0.02, **s),
    "galore": lambda p, **s: GaLore(p, 0.02, rank=48, **s),
    "fira": lambda p, **s: GaLore(p, 0.02, rank=48, residual=True, **s),
    "apollo": lambda p, **s: Apollo(p, 0.02, rank=48, **s),
}


def gradients(number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(SHAPE, generator=generator)
    return [mean + torch.randn(SHAPE, generator=generator) for _ in range(number)]


def started() -> nn.Parameter:
    return nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))


def run(optimizer: Any, parameter: nn.Parameter, grads: list[torch.Tensor]) -> None:
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", KEEPS_MOMENTS)
def test_narrow_moments_are_small_and_move_the_weight_alike(name: str, kind: str) -> None:
    moved, held = {}, {}
    for each in ("float32", kind):
        parameter = started()
        optimizer = KEEPS_MOMENTS[name]([parameter], state_dtype=each)
        run(optimizer, parameter, gradients(20))
        moved[each] = (parameter - started()).detach()
        state = optimizer.state[parameter]
        held[each] = sum(v.numel() * v.element_size() for k, v in state.items() if "mom" in k or "exp" in k)
    assert held[kind] <= held["float32"] * {"bfloat16": 0.5, "int8": 0.255}[kind]
    error = (moved[kind] - moved["float32"]).norm() / moved["float32"].norm()
    assert error < {"bfloat16": 0.02, "int8": 0.1}[kind]


@pytest.mark.parametrize("name", KEEPS_MOMENTS)
def test_saved_and_loaded_codes_go_on_to_the_bit(name: str) -> None:
    straight, resumed = started(), started()
    grads = gradients(6)
    run(KEEPS_MOMENTS[name]([straight], state_dtype="int8"), straight, grads)
    first = KEEPS_MOMENTS[name]([resumed], state_dtype="int8")
    run(first, resumed, grads[:3])
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = KEEPS_MOMENTS[name]([resumed], state_dtype="int8")
    second.load_state_dict(torch.load(buffer))
    run(second, resumed, grads[3:])
    assert torch.equal(straight, resumed)


@pytest.mark.parametrize("squared", [False, True])
def test_a_moving_average_of_codes_has_the_right_mean(squared: bool) -> None:
    """Rounded stochastically, so over many seeds the mean is that of float64, though 0.1 % moves no code by itself."""
    beta, value = 0.999, torch.linspace(0.1, 1, 1024)
    start, total = torch.full((1024,), 0.5), torch.zeros(1024, dtype=torch.float64)
    for seed in range(200):
        state: dict[str, Any] = {}
        noise = torch.Generator().manual_seed(seed)
        moments.start_(state, "m", start, torch.uint8 if squared else torch.int8)
        moments.store_(state, "m", slice(0, 1024), start, noise)
        for _ in range(20):
            moving_average(state, "m", value, beta, torch.int8, noise, squared=squared)
        total += moments.load(state, "m", slice(0, 1024), torch.float64) / 200
    decayed = beta**20
    expected = decayed * start.double() + (1 - decayed) * value.double() ** (2 if squared else 1)
    assert (total - expected).abs().mean() < 2e-3


def test_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"state_dtype='int4': must be one of same, float32, bfloat16, int8.*int8"):
        Muon([started()], state_dtype="int4")
    with pytest.raises(UserError, match="state_dtype=8: must be one of"):
        Scale([{"params": [started()], "state_dtype": 8}])


@pytest.mark.parametrize("method", ["muon", "scale", "galore", "single-step optimizer.name=scale"])
def test_a_recipe_asks_for_them(tiny: Tiny, method: str) -> None:
    held = {}
    for kind in ("auto", "bfloat16", "int8"):
        wide = "model.hidden_size=64 model.intermediate_size=96"
        recipe = tiny(*f"{wide} method={method} optimizer.state_dtype={kind} train.dtype=float32".split())
        model = build_model(recipe, vocab_size=320, end_of_text_id=0, device=torch.device("cpu"))
        convert_model(model, recipe, torch.device("cpu"))
        optimizer = method_of(recipe).build_optimizer(model, 10)
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        inner = getattr(optimizer, "dense_optimizer", None) or optimizer
        states = [inner.state[p] for p in (model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight)]
        names = ("momentum", "momentum_buffer", "exp_avg")
        held[kind] = {v.dtype for state in states for k, v in state.items() if k in names}
    assert torch.int8 in held["int8"]
    assert torch.bfloat16 in held["bfloat16"]
    assert held["auto"] == {torch.float32}


def test_a_momentum_that_is_not_contiguous_goes_on() -> None:
    """States saved by earlier versions have the strides of the gradient."""
    for name in ("scale", "rmnp", "muon", "hyperball"):
        parameter = nn.Parameter(started().detach().T.contiguous().T)
        optimizer = KEEPS_MOMENTS[name]([parameter])
        key = "momentum_buffer" if name == "muon" else "momentum"
        run(optimizer, parameter, gradients(1))
        optimizer.state[parameter][key] = optimizer.state[parameter][key].T.contiguous().T
        before = optimizer.state[parameter][key].clone()
        run(optimizer, parameter, gradients(1))
        assert not torch.equal(optimizer.state[parameter][key], before), name


@pytest.mark.parametrize("name", [*KEEPS_MOMENTS, "scale without momentum"])
@pytest.mark.parametrize("steps", [0, 1])
def test_adamw_refuses_the_states_of_rivals(name: str, steps: int) -> None:
    parameter = started()
    made = KEEPS_MOMENTS.get(name, lambda p: Scale(p, 0.02))([parameter])
    run(made, parameter, gradients(steps))
    with pytest.raises(UserError, match="this state was saved by (?!AdamW)"):
        AdamW([parameter]).load_state_dict(made.state_dict())


@pytest.mark.parametrize(
    "make", [KEEPS_MOMENTS["muon"], KEEPS_MOMENTS["galore"], AdamW], ids=["muon", "galore", "adamw"]
)
def test_codes_without_their_scale_are_refused(make: Callable[..., Any]) -> None:
    parameter = started()
    optimizer = make([parameter], state_dtype="int8")
    run(optimizer, parameter, gradients(1))
    saved = optimizer.state_dict()
    saved["state"][0] = {k: v for k, v in saved["state"][0].items() if not k.endswith("_scale")}
    with pytest.raises(UserError, match="was saved as codes without their .*_scale; the state is damaged"):
        make([parameter], state_dtype="int8").load_state_dict(saved)
