"""The kill harness, short: SIGKILL at random instants never changes what a run ends with."""

from pathlib import Path

from benchmarks.kill import run


def test_killed_and_resumed_runs_end_bitwise_the_same(tmp_path: Path) -> None:
    outcome = run(3, seed=1, directory=tmp_path)
    assert outcome.kills == 3
    assert outcome.identical
    runs = list(tmp_path.rglob("checkpoints"))
    assert runs
    assert not [leftover for run_ in runs for leftover in run_.glob(".*")]
