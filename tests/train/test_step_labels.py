"""Labels that do not count, and documents that do not see each other, in the one training step."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from builders import llama
from poetx.data.tokens import IGNORED, Batch
from poetx.train.step import TrainingStep


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_mean_is_over_the_labels_of_all_micro_batches(chunked: bool, micro: int) -> None:
    """Micro-batches with few labels weigh no more than others: the gradient is that of one pass over all."""
    model = llama()
    ids = torch.randint(0, 97, (4, 12))
    labels = torch.where(torch.rand(4, 12) < 0.3, ids.roll(-1, 1), IGNORED)
    labels[0], labels[1, 0] = IGNORED, 5
    batch = Batch(ids, labels)
    counted = labels != IGNORED
    assert batch.counted == int(counted.sum())
    loss = cross_entropy(model(ids).logits[counted], labels[counted])
    expected = torch.autograd.grad(loss, list(model.parameters()))
    seen = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in model.parameters()))
    step = TrainingStep(model, optimizer, model.base_model if chunked else model, chunked_loss=chunked)
    result = step([batch.rows(i, i + micro) for i in range(0, 4, micro)], tokens=batch.counted)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    for found, wanted in zip(seen, expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)
