"""The kill harness, short: SIGKILL at random instants never changes what a run ends with."""

from pathlib import Path

import pytest
from benchmarks.kill import run

import accelerator


@pytest.mark.parametrize(
    ("kills", "settings"),
    [(3, []), pytest.param(1, ["method=single-step", "model.offload=frozen"], id="streamed")],
)
def test_killed_and_resumed_runs_end_bitwise_the_same(tmp_path: Path, kills: int, settings: list[str]) -> None:
    streamed = bool(settings)
    if streamed and not accelerator.available():
        pytest.skip("this torch takes no device from Python")
    outcome = run(kills, seed=1, directory=tmp_path, settings=["train.steps=14", *settings], stand_in=streamed)
    assert outcome.kills == kills
    assert outcome.identical
    runs = list(tmp_path.rglob("checkpoints"))
    assert runs
    assert not [leftover for run_ in runs for leftover in run_.glob(".*")]
