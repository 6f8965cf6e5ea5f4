"""Comparisons: equal terms, the same table however often they are killed, an honest search, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from poetx.cli import main
from poetx.cli.compare import seconds_in
from poetx.compare import trials
from poetx.compare.page import frontier, memory_figures, table
from poetx.errors import UserError
from poetx.files import locked
from poetx.recipe import Recipe, with_method
from poetx.recipe.several import load_methods, methods_in
from poetx.train.metrics import put_elapsed_

Tiny = Callable[..., Recipe]
METHODS = ("adamw", "single-step")
TIMES = ("tokens_per_second",)


def rows_of(recipe: Recipe, directory: Path, *, methods: tuple[str, ...] = METHODS, say: Any = print) -> list[dict]:
    recipes = {name: with_method(recipe, name) for name in methods}
    steps = trials.open_comparison(directory, recipes, [0], sweep=False, steps=lambda: 6)
    return list(trials.compare(recipes, directory, steps=steps, seeds=[0], sweep=False, say=say))


def told(rows: list[dict]) -> list[dict]:
    """Rows without what differs from run to run."""
    curve = [[[point[0], point[2]] for point in row["curve"]] for row in rows]
    return [
        {key: value for key, value in row.items() if key not in TIMES} | {"curve": points}
        for row, points in zip(rows, curve, strict=True)
    ]


def test_a_comparison_killed_anywhere_gives_the_same_rows(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny("train.dtype=float32")
    whole = rows_of(recipe, tmp_path / "whole")
    assert [row["method"] for row in whole] == list(METHODS)
    assert all(row["tokens"] == 6 * 4 * 16 and row["steps"] == 6 and math.isfinite(row["loss"]) for row in whole)
    assert whole[1]["state"] < whole[0]["state"]
    for row in whole:
        assert row["measured_peak"] == pytest.approx(row["predicted_peak"], rel=0.05), row["method"]

    def stop_at_the_second(text: str) -> None:
        if text.startswith("single-step"):
            raise KeyboardInterrupt

    place = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        rows_of(recipe, place, say=stop_at_the_second)
    said: list[str] = []
    assert told(rows_of(recipe, place, say=said.append)) == told(whole)
    assert [text.split(",")[0] for text in said] == ["single-step"]  # what was done is not done again
    metrics = place / "adamw/seed-0/metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-3]))  # as a kill leaves it
    more = rows_of(recipe, place, methods=(*METHODS, "sinkgd"))
    assert told(more)[:2] == told(whole)
    for row in more:
        seconds = [point[1] for point in row["curve"]]
        assert seconds == sorted(seconds)
    assert more[2]["curve"][0][2] == whole[0]["curve"][0][2]  # the same model and text


def test_seconds_add_up_over_the_processes_of_a_run() -> None:
    clock = [(1, 5.0), (2, 9.0), (3, 2.0), (4, 4.0), (5, 1.0)]  # killed and continued after steps 2 and 4
    entries: list[dict[str, Any]] = [{"event": "train", "step": step, "seconds": seconds} for step, seconds in clock]
    put_elapsed_(entries)
    assert [entry["elapsed"] for entry in entries] == [5.0, 9.0, 11.0, 13.0, 14.0]


def test_another_comparison_in_the_same_place_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    recipe, place = tiny("train.dtype=float32"), tmp_path / "place"
    by = {"adamw": with_method(recipe, "adamw")}
    assert trials.open_comparison(place, by, [0], sweep=False, steps=lambda: 7) == 7
    assert trials.open_comparison(place, by, [0], sweep=False, steps=lambda: 9) == 7
    told = json.loads((place / trials.SETTINGS).read_text())
    del told["methods"]["adamw"]["data"]["text_field"]  # as a version wrote it that did not have the key
    (place / trials.SETTINGS).write_text(json.dumps(told))
    assert trials.open_comparison(place, by, [0], sweep=False, steps=lambda: 9) == 7
    other = {"adamw": by["adamw"].with_keys({"optimizer.lr": 0.5})}
    with pytest.raises(UserError, match=r"compares adamw with another recipe \(optimizer.lr: .* -> 0.5\)"):
        trials.open_comparison(place, other, [0], sweep=False, steps=lambda: 7)
    with pytest.raises(UserError, match=r"seeds=\[0\], not \[0, 1\]"):
        trials.open_comparison(place, by, [0, 1], sweep=False, steps=lambda: 7)
    with pytest.raises(UserError, match=r"budget=None, not 60; give another --out"):
        trials.open_comparison(place, by, [0], sweep=False, steps=lambda: 7, budget=60)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no comparison"):
        trials.open_comparison(tmp_path, by, [0], sweep=False, steps=lambda: 7)


@pytest.mark.parametrize("change", [{"steps": "7"}, {"steps": 0}, {"methods": []}, {"methods": {"adamw": 1}}])
def test_a_damaged_comparison_is_one_line(change: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    by = {"adamw": with_method(tiny("train.dtype=float32"), "adamw")}
    trials.open_comparison(tmp_path, by, [0], sweep=False, steps=lambda: 7)
    file = tmp_path / trials.SETTINGS
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=r"comparison\.json: damaged; remove its directory, or give another --out"):
        trials.open_comparison(tmp_path, by, [0], sweep=False, steps=lambda: 7)


def test_runs_on_text_that_has_changed_are_not_compared_and_lost_lines_are_trained_again(
    tiny: Tiny, tmp_path: Path
) -> None:
    text, place = tmp_path / "text.txt", tmp_path / "place"
    text.write_text("some words in a row\n" * 900)
    recipe = tiny("train.dtype=float32", f"data.train={text}")
    whole = rows_of(recipe, place, methods=("adamw",))
    metrics = place / "adamw/seed-0/metrics.jsonl"
    for lost in ('"validation"', '"step": 3,', '"audit"'):
        lines = metrics.read_text().splitlines(keepends=True)
        metrics.write_text("".join(line for line in lines if lost not in line))
        assert told(rows_of(recipe, place, methods=("adamw",))) == told(whole)
    text.write_text("other words in a line\n" * 900)
    with pytest.raises(UserError, match=r"place: was begun on other text .* give another --out"):
        rows_of(recipe, place, methods=("adamw", "rmnp"))
    assert not (place / "rmnp").exists()


@pytest.mark.parametrize("method", ["adamw", "scale", "single-step", "fast", "lora"])
def test_a_search_finds_the_best_rates_with_as_many_trials_for_each(
    method: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_method(tiny("train.dtype=float32"), method)
    rates = trials.rates_of(recipe)
    best = {key: rate * (2 if i == 0 else 1) for i, (key, rate) in enumerate(rates.items())}
    asked: list[trials.Trial] = []

    def run(trial: trials.Trial, say: Any) -> dict[str, Any]:
        asked.append(trial)
        own = trials.rates_of(trial.recipe)
        assert own == pytest.approx(trial.rates)  # the recipe has the rates that the row tells
        return {"loss": sum(abs(math.log(own[key] / best[key])) for key in own)}

    monkeypatch.setattr(trials, "_run", run)
    found, note = trials._search(method, recipe, rates, tmp_path, steps=40, seed=3, say=print)
    assert found == pytest.approx(best)
    assert note == ""
    assert [trial.recipe.train.steps for trial in asked] == [5] * 8 + [10] * 4 + [20] * 2
    assert all(trial.recipe.train.seed == 3 for trial in asked)
    assert len({trial.place for trial in asked}) == 14
    best = {key: rate * 1e3 for key, rate in rates.items()}
    assert (
        "at the edge of what was tried"
        in trials._search(method, recipe, rates, tmp_path, steps=40, seed=3, say=print)[1]
    )


def row(method: str, loss: float | None, peak: int, seed: int = 0) -> dict[str, Any]:
    return {
        **{"method": method, "seed": seed, "rates": {"optimizer.lr": 1e-3}, "steps": 5, "tokens": 100, "loss": loss},
        **{"tokens_per_second": 10.0, "measured_peak": peak, "predicted_peak": peak, "weights": 1, "state": 2},
        **{"gradient": 3, "trained": 4, "rates_note": "", "curve": [[0, 0.0, 4.0], [100, 9.0, loss]]},
    }


def test_the_frontier_is_what_no_other_beats_in_both() -> None:
    rows = [row("a", 3.0, 100), row("b", 2.0, 200), row("c", 2.5, 300), row("d", 1.0, 400), row("e", None, 1)]
    assert frontier(rows) == ["a", "b", "d"]
    assert [line[0] for line in table(rows)] == ["d", "b", "c", "a", "e"]
    both = [row("a", 2.0, 1), row("a", 3.0, 1, seed=1), row("a", None, 1, seed=2)]
    assert table(both)[0][1:4] == ["2.5000 (1 diverged)", "2.0000 to 3.0000", "3"]


@pytest.mark.parametrize(
    ("losses", "named", "edge"),
    [
        ([3.28, 3.35, 3.50, 3.64, 7.24], ["a", "b", "c", "d", "e 7.24"], 3.64),
        ([3.28, 3.35, 3.50, 3.64, 4.0], ["a", "b", "c", "d", "e"], 4.0),
        ([3.28, 7.24], ["a", "b"], 7.24),
        ([3.0, 3.0, 7.0], ["a", "b", "c"], 7.0),
        ([3.0], ["a"], 3.0),
    ],
)
def test_a_loss_far_above_most_does_not_flatten_the_picture(losses: list[float], named: list[str], edge: float) -> None:
    rows = [row(name, loss, 100 * number) for number, (name, loss) in enumerate(zip("abcde", losses, strict=False), 1)]
    for chart in memory_figures([*rows, row("broken", None, 1)]):
        for axis in chart.axes:
            low, high = axis.get_ylim()
            assert low < min(losses)
            assert edge < high < edge + 0.3 * max(edge - min(losses), 1.0)
            assert sorted(text.get_text() for text in axis.texts) == named
            drawn = [line for line in axis.lines if line.get_marker() in "o^"]
            assert len(drawn) == len(losses)
            assert all(low < line.get_ydata()[0] < high for line in drawn)
            assert sum(line.get_marker() == "^" for line in drawn) == (named[-1] == "e 7.24")


def test_many_methods_are_numbered_and_listed_from_the_lowest_loss_on() -> None:
    names = [f"single-step-with-a-long-name-{letter}" for letter in "abcdefghijklm"]
    losses = [3.9 - 0.01 * number for number in range(len(names))]
    for chart in memory_figures([row(name, loss, 100) for name, loss in zip(names, losses, strict=True)]):
        (axis,) = chart.axes
        listed, *beside = (text.get_text() for text in axis.texts)
        assert listed.splitlines() == [f"{number}  {name}" for number, name in enumerate(reversed(names), start=1)]
        assert beside == [str(number) for number in range(len(names), 0, -1)]


def test_so_are_a_few_where_a_name_is_long() -> None:
    names = ["adamw", "single-step-with-a-long-name"]
    for chart in memory_figures([row(name, 3.9, 100) for name in names]):
        (axis,) = chart.axes
        assert [text.get_text() for text in axis.texts][1:] == ["1", "2"]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        assert tag not in ("script", "link", "img"), tag  # nothing from elsewhere

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_command_writes_table_page_and_rows(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text(tiny("train.dtype=float32").to_yaml())
    out = tmp_path / "out"
    command = ["compare", str(tmp_path / "mine.yaml"), "--methods", "adamw,rmnp", "--steps", "4", "--out", str(out)]
    assert main(command) == 0
    assert "on the frontier of loss and memory" in capsys.readouterr().out
    page = Page((out / "index.html").read_text())
    assert page.tags.count("svg") == 4
    assert "not searched" in page.words
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [r["method"] for r in rows] == ["adamw", "rmnp"]
    assert all(f"| {name} | " in (out / "table.md").read_text() for name in ("adamw", "rmnp"))
    assert not list(out.rglob("checkpoints"))
    assert main([*command[:3], "sgd", *command[4:]]) == 0  # another method, later
    assert [json.loads(line)["method"] for line in (out / "results.jsonl").read_text().splitlines()] == [
        *("adamw", "rmnp", "sgd")
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "adamw", "--steps", "4", "--budget", "1m"], "--steps and --budget are both given"),
        (["--methods", "adamw", "--budget", "soon"], "--budget soon: write a time such as 90s, 30m or 4h"),
        (["--methods", "adamw", "--budget", "0m"], "--budget 0m: write a time"),
        (["--methods", "adamw", "--seeds", "0,0"], "--seeds 0,0: write different whole numbers"),
        (["--methods", "adamv"], "method=adamv: no such method; did you mean"),
        ([], "--methods is missing"),
        (["--methods", "adamw", "train.seed=3"], "train.seed: is what compare settles for all runs (--seeds); leave"),
        (["--methods", "adamw", "train={export: true}"], "train.export: is what compare settles for all runs"),
        (["--methods", "adamw", "--lr", "3"], "--lr: no such option"),
    ],
)
def test_refusals_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "demo", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_settings_of_a_method_that_nothing_reads_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    mine, file = tmp_path / "mine.yaml", tmp_path / "methods.yaml"
    mine.write_text(tiny().to_yaml())
    for own, said in (
        (
            "poet.merge_angle: 0.3, poet.merge_every: null",
            "poet.merge_angle=0.3: has no effect without poet.merge_every",
        ),
        ("optimizer.clip_ramp_start: 0.5, optimizer.clip: null", "optimizer.clip_ramp_start=0.5: has no effect"),
        ("poet.residual_modules: [o_proj]", "poet.residual_modules=.*: has no effect without poet.residual_scale"),
        ("poet.mode: mem", "poet.mode=mem: method=fast means another poet.mode; give one of the two"),
        ("poet.method: single-step", "poet.method=single-step: method=fast means another"),
    ):
        file.write_text(f"mine: {{method: fast, {own}}}")
        with pytest.raises(UserError, match=f"--methods: mine: {said}"):
            load_methods(str(mine), [], methods_in([str(file)]))


def test_two_comparisons_at_once_in_one_place_are_refused(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(tiny("train.dtype=float32").to_yaml())
    out = tmp_path / "out"
    with locked(tmp_path / ".out.lock"):
        code = main(["compare", str(tmp_path / "mine.yaml"), "--methods", "adamw", "--steps", "4", "--out", str(out)])
    assert code == 2
    assert "out: another comparison runs there; wait, or give another --out" in capsys.readouterr().err
    assert not out.exists()


def test_times_are_read_and_a_budget_that_is_too_small_is_refused(tiny: Tiny) -> None:
    assert [seconds_in(text) for text in ("90s", "1.5m", "2h")] == [90, 90, 7200]
    recipes = {"adamw": tiny("train.dtype=float32", "method=adamw")}
    with pytest.raises(UserError, match=r"--budget of 0.001 seconds is 0 steps a run"):
        trials.steps_in(recipes, 0.001, seeds=1, sweep=False)
    few, many = (trials.steps_in(recipes, 600, seeds=1, sweep=sweep) for sweep in (True, False))
    assert 20 < few < many


def test_methods_have_labels_and_settings_of_their_own(tiny: Tiny, tmp_path: Path) -> None:
    mine, file = tmp_path / "mine.yaml", tmp_path / "methods.yaml"
    mine.write_text(tiny("optimizer.betas=[0.8, 0.9]").to_yaml())
    file.write_text(
        "small: {method: single-step, poet.block_size: 2}\n"
        "large: {method: single-step, optimizer.angle: 0.02, optimizer.name: smmf}\n"
        "adamw: {optimizer.matrix_lr: 3.0e-3, model.residual_scale: 0.5}\n"
    )
    recipes = load_methods(str(mine), ["train.steps=3"], methods_in(["muon", str(file)]))
    assert list(recipes) == ["muon", "small", "large", "adamw"]
    assert [recipes[name].poet.block_size for name in ("small", "large")] == [2, tiny().poet.block_size]
    ends = with_method(tiny(), "scale").with_keys({"optimizer.end_lr": 5e-3})
    assert trials.rates_of(ends) == {"optimizer.matrix_lr": 1e-3, "optimizer.end_lr": 5e-3}
    assert trials.rates_of(recipes["adamw"]) == {"optimizer.matrix_lr": 3e-3, "optimizer.lr": tiny().optimizer.lr}
    assert all(recipe.train.steps == 3 for recipe in recipes.values())
    assert list(methods_in([f"{file}:large", "lora"])) == ["large", "lora"]


@pytest.mark.parametrize(
    ("words", "text", "said"),
    [
        (["adam"], "", "no such method; did you mean 'adamw'"),
        (["{file}:smal"], "small: {method: lora}", "no smal there; did you mean 'small'"),
        (["{file}", "lora"], "lora: {}", "lora is there twice"),
        (["{file}"], "../up: {method: lora}", "a label is text of letters"),
        (["{file}"], "..: {method: lora}", "a label is text of letters"),
        (["{file}"], "8: {method: lora}", "8: a label is text of letters, .*; quote a number"),
        (["{file}"], "yes: {method: lora}", "True: a label is text"),
        (["{file}"], "mine: 3", "mine: must be LABEL"),
        (["{file}"], "lora: {train.steps: 5}", "lora: train.steps: all methods have the same model, text, tokens and"),
        (["{file}"], "lora: {train.seed: 5}", "lora: train.seed: all methods"),
        (["{file}"], "lora: {data.seq_len: 8}", "lora: data.seq_len: all methods"),
        (["{file}"], "lora: {model.hidden_size: 8}", "lora: model.hidden_size: all methods"),
        (["{file}"], "index.html: {method: lora}", "index.html: would be a file that compare writes"),
        (["{file}"], "lora: {parallel: fsdp}", "lora: parallel: all methods"),
        (["{file}"], "- lora", "must say LABEL"),
        (["{file}"], "mine: {optimizer.lr: 1}", "method=mine: no such method"),
        (["no.yaml"], "", "no.yaml: .*No such file"),
    ],
)
def test_methods_that_cannot_be(words: list[str], text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "methods.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        methods_in([word.format(file=file) for word in words])
