"""The loss on a fixed batch hardly moves at a merge."""

from collections.abc import Callable

import pytest
import torch

from poetx import merge_
from poetx.data.prepare import prepare_data
from poetx.recipe import Recipe
from poetx.train.loop import evaluate
from poetx.train.run import train


@pytest.mark.parametrize(("order", "limit"), [("3", 1e-3), ("7", 1e-5), ("exact", 1e-5)])
def test_loss_before_and_after_a_merge(tiny: Callable[..., Recipe], order: str, limit: float) -> None:
    recipe = tiny(f"poet.neumann_order={order}", "poet.merge_every=null", "train.export=false", "train.steps=20")
    model = train(recipe).model
    text = prepare_data(recipe).validation

    def loss() -> float:
        return evaluate(model, text, list(range(len(text))), batch_size=8, device=torch.device("cpu"))

    before = loss()
    report = merge_(model)
    assert report.angle > 0.03, "the rotations did not move: this shows nothing"
    assert abs(loss() - before) / before < limit
