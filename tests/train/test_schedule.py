"""Learning-rate factor and clip value at the steps where something happens."""

from __future__ import annotations

import itertools

import pytest

from poetx.recipe import load_recipe
from poetx.train.schedule import clip_value, lr_factor


def test_warmup_climbs_to_the_peak_and_the_cosine_ends_at_the_ratio() -> None:
    factors = [lr_factor(step, steps=100, warmup_steps=10, min_ratio=0.01) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert factors[9] == max(factors) == 1
    assert all(a > b for a, b in itertools.pairwise(factors[9:]))
    assert factors[-1] == pytest.approx(0.01)
    assert factors[54] == pytest.approx(0.505, abs=0.01)  # half-way down


def test_no_warmup_and_a_single_step() -> None:
    assert lr_factor(0, steps=1, warmup_steps=0, min_ratio=0.5) == pytest.approx(0.5)
    assert lr_factor(0, steps=2, warmup_steps=5, min_ratio=0.5) == pytest.approx(0.2)


def test_the_clip_ramps_after_each_merge_and_only_in_the_first_steps() -> None:
    recipe = load_recipe("llama-60m", text=False).optimizer  # the published clip and ramp

    def clip(step: int, merges: int, since: int) -> float | None:
        return clip_value(recipe, step=step, merges=merges, steps_since_merge=since)

    assert clip(3, 0, 3) == 0.1  # before the first merge
    assert clip(200, 1, 0) == pytest.approx(0.01)
    assert clip(205, 1, 5) == pytest.approx(0.055)
    assert clip(210, 1, 10) == 0.1
    assert clip(1999, 9, 0) == pytest.approx(0.01)
    assert clip(2000, 10, 0) == 0.1


@pytest.mark.parametrize("off", ["null", "0", "off"])
def test_no_clipping(off: str) -> None:
    optimizer = load_recipe("demo", [f"optimizer.clip={off}"]).optimizer
    assert clip_value(optimizer, step=0, merges=1, steps_since_merge=0) is None
