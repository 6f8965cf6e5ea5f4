"""The comparison of methods: every method trains, a run that has its row is not repeated, words become settings."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.record import by_setting, mean_loss

from benchmarks import curves, tables
from benchmarks import single_step as bench


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    text = "\n".join(f"def function_{i}(x, y):\n    return x * {i} + y\n" for i in range(400))
    (tmp_path / "text").mkdir()
    for part in range(20):
        (tmp_path / "text" / f"{part}.txt").write_text(text[part * 800 :][:4000])
    monkeypatch.setitem(bench.SCALES, "small", bench.Scale(24, 40, 1, 2, 300, 16, 4, 30))
    words = [
        "--text",
        str(tmp_path / "text"),
        "--cache",
        str(tmp_path / "cache"),
        "--out",
        str(tmp_path / "rows.jsonl"),
    ]

    def run(*settings):
        command = ["bench", "run", *settings, "precision=fp32", "compile=false", "block_size=8", *words]
        monkeypatch.setattr(sys, "argv", command)
        bench.main()
        return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]

    return run


def test_every_method_learns_and_is_not_run_twice(tiny):
    for count, words in enumerate(
        (
            ["method=adamw"],
            ["method=muon", "matrix_lr=3e-3"],
            ["method=single-step"],
            ["method=poet-x", "merge_every=10"],
        ),
        start=1,
    ):
        for _ in range(2):
            rows = tiny(*words)
            assert len(rows) == count
        assert rows[-1]["train_curve"][-1] < rows[-1]["train_curve"][0]
        assert rows[-1]["loss"] < rows[-1]["train_curve"][0]
    state = {row["method"]: row["matrix_state_bytes"] for row in rows}
    assert state["muon"] * 2 == pytest.approx(state["adamw"], rel=0.01)
    assert state["poet-x"] > 0  # although its last step merged, which starts the rotations' state anew
    assert state["single-step"] < state["muon"]


def test_a_run_that_diverges_leaves_a_row_and_is_shown_as_such(tiny, monkeypatch):
    for lr in ("1e30", "1e-3", "1e-2"):
        rows = tiny("method=adamw", f"lr={lr}")
    assert [row["loss"] is None for row in rows] == [True, False, False]
    assert rows[0]["weights"]["end"] is None
    assert all(math.isfinite(point) for point in rows[0]["train_curve"])
    monkeypatch.setattr(tables, "_rows", lambda _: rows)
    assert "1e+30: diverged" in tables.single_step_rates()
    assert tables.single_step().count("diverged") == 1


def test_words_become_settings():
    run = bench._parse(["lr=1e-2", "momentum=0.9", "partition_kind=random"])
    assert (run.method, run.lr, run.init) == ("single-step", 1e-2, "normalized")
    assert run.options == {"momentum": 0.9, "partition_kind": "random"}
    with pytest.raises(TypeError):
        bench._parse(["method=adamw", "angel=3"])


def test_schedule_warms_up_and_ends_at_a_tenth():
    values = [bench.factor(step, 1000) for step in range(1000)]
    assert values[0] == pytest.approx(0.01)
    assert max(values) == values[100] == 1
    assert values[-1] == pytest.approx(0.1, rel=1e-2)


def test_experiments_name_runs_that_the_methods_take():
    runs = [run for experiment in bench.EXPERIMENTS.values() for run in experiment()]
    assert len({run.key() for run in runs}) >= len(runs) - 1  # sweep and ablate share their centre
    for method in ("adamw", "muon", "poet-x", "single-step"):
        assert len({(run.lr, run.matrix_lr) for run in bench.sweep() if run.method == method}) >= 4
    for run in runs:
        if run.method == "single-step":
            bench.optimizer_for(bench.build(run, bench.Scale(24, 40, 1, 2, 300, 16, 4, 30)), run)


def test_a_row_from_before_a_setting_existed_counts_as_done():
    key = json.loads(bench.Run("muon").key())
    older = {name: value for name, value in key.items() if name not in ("matrix_decay", "norm_growth")}
    assert bench._key({"key": json.dumps(older)}) == bench.Run("muon").key()
    assert bench._key({"key": json.dumps(older)}) != bench.Run("muon", norm_growth=8.0).key()


def test_final_takes_the_best_of_each_method():
    rows = [
        {"method": run.method, "seed": 0, "loss": loss, "key": run.key()}
        for run, loss in (
            (bench.Run("adamw", lr=1e-3), 3.0),
            (bench.Run("adamw", lr=2e-3), 2.0),
            (bench.single(), None),
        )
    ]
    assert [(run.lr, run.seed) for run in bench.final(rows)] == [(2e-3, 1), (2e-3, 2)]


def test_seeds_are_averaged_and_the_best_setting_is_drawn(tmp_path, monkeypatch, capsys):
    def row(method, lr, seed, loss):
        run = bench.Run(method, lr=lr, seed=seed)
        facts = {"steps": 9, "tokens": 9, "loss": loss, "key": run.key(), "train_curve": [3.0] * 4}
        return dataclasses.asdict(run) | facts

    rows = [row("adamw", 1.0, 0, 2.0), row("adamw", 1.0, 1, 4.0), row("adamw", 2.0, 0, 3.5), row("muon", 1.0, 0, None)]
    assert sorted(len(same) for same in by_setting(rows)) == [1, 1, 2]
    assert [mean_loss(same) for same in by_setting(rows)] == [3.0, 3.5, math.inf]
    (best,) = curves.best_settings(rows[:3]).values()
    assert [r["loss"] for r in best] == [2.0, 4.0]

    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(json.dumps(row(method, 1.0, 0, 2.0)) for method in ("adamw", "muon", "single-step")))
    monkeypatch.setattr("sys.argv", ["curves", "--rows", str(source), "--plot", str(tmp_path / "plot.png")])
    curves.main()
    assert (tmp_path / "plot.png").stat().st_size > 10_000

    for words, message in ((["--scales", "wide"], "no budget"), (["--rows", "nowhere"], "no such file")):
        monkeypatch.setattr("sys.argv", ["curves", "--rows", str(source), "--plot", "x.png", *words])
        with pytest.raises(SystemExit, match="2"):
            curves.main()
        assert message in capsys.readouterr().err
