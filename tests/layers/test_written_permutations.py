"""A permutation that an average of models has written is no permutation: said, never read out of bounds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from poetx import PoetConfig, UserError, convert_, merge_
from poetx.ops.block_diagonal import inverse


@pytest.mark.parametrize("weight_format", [None, "int8"])
def test_an_average_with_buffers_over_a_merge_is_refused(weight_format: str | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 8))
    convert_(model, PoetConfig(block_size=8, mode="mem", weight_format=weight_format))
    average = AveragedModel(model, use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
        merge_(model)
    average.update_parameters(model)
    for use in (lambda: average(torch.randn(2, 24)), average.module[0].dense_weight, lambda: merge_(average.module)):
        with pytest.raises(UserError, match=r"perm_(in|out) was written and is no permutation any more"):
            use()
    assert model(torch.randn(2, 24)).isfinite().all()


def test_what_overwrites_a_model_in_place_is_seen_at_its_export() -> None:
    """As Lightning's ``WeightAveraging`` does when training ends: by ``.data``, which no version counter sees."""
    model = nn.Sequential(nn.Linear(24, 32))
    convert_(model, PoetConfig(block_size=8))
    model(torch.randn(2, 24))
    model[0].perm_in.data.copy_(model[0].perm_in // 2)
    with pytest.raises(UserError, match="perm_in was written"):
        model[0].dense_weight()


def test_an_inverse_never_holds_what_was_in_memory() -> None:
    assert inverse(torch.tensor([3, 3, 0, 0], dtype=torch.int32)).max() < 4
