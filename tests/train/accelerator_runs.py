"""A whole run on a device that is not the CPU: trained, stopped, resumed, exported."""

from __future__ import annotations

import signal

import pytest
import torch

import accelerator
from accelerator import crossings
from builders import At, Tiny, curve, interrupt, train_losses
from poetx.runs.load import load_run
from poetx.train import loop, run

FORMS = {
    "fast": ("poet.mode=fast", "poet.merge_every=3"),
    "mem and its stack": (
        *("poet.mode=mem", "poet.merge_every=3", "train.chunked_loss=true", "model.gradient_checkpointing=true"),
    ),
    "single-step": ("poet.method=single-step", "optimizer.angle=0.02"),
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch):
    with accelerator.accelerator() as device:
        monkeypatch.setattr(run, "resolve_device", lambda wanted: device)
        yield device


@pytest.mark.parametrize("name", FORMS)
def test_trains_as_on_the_cpu_and_resumes_to_the_bit(name: str, tiny: Tiny, device: torch.device) -> None:
    settings = (*FORMS[name], "train.steps=7")
    whole = run.train(tiny(*settings, run_dir="whole"))
    recipe = tiny(*settings, run_dir="cut")
    assert run.train(recipe, reporter=At(4, interrupt)).signum == signal.SIGINT
    run.train(recipe, resume=True)
    assert curve(recipe.directory) == curve(whole.run_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "resolve_device", lambda wanted: torch.device("cpu"))
        on_cpu = run.train(tiny(*settings, run_dir="cpu"))
    assert losses(whole) == pytest.approx(losses(on_cpu), rel=1e-4)
    assert load_run(str(whole.run_dir), device="cpu").model is not None


@pytest.mark.parametrize("name", ["mem and its stack", "single-step"])
def test_a_run_with_its_weights_in_host_memory_is_the_same_run(name: str, tiny: Tiny, device: torch.device) -> None:
    settings = (*FORMS[name], "train.steps=7", "train.micro_batch_size=2")
    resident = run.train(tiny(*settings, run_dir="resident"))
    recipe = tiny(*settings, "model.offload=frozen", run_dir="streamed")
    assert run.train(recipe, reporter=At(4, interrupt)).signum == signal.SIGINT
    result = run.train(recipe, resume=True)
    assert losses(result) == losses(resident)
    assert {p.device.type for p in result.model.parameters()} == {"cpu"}
    saved, expected = (load_run(str(r.run_dir), device="cpu").model.state_dict() for r in (result, resident))
    assert all(torch.equal(saved[key], value) for key, value in expected.items())


def losses(result: run.RunResult) -> list[float]:
    return train_losses(result.run_dir)


@pytest.mark.parametrize("name", FORMS)
def test_a_step_of_the_loop_waits_once_at_its_end(
    name: str, tiny: Tiny, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For loss and norm together. Transformers waits once itself, single-step before backward touches a momentum."""
    plain, seen = loop.train_step, []

    def counted(*args):
        with crossings() as now:
            result = plain(*args)
        seen.append(now)
        return result

    monkeypatch.setattr(loop, "train_step", counted)
    run.train(tiny(*FORMS[name], "train.steps=4"))
    operators = [crossing.partition(" at ")[0] for crossing in seen[-1]]
    inputs_and_labels, of_transformers, of_the_loss = ["_to_copy"] * 2, ["_local_scalar_dense"], ["_to_copy"]
    before_backward = ["_local_scalar_dense"] * (name == "single-step")
    assert operators == inputs_and_labels + of_transformers + before_backward + of_the_loss
