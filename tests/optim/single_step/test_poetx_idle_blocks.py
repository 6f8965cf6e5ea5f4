"""Blocks that get no gradient stay as they are, and no finite gradient makes a weight NaN, however large or small."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from builders import descend
from poetx import POETX, PoetConfig, convert_

FORMS = [{"update": "rotation"}, {"update": "rotation", "nesterov": False}, {}, {"norm_growth": 0.02}]


def matrix_optimizer(weight, *, block_size=4, **options):
    return POETX([{"params": [weight], "lr": 0.012, "rotate": True}], block_size=block_size, **options)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [*((form, torch.bfloat16) for form in FORMS), (FORMS[0], torch.float32), (FORMS[2], torch.float64)],
    ids=str,
)
def test_experts_without_tokens_stay_while_the_others_learn(form, dtype):
    """190 steps in which one expert of three, and then another, has an empty batch."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 12, 8).to(dtype))
    optimizer = matrix_optimizer(weight, **form)
    for step in range(200):
        weight.grad = torch.randn_like(weight) + 1
        if step == 10:
            start = weight.detach().clone()
        if step >= 10:
            weight.grad[0] = 0
            weight.grad[1] *= 2.0**-60  # underflows beside what it was
        optimizer.step()
    moved = (weight.detach().float() - start.float()).norm(dim=(1, 2)) / start.float().norm(dim=(1, 2))
    assert moved[0] == 0
    assert moved[1] <= 0.03
    assert moved[2] > 0.5
    weight.grad = torch.randn_like(weight)
    optimizer.step()  # back again: by one step, not by all it was idle
    moved = (weight.detach().float() - start.float()).norm(dim=(1, 2)) / start.float().norm(dim=(1, 2))
    assert 0 < moved[0] < 0.1


@pytest.mark.parametrize("form", [*FORMS, {"rotation_dtype": "bfloat16"}], ids=str)
def test_units_that_die_are_not_turned_among_themselves(form):
    """Behind dead units W changes by the rotations of the inputs alone: W_dead·Wᵀ_dead stays as it is."""
    torch.manual_seed(0)
    config = {key: form[key] for key in ("update", "rotation_dtype") if key in form}
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))
    convert_(net, PoetConfig(method="single-step", block_size=4, **config))
    optimizer = POETX(net, **{key: value for key, value in form.items() if key not in config})
    weight, bias = net[0].weight, net[0].bias
    with torch.no_grad():
        bias[4:8] = -100
    # Both sides in turn: of the outputs, the middle block of three is dead; the inputs' rotations still move its rows.
    for _ in range(60):
        x = torch.randn(16, 8)
        before = weight.detach()[4:8].clone()
        net(x).square().sum().backward()
        side = optimizer.state[weight]["step"] % 2
        optimizer.step()
        optimizer.zero_grad()
        if side == 1:  # out
            assert torch.equal(weight.detach()[4:8], before)
    assert weight.isfinite().all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_momentum_that_decays_into_nothing_stays_finite(form):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(12, 12))
    optimizer = matrix_optimizer(weight, **form)
    for step in range(400):
        weight.grad = torch.zeros(12, 12)
        if step < 4:
            weight.grad += 1e-36 * torch.randn(12, 12)
        else:
            weight.grad[:4] = torch.randn(4, 12)
        optimizer.step()
    assert weight.isfinite().all()
    assert 0.5 < weight.detach().norm() / 12 < 20


@settings(max_examples=60, deadline=None)
@given(
    exponents=st.lists(st.floats(-38, 38), min_size=6, max_size=6),
    weight_exponent=st.floats(-14, 14),  # smaller or larger ones are not rotated
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    momentum_dtype=st.sampled_from(["float32", "bfloat16"]),
    sparse=st.booleans(),
    converted=st.booleans(),
)
def test_no_finite_gradient_makes_a_weight_nan(
    exponents, weight_exponent, form, dtype, momentum_dtype, sparse, converted
):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(8, 12, bias=False, dtype=dtype)
    weight_exponent = weight_exponent if converted else max(weight_exponent, -7)  # zeros would not be rotated
    with torch.no_grad():
        linear.weight.copy_(torch.randn(12, 8, generator=generator, dtype=torch.float64) * 10.0**weight_exponent)
    net = nn.Sequential(linear)
    if converted:
        kinds = {"update": form["update"]} if "update" in form else {}
        convert_(net, PoetConfig(method="single-step", block_size=4, rotation_dtype=momentum_dtype, **kinds))
        optimizer = POETX(net, **{key: value for key, value in form.items() if key != "update"})
    else:
        optimizer = POETX(net, block_size=4, momentum_dtype=momentum_dtype, **form)
    for exponent in exponents * 2:
        x = torch.randn(4, 8, generator=generator).to(dtype)
        g = (torch.randn(4, 12, generator=generator, dtype=torch.float64) * 10.0**exponent).to(dtype)
        if sparse:
            x[:, :4] = 0
            g[:, 4:8] = 0
        descend((net(x) * g.clamp(-1e38, 1e38)).sum(), optimizer)
        assert net[0].weight.isfinite().all()
