"""A recipe with poet.method=single-step: it trains, resumes to the bit, and exports the plain model it always was."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from builders import Tiny
from poetx.errors import UserError
from poetx.layers.single_step import SingleStepLinear
from poetx.methods import convert_model, method_of
from poetx.models import build_model
from poetx.train import step
from poetx.train.checkpoint import checkpoints
from poetx.train.run import train

SINGLE = ("poet.method=single-step", "optimizer.angle=0.02")


def test_it_learns_and_its_checkpoint_is_the_plain_model(tiny: Tiny) -> None:
    settings = ("train.steps=60", "train.eval_every=60", "train.checkpoint_every=60")
    result = train(tiny(*SINGLE, *settings))
    assert result.first_perplexity is not None
    assert result.last_perplexity is not None
    assert result.last_perplexity < 0.5 * result.first_perplexity
    saved = load_file(checkpoints(result.run_dir)[-1] / "model.safetensors")
    exported = load_file(Path(result.run_dir) / "export" / "model.safetensors")
    assert saved.keys() == exported.keys()
    assert all(torch.equal(saved[name], exported[name]) for name in saved)


@pytest.mark.parametrize("steps", [10, 40])
def test_the_norm_grows_as_told_over_the_run_however_long(tiny: Tiny, steps: int) -> None:
    settings = (f"train.steps={steps}", "optimizer.norm_growth=8", "poet.update=free", "train.export=false")
    recipe = tiny(*SINGLE, *settings)
    layers = [module for module in train(recipe).model.modules() if isinstance(module, SingleStepLinear)]
    assert layers
    for layer in layers:  # fresh rows have norm 1; the norm of a step is put right by the next one
        assert layer.weight.detach().norm() ** 2 / layer.out_features == pytest.approx(9, rel=0.15)


@pytest.mark.parametrize("count", [1, 2])
def test_a_step_whose_norm_alone_is_not_finite_leaves_no_trace(tiny: Tiny, count: int) -> None:
    """The loss is finite, so backward has fed the momentum before anyone can know."""
    recipe = tiny(*SINGLE, "train.dtype=float32")
    model = build_model(recipe, vocab_size=320, end_of_text_id=0, device=torch.device("cpu"))
    convert_model(model, recipe, torch.device("cpu"))
    optimizer = method_of(recipe).build_optimizer(model, recipe.train.steps)
    take = step.TrainingStep.of(recipe, model, optimizer)
    ids = torch.randint(320, (4, 16), generator=torch.Generator().manual_seed(0))
    batches = list(zip(ids.chunk(count), ids.chunk(count), strict=True))
    assert not take(batches).skipped
    before = copy.deepcopy((model.state_dict(), optimizer.plain_state_dict()["state"]))
    hook = model.get_input_embeddings().weight.register_hook(lambda grad: grad * float("inf"))
    result = take(batches)
    assert result.skipped
    assert math.isfinite(result.loss)
    torch.testing.assert_close((model.state_dict(), optimizer.plain_state_dict()["state"]), before, rtol=0, atol=0)
    hook.remove()
    assert not take(batches).skipped


def test_merging_and_single_steps_exclude_each_other(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"poet.merge_every=5: is for poet.method=poet-x"):
        tiny("poet.method=single-step", "poet.merge_every=5")
    with pytest.raises(UserError, match=r"optimizer.angle=0.7: radians"):
        tiny(*SINGLE[:1], "optimizer.angle=0.7")
    with pytest.raises(UserError, match=r"optimizer.norm_growth=8: must be less than train.steps=8"):
        tiny(*SINGLE, "optimizer.norm_growth=8", "train.steps=8")
