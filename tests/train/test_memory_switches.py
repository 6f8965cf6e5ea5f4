"""The memory switches of a recipe: the same training, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from builders import Tiny, train_losses
from poetx.errors import UserError
from poetx.recipe import Recipe, load_recipe
from poetx.runs.report import write_report
from poetx.train.metrics import read_metrics
from poetx.train.run import train

SHORT = ("train.export=false", "optimizer.clip=null", "optimizer.clip_ramp_until=0")


def losses(recipe: Recipe, **how: bool) -> list[float]:
    return train_losses(train(recipe, **how).run_dir)


@pytest.mark.parametrize("mode", ["fast", "mem"])
def test_exact_switches_leave_the_curve_as_it_was(tiny: Tiny, mode: str) -> None:
    settings = (*SHORT, f"poet.mode={mode}", "train.steps=7")
    plain = losses(tiny(*settings, run_dir="plain"))
    switches = ["train.chunked_loss=true", "model.gradient_checkpointing=true", "optimizer.release_gradients=true"]
    for chosen in (*([switch] for switch in switches), switches):
        found = losses(tiny(*settings, *chosen, run_dir=str(len(chosen)) + chosen[0]))
        assert found == pytest.approx(plain, rel=2e-4), chosen


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.release_gradients=true", "optimizer.clip=1"], "set optimizer.clip=null"),
        (["optimizer.state_dtype=int8", "optimizer.name=sgd"], "is AdamW's"),
        (["optimizer.state_dtype=int4"], "optimizer.state_dtype"),
        (["optimizer.dense_optimizer=hfac", "poet=null"], "is for poet.method=poet-x"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("demo", overrides)


@pytest.mark.parametrize("method", ["fast", "single-step", "adamw", "galore", "fira"])
def test_released_gradients_are_those_of_all_micro_batches(
    tiny: Tiny, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    own = ("optimizer.clip_ramp_until=0",) if method == "fast" else ()
    settings = (f"method={method}", "train.export=false", "optimizer.clip=null", *own, "train.micro_batch_size=1")
    plain = losses(tiny(*settings, run_dir="plain"))
    assert "saves no memory" not in caplog.text
    found = losses(tiny(*settings, "optimizer.release_gradients=true", run_dir="released"))
    assert found == pytest.approx(plain, rel=2e-4)
    assert "saves no memory with train.micro_batch_size=1: gradients of 4 micro-batches" in caplog.text


@pytest.mark.parametrize("switch", ["train.chunked_loss=false", "train.chunked_loss=true"])
def test_measuring_memory_leaves_the_curve_and_says_what_each_phase_took(tiny: Tiny, switch: str) -> None:
    settings = (*SHORT, switch, "poet.merge_every=4", "train.steps=8")
    run_dir = train(tiny(*settings, "train.memory_every=4", run_dir="measured")).run_dir
    assert train_losses(run_dir) == losses(tiny(*settings, run_dir="again"))
    lines = [entry for entry in read_metrics(run_dir / "metrics.jsonl") if entry["event"] == "memory"]
    assert [entry["step"] for entry in lines] == [1, 4, 8]
    assert list(lines[0]["phases"]) == ["forward", "backward", "step"]
    assert list(lines[1]["phases"]) == ["forward", "backward", "step", "merge"]
    for sizes in lines[1]["phases"].values():
        assert sizes["total"] == sum(size for name, size in sizes.items() if name != "total")
    assert lines[1]["phases"]["backward"]["activations"] > 0
    assert "Memory by phase" in write_report(run_dir, run_dir / "report.html").read_text()


def test_a_skipped_step_does_not_stop_a_run_that_releases_gradients(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    total_norm, count = torch.nn.utils.get_total_norm, iter(range(1000))

    def get_total_norm(*args: Any, **settings: Any) -> torch.Tensor:
        return total_norm(*args, **settings) * (float("inf") if next(count) == 4 else 1)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", get_total_norm)
    result = train(tiny(*SHORT, "optimizer.release_gradients=true"))
    assert (result.step, result.skipped_steps) == (12, 1)


def test_validation_makes_no_logits_either_with_the_chunked_loss(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = read_metrics(train(tiny(*SHORT, "train.steps=1", run_dir="plain")).run_dir / "metrics.jsonl")
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", None)
    chunked = read_metrics(train(tiny(*SHORT, "train.steps=1", "train.chunked_loss=true")).run_dir / "metrics.jsonl")
    first = [next(e["loss"] for e in lines if e["event"] == "validation") for lines in (plain, chunked)]
    assert first[0] == pytest.approx(first[1], rel=1e-6)
