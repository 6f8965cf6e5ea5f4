"""`poetx bench`: rows say what they measured, and a wrong candidate is never timed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import poetx.bench.layer as layer_bench
from poetx import UserError
from poetx.bench import ops as ops_bench
from poetx.bench.layer import Shape, bench_layer, check, poet_layer
from poetx.bench.step import Run, bench_step
from poetx.bench.timing import interleaved, peak_bytes
from poetx.cli import main

ROOT = Path(layer_bench.__file__).parents[3]
CPU = torch.device("cpu")
TINY = ["model.hidden_size=32", "model.intermediate_size=48", "model.num_layers=1", "model.num_heads=2"]
TINY += ["data.vocab_size=300", "poet.block_size=16", "train.device=cpu"]


def shape(dtype=torch.float32, **sizes):
    values = {"tokens": 24, "in_features": 20, "out_features": 28, "block_size": 8} | sizes
    return Shape(**values, dtype=dtype, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_rows(dtype):
    rows = list(bench_layer(shape(dtype), repeats=2))
    contestants = [row for row in rows if row["benchmark"] == "layer"]
    assert [row["contestant"] for row in contestants] == ["linear", "original", "fast", "mem"]
    assert contestants[0]["ratio"] == 1.0
    for row in rows:
        assert row["ms"] > 0
        assert row["tokens"] == 24
        assert row["dtype"] == str(dtype).removeprefix("torch.")
        assert {"commit", "device", "torch", "date"} <= set(row)
    assert any(row.get("part") == "cnp" for row in rows)
    json.dumps(rows)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 9), (9, 1), (2, 1)])
def test_a_side_of_one_feature_is_timed_without_its_rotation(m, n):
    rows = list(bench_layer(shape(in_features=n, out_features=m), contestants=list(layer_bench.CONTESTANTS), repeats=1))
    assert {row["contestant"] for row in rows if "contestant" in row} == set(layer_bench.CONTESTANTS)


@pytest.mark.parametrize("what", ["output", "input gradient", "gradient of skew_in", "gradient of skew_out"])
def test_a_wrong_layer_stops_the_run_before_anything_is_timed(what, monkeypatch):
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = poet_layer(shape(), "fast")
            self.rotations, self.dense_weight = self.layer.rotations, self.layer.dense_weight

        def forward(self, x):
            spoilt = {"input gradient": x, "gradient of skew_in": self.rotations[0]}
            spoilt["gradient of skew_out"] = self.rotations[1]
            y = self.layer(x) * (1.1 if what == "output" else 1.0)
            return y if what == "output" else y + 0.1 * (spoilt[what] - spoilt[what].detach()).sum()

    monkeypatch.setattr(layer_bench, "interleaved", lambda *args, **kwargs: pytest.fail("was timed"))
    monkeypatch.setitem(layer_bench.CONTESTANTS, "wrong", lambda shape: Wrong())
    with pytest.raises(UserError, match=f"wrong: {what} is wrong"):
        list(bench_layer(shape(), contestants=["linear", "wrong"], repeats=1))


def test_a_method_beside_the_methods_is_refused():
    with pytest.raises(UserError, match="--methods and method= are both given"):
        next(bench_step("demo", methods=["adamw"], overrides=["method=mem"]))


def test_another_contestant_is_one_entry(monkeypatch):
    monkeypatch.setitem(layer_bench.CONTESTANTS, "plain", lambda shape: nn.Linear(20, 28, bias=False))
    rows = list(bench_layer(shape(), contestants=["linear", "plain"], repeats=1, parts=False))
    assert [row["contestant"] for row in rows] == ["linear", "plain"]
    with pytest.raises(UserError, match="'fats'.*fast"):
        list(bench_layer(shape(), contestants=["fats"]))


def test_check_takes_an_ordinary_layer():
    x, g = torch.randn(4, 20, requires_grad=True), torch.randn(4, 28)
    check("linear", nn.Linear(20, 28, bias=False), x, g)
    with pytest.raises(UserError, match="output is wrong"):
        check("linear", nn.Linear(20, 28, bias=True), x, g)


def test_ops_rows_and_gate(monkeypatch):
    sizes = {"tokens": [24], "features": 32, "blocks": [3], "block_sizes": [16]}
    rows = list(ops_bench.bench_ops(device=CPU, dtype=torch.float32, repeats=1, **sizes))
    assert [row["operator"] for row in rows] == ["permutation", "cnp", "gather + block product"]
    assert all(row["ms"] > 0 and row["naive_ms"] > 0 for row in rows)
    wrong = SimpleNamespace(gather=lambda x, perm: x, inverse=lambda perm: perm)
    monkeypatch.setattr(ops_bench, "block_diagonal", wrong)
    with pytest.raises(UserError, match="permutation, output is wrong"):
        list(ops_bench.bench_ops(device=CPU, dtype=torch.float32, repeats=1, **sizes))


def test_step_rows():
    settings = {"seq_lens": [8, 16], "batch_sizes": [2], "methods": ["adamw", "mem"]}
    rows = list(bench_step("demo", overrides=TINY, repeats=1, **settings))
    assert [(row["contestant"], row["seq_len"]) for row in rows] == [
        (name, length) for length in (8, 16) for name in ("adamw", "mem")
    ]
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert row["oom"] is False
        assert (row["merge_every"] is None) == (row["contestant"] == "adamw")
    assert rows[0]["speed_ratio"] == 1.0
    assert rows[1]["trainable"] < rows[0]["trainable"]


def test_a_method_twice_with_settings_of_its_own():
    methods = {"random": {"method": "fast"}, "shared": {"method": "fast", "poet.permutation": "shared"}}
    rows = list(bench_step("demo", overrides=TINY, repeats=1, seq_lens=[8], batch_sizes=[1], methods=methods))
    assert [row["contestant"] for row in rows] == ["random", "shared"]
    assert rows[0]["speed_ratio"] == 1.0
    assert rows[1]["speed_ratio"] > 0


def test_what_does_not_fit_or_does_not_learn(monkeypatch):
    def too_big(self, ids):
        raise torch.OutOfMemoryError("no")

    settings = {"overrides": TINY, "seq_lens": [8], "batch_sizes": [1], "methods": ["fast"], "repeats": 1}
    monkeypatch.setattr(Run, "step", too_big)
    (row,) = bench_step("llama-60m", **settings)  # a recipe that names no text
    assert row["oom"] is True
    assert row["tokens_per_second"] is None
    monkeypatch.setattr(Run, "step", lambda self, ids: torch.tensor(1.0))
    with pytest.raises(UserError, match="fast: the loss on one batch went 1.000, 1.000"):
        list(bench_step("demo", **settings))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("step demo --methods adamw,meem", "method=meem: no such method; did you mean 'mem'"),
        ("step demo --methods mem,mem", "--methods=mem,mem: must be different names"),
        ("step demo --methods ,", "--methods=,: must be different names"),
        ("step demo --seq-lens 0", "--seq-lens=0: must be numbers of at least 1"),
        ("step demo --batch-sizes 2.5", "--batch-sizes=2.5: must be whole numbers"),
        ("step nowhere", "nowhere: no such recipe"),
        ("layer --contestants fats", "'fats': no such contestant; did you mean 'fast'"),
        ("layer --dtype float16", "--dtype=float16: must be float32, bfloat16 or auto"),
        ("ops --tokens -3", "--tokens=-3: must be numbers of at least 1"),
        ("ops --device tpu", "device"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert main(["bench", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_candidates_take_turns():
    order = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, device=CPU)
    assert order == ["a", "b"] * 5
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert peak_bytes(lambda: None, CPU) is None


def test_command_prints_and_appends_the_same_rows(tmp_path, capsys):
    out = tmp_path / "rows" / "layer.jsonl"
    command = ["bench", "layer", "--tokens=8", "--in-features=8", "--out-features=12", "--block-size=4"]
    assert main([*command, "--device=cpu", "--repeats=1", "--no-parts", "--json", f"--out={out}"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [json.loads(line) for line in out.read_text().splitlines()]


def test_gpu_suite_runs_in_rehearsal(tmp_path):
    """Every line of the script but the sizes, on whatever this machine has."""
    environment = os.environ | {"POETX_BENCH_TINY": "1", "PYTHON": sys.executable}
    script = str(ROOT / "benchmarks" / "gpu.sh")
    command = ["bash", script, str(tmp_path / "out")]
    parts = ["layer", "ops"]
    result = subprocess.run([*command, *parts], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for part in parts:
        rows = [json.loads(line) for line in (tmp_path / "out" / f"{part}.jsonl").read_text().splitlines()]
        assert len(rows) == {"layer": 15, "ops": 3}[part]
    assert "torch" in (tmp_path / "out" / "environment.log").read_text()
    result = subprocess.run([*command, "lyer"], env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "lyer: no such part" in result.stderr
