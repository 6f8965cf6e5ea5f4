"""The loop: gradients that do not depend on how the batch is cut, bitwise resume, bad steps, signals."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from builders import At, Tiny, curve, interrupt, poison, same, weights
from poetx import PoetConfig, convert_
from poetx.errors import UserError
from poetx.train import checkpoint as ckpt
from poetx.train import loop
from poetx.train.progress import SilentReporter
from poetx.train.run import train

SINGLE = ("poet.method=single-step", "optimizer.angle=0.02")


def test_resuming_from_an_older_checkpoint_repeats_the_lost_steps_exactly(tiny: Tiny) -> None:
    recipe = tiny("train.checkpoint_every=4")
    straight = train(recipe)
    expected, final = curve(recipe.directory), weights(straight)
    for path in ckpt.checkpoints(recipe.directory)[1:]:
        (path / "model.safetensors").write_bytes(b"")
    reporter = At(0, interrupt)
    resumed = train(recipe, resume=True, reporter=reporter)
    assert [note for note in reporter.notes if "broken" in note and "step-00000012" in note]
    assert curve(recipe.directory) == expected
    assert same(weights(resumed), final)


def test_two_runs_of_one_recipe_are_the_same_and_another_seed_is_not(tiny: Tiny) -> None:
    short = ("train.steps=4", "train.export=false")
    first, second = train(tiny(*short, run_dir="a")), train(tiny(*short, run_dir="b"))
    other = train(tiny(*short, "train.seed=1", run_dir="c"))
    assert curve(first.run_dir) == curve(second.run_dir)
    assert curve(first.run_dir) != curve(other.run_dir)


def test_training_leaves_the_global_generator_alone(tiny: Tiny) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train(tiny("train.steps=2", "train.export=false"))
    assert torch.equal(torch.rand(2), expected)


def test_it_learns(tiny: Tiny) -> None:
    result = train(tiny("train.steps=60", "train.eval_every=60", "train.checkpoint_every=60", "train.export=false"))
    assert result.first_perplexity is not None
    assert result.last_perplexity is not None
    assert result.first_perplexity > 250  # about the vocabulary, 320
    assert result.last_perplexity < 0.5 * result.first_perplexity


def test_micro_batches_do_not_change_the_gradient(tiny: Tiny) -> None:
    """float64 would be exact; in float32 the order of the sums differs."""
    norms = []
    for size in (4, 2, 1):
        result = train(
            tiny(f"train.micro_batch_size={size}", "train.steps=2", "train.export=false", run_dir=f"m{size}")
        )
        norms.append([(e["loss"], e["grad_norm"]) for e in curve(result.run_dir) if e["event"] == "train"])
    assert norms[1] == [pytest.approx(pair, rel=1e-5) for pair in norms[0]]
    assert norms[2] == [pytest.approx(pair, rel=1e-5) for pair in norms[0]]


def test_clipping_limits_the_norm_that_the_optimizer_sees(tiny: Tiny) -> None:
    seen: list[float] = []

    def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        seen.append(float(torch.nn.utils.get_total_norm(gradients)))

    recipe = tiny(
        "optimizer.name=sgd",
        "optimizer.clip=0.01",
        "optimizer.clip_ramp_until=100",
        "optimizer.clip_ramp_steps=2",
        "train.steps=8",
        "train.export=false",
    )
    hook = register_optimizer_step_pre_hook(look)
    train(recipe)
    hook.remove()
    assert seen == pytest.approx([0.01] * 5 + [0.001, 0.0055, 0.01], rel=1e-4)
    logged = [entry["grad_norm"] for entry in curve(recipe.directory) if entry["event"] == "train"]
    assert min(logged) > 0.01  # the norm before clipping is what is logged


def test_learning_rates_follow_each_groups_peak(tiny: Tiny) -> None:
    recipe = tiny("train.export=false")
    train(recipe)
    entries = [entry for entry in curve(recipe.directory) if entry["event"] == "train"]
    assert entries[0]["lr_rotations"] == pytest.approx(2e-3 / 3)
    assert entries[2]["lr_rotations"] == pytest.approx(2e-3)
    assert entries[2]["lr_decay"] == pytest.approx(3e-3)
    assert entries[-1]["lr_decay"] == pytest.approx(3e-5)


def test_bfloat16_trains_with_float32_rotations(tiny: Tiny) -> None:
    result = train(tiny("train.dtype=bfloat16", "train.export=false"))
    dtypes = {tensor.dtype for name, tensor in weights(result).items() if "embed" in name or "weight" in name}
    assert torch.bfloat16 in dtypes
    assert torch.float32 in {p.dtype for p in result.model.parameters() if p.requires_grad}
    assert result.last_perplexity is not None
    assert result.first_perplexity is not None
    assert result.last_perplexity < result.first_perplexity
    # Steps of 1e-3 are below half a unit in the last place of a weight of 1.
    small = train(tiny("train.dtype=bfloat16", "train.export=false", "optimizer.lr=1e-3", run_dir="small"))
    norms = [tensor for name, tensor in weights(small).items() if "norm.weight" in name]
    assert norms
    assert all((tensor != 1).any() for tensor in norms)


# Skipped steps do not count towards the merge: 1, 2, 5, 6 and 8 are the first five that were taken.
@pytest.mark.parametrize(("settings", "merged"), [((), [8]), (SINGLE, [])], ids=["poet-x", "single-step"])
def test_a_step_that_is_not_finite_is_skipped_counted_and_leaves_the_weights_finite(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], merged: list[int]
) -> None:
    poison(monkeypatch, 2, 3, 6)
    reporter = At(0, interrupt)
    result = train(tiny("train.export=false", *settings), reporter=reporter)
    assert result.step == 12
    assert result.skipped_steps == 3
    assert [e["step"] for e in curve(result.run_dir) if e.get("skipped")] == [3, 4, 7]
    assert [e["step"] for e in curve(result.run_dir) if e.get("merged")] == merged
    assert all(torch.isfinite(tensor).all() for tensor in weights(result).values())
    assert sum("step skipped" in note for note in reporter.notes) == 3


def test_too_many_bad_steps_in_a_row_stop_the_run_at_the_last_good_checkpoint(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, *range(7, 100))
    recipe = tiny("train.max_bad_steps=3", "train.checkpoint_every=2")
    with pytest.raises(UserError, match=r"3 non-finite steps in a row.*last good checkpoint is .*step-00000006;"):
        train(recipe)
    assert ckpt.step_of(ckpt.checkpoints(recipe.directory)[-1]) == 6


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_signals_of_terminals_and_schedulers_stop_with_a_checkpoint_unless_ignored(name: str, tiny: Tiny) -> None:
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"no {name} here")

    def twice() -> None:  # as several senders at once do
        for _ in range(2):
            os.kill(os.getpid(), number)

    result = train(tiny(), reporter=At(2, twice))
    assert (result.step, result.signum) == (2, number)
    assert result.checkpoint is not None
    before = signal.signal(number, signal.SIG_IGN)  # as nohup does
    try:
        assert train(tiny(run_dir="ignored"), reporter=At(2, twice)).signum is None
    finally:
        signal.signal(number, before)


def test_a_stop_request_leaves_the_signal_handlers_as_they_were(tiny: Tiny) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    result = train(tiny(), reporter=At(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert (result.step, result.signum) == (2, signal.SIGTERM)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


class Stages(SilentReporter):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def stage(self, text: str) -> None:
        self.texts.append(text)


def test_compile_flag_goes_through_torch_compile(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes longer than the rest of the tests together, so the compiler is replaced by the identity."""
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    reporter = Stages()
    train(tiny("train.compile=true", "train.steps=1", "train.export=false"), reporter=reporter)
    assert len(compiled) == 1
    assert "compiling the model for the first steps, a minute or so unless cached ..." in reporter.texts


def test_what_a_gpu_compiles_is_said(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent minute before the first step looks like a hang."""
    recipe = tiny()
    monkeypatch.setattr(loop, "machine_obstacle", lambda device: None)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    run: Any = SimpleNamespace(model=model, device=torch.device("cuda"), recipe=recipe)
    assert loop._compiled(run) == ""
    convert_(model, PoetConfig(block_size=4))
    assert loop._compiled(run) == "kernels"
    run.device = torch.device("cpu")
    assert loop._compiled(run) == ""
