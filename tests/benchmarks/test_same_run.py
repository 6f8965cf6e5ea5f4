"""The comparison of two revisions' numbers: what counts as the same, what is shown, what is left behind."""

import copy
import subprocess
from pathlib import Path

import pytest
from benchmarks.same_run import MISSING, RUNS, compare, overrides

from benchmarks import same_run
from poetx.recipe import load_recipe

# A program that takes the command line's words, and makes metrics of 12 steps that do not depend on where it stopped.
PROGRAM = """
import json, pathlib, sys, time
def main():
    words = dict(word.split("=", 1) for word in sys.argv[2:] if "=" in word)
    run_dir = pathlib.Path(words.get("run_dir", sys.argv[2]))
    run_dir.mkdir(parents=True, exist_ok=True)
    metrics = run_dir / "metrics.jsonl"
    begun = metrics.read_text().splitlines()[:6] if "--resume" in sys.argv else []
    with metrics.open("w") as file:
        for step in range(1, 13):
            time.sleep(2.0 if step == 9 and not begun else 0.02)  # time to be copied at half, on a busy machine, too
            loss = LOSS
            line = json.dumps({"event": "train", "step": step, "loss": loss, "seconds": time.time()})
            print(begun[step - 1] if step <= len(begun) else line, file=file, flush=True)
"""


@pytest.fixture
def lines():
    return [
        {"event": "validation", "step": 0, "loss": 7.5, "seconds": 0.1},
        {"event": "train", "step": 1, "loss": 0.1 + 0.2, "clip": None, "merged": False, "tokens_per_second": 10.0},
        {"event": "train", "step": 2, "loss": 5.0, "clip": None, "merged": True, "layers": {"q": {"norm": 1.0}}},
    ]


def test_equal_lines_are_the_same_whatever_their_times(lines):
    other = copy.deepcopy(lines)
    other[0]["seconds"], other[1]["tokens_per_second"] = 99.0, 1.0
    other[1]["peak_memory_gib"] = 3.0
    found = compare(lines, other)
    assert (found.first, found.largest) == (None, {})
    assert (found.lines, found.fields) == (3, 5)


def test_the_last_bit_of_a_loss_is_a_difference_and_may_be_allowed(lines):
    other = copy.deepcopy(lines)
    other[1]["loss"] = 0.3
    other[2]["layers"]["q"]["norm"] = 1.25
    found = compare(lines, other)
    assert found.first is not None
    assert (found.first.step, found.first.name) == (1, "train.loss")
    assert (found.first.base, found.first.head) == (0.1 + 0.2, 0.3)
    assert found.largest == {"train.loss": pytest.approx(2**-52, rel=0.5), "train.layers.q.norm": 0.2}

    found = compare(lines, other, tolerance=1e-9)
    assert found.first is not None
    assert found.first.name == "train.layers.q.norm"
    found = compare(lines, other, tolerance=0.2)
    assert (found.first, len(found.largest)) == (None, 2)


def test_what_is_no_number_is_never_within_a_tolerance(lines):
    for key, value in (("merged", True), ("clip", 1.0), ("loss", None)):
        other = copy.deepcopy(lines)
        other[1][key] = value
        found = compare(lines, other, tolerance=1e9)
        assert found.first is not None
        assert found.first.name == f"train.{key}"


def test_norm_drift_is_a_fraction_already_and_differs_by_so_much():
    drifts = [[{"event": "train", "step": 1, "norm_drift": drift}] for drift in (4e-10, 6e-10)]
    assert compare(*drifts).first is not None
    found = compare(*drifts, tolerance=1e-6)
    assert (found.first, found.largest) == (None, {"train.norm_drift": pytest.approx(2e-10)})


def test_a_missing_line_field_or_a_line_twice_is_a_difference(lines):
    first = compare(lines, lines[:1] + lines[2:], tolerance=1.0).first
    assert first is not None
    assert (first.step, first.name, first.base, first.head) == (1, "train.line", "there", MISSING)
    first = compare(lines, [*lines, lines[0]]).first
    assert first is not None
    assert (first.step, first.name, first.base, first.head) == (0, "validation.line", MISSING, "there")
    first = compare(lines, [{key: value for key, value in line.items() if key != "loss"} for line in lines]).first
    assert first is not None
    assert (first.step, first.name, first.head) == (0, "validation.loss", MISSING)


def test_a_field_recorded_since_is_named_and_no_difference(lines):
    found = compare(lines, [line | {"cause": step} for step, line in enumerate(lines)])
    assert (found.first, found.new) == (None, {"validation.cause", "train.cause"})
    found = compare([lines[0], lines[1] | {"cause": 1}, lines[2]], lines)
    assert (found.first.name, found.new) == ("train.cause", frozenset())
    found = compare([lines[0], lines[1] | {"cause": 1}, lines[2]], [*lines[:2], lines[2] | {"cause": 1}])
    assert (found.first.name, found.first.base, found.largest) == ("train.cause", 1, {"train.cause": float("inf")})


@pytest.mark.parametrize("run", RUNS)
def test_every_run_is_a_valid_recipe_and_merges_twice(run):
    recipe = load_recipe(RUNS[run][0], overrides(run, steps=60, renamed={}))
    assert recipe.poet is not None
    single_step = recipe.poet.config.method == "single-step"
    assert recipe.merge_every == (None if single_step else 25)
    assert "poet.every=25" in overrides("demo", steps=60, renamed={"poet.merge_every": "poet.every"})


def test_revisions_are_checked_out_run_compared_and_removed(tmp_path, monkeypatch, capsys):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    source = tmp_path / "src" / "poetx"
    source.mkdir(parents=True)
    (source / "__init__.py").touch()
    git("init")
    for loss in ("1 / step", "1 / step + (step == 9)"):
        (source / "cli.py").write_text(PROGRAM.replace("LOSS", loss))
        git("add", ".")
        git("commit", "-m", loss)
    monkeypatch.setattr(same_run, "ROOT", Path(tmp_path))

    words = ["--runs", "demo", "--steps", "12", "--resume"]
    assert same_run.main(["HEAD", "WORKTREE", *words]) == 0
    assert capsys.readouterr().out.count("  same\n") == 2
    assert same_run.main(["HEAD^", "HEAD", *words]) == 1
    assert capsys.readouterr().out.count("first difference at step 9 train.loss") == 2
    (source / "cli.py").write_text("def main(): return 'error: no such key'")
    assert same_run.main(["HEAD", "WORKTREE", *words]) == 1
    assert "failed: HEAD ended with exit code 1: error: no such key" in capsys.readouterr().out
    assert len(list((tmp_path / ".git").glob("worktrees/*"))) == 0
    with pytest.raises(SystemExit, match="2"):
        same_run.main(["nowhere", "HEAD"])
    assert "nowhere: no such revision here" in capsys.readouterr().err
