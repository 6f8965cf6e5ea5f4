"""One rate written into all groups of an optimizer is said; usual schedules are never taken for it."""

import pytest
import torch
from torch.optim import lr_scheduler

from builders import descend, mlp
from poetx import POETX, PoetConfig, convert_, merge_every, param_groups


def single(**rates):
    model = mlp()
    convert_(model, PoetConfig(method="single-step", block_size=4))
    return model, POETX(model, **({"lr": 1e-3} | rates))


def paper(lr=1e-3, poet_lr=2.5e-4):
    model = mlp()
    convert_(model, PoetConfig(block_size=4))
    optimizer = torch.optim.SGD(param_groups(model, lr=lr, poet_lr=poet_lr), momentum=0.9)
    merge_every(optimizer, model, steps=2)
    return model, optimizer


def train(built, before_step, steps=6):
    model, optimizer = built
    for step in range(steps):
        before_step(step)
        descend(model(torch.randn(4, 11)).square().sum(), optimizer)


def written(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


BUILD = pytest.mark.parametrize("build", [single, paper])


@BUILD
@pytest.mark.parametrize("warmup", [False, True])
def test_one_rate_for_all_is_said_once(build, warmup, caplog):
    built = build()
    train(built, lambda step: written(built[1], 2e-3 * (step if warmup else 1)))
    assert caplog.text.count("one rate was written into every group") == 1
    assert ("their angle, was 0.012 and is now 0.00" if build is single else "was 0.00025 and is now") in caplog.text


def test_a_scheduler_with_one_largest_rate_is_said(caplog):
    model, optimizer = single()
    schedule = lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=10)
    train((model, optimizer), lambda step: step and schedule.step())
    assert "give the scheduler a list" in caplog.text


SCHEDULES = [
    lambda o: lr_scheduler.LambdaLR(o, lambda step: step / 3),
    lambda o: lr_scheduler.CosineAnnealingLR(o, 5, eta_min=1e-5),
    lambda o: lr_scheduler.OneCycleLR(o, [group["lr"] for group in o.param_groups], total_steps=8),
    lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
]


@BUILD
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_usual_schedules_raise_no_alarm(build, schedule, caplog):
    model, optimizer = build()
    scheduler = schedule(optimizer)
    train((model, optimizer), lambda step: step and scheduler.step())
    assert not caplog.text


def test_rates_that_were_one_from_the_beginning_may_stay_so(caplog):
    built = paper(poet_lr=1e-3)
    train(built, lambda step: written(built[1], 1e-2))
    built = single(lr=None, dense_optimizer=lambda groups: torch.optim.SGD(groups, lr=0.012))
    train(built, lambda step: written(built[1], 1e-3))
    assert not caplog.text
