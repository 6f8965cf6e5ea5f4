"""Loggers are told what metrics.jsonl has, go on where they were, and never end a run; samples are kept."""

from __future__ import annotations

import json
import sys
import types
from typing import Any

import pytest

from builders import Tiny
from poetx.errors import UserError
from poetx.train.loggers import LOGGERS
from poetx.train.metrics import read_metrics
from poetx.train.progress import Reporter, RunInfo
from poetx.train.run import train

SHORT = ("train.steps=4", "train.eval_every=2", "train.checkpoint_every=2", "train.export=false")
TOLD: list[tuple[Any, ...]] = []


class Own(Reporter):
    def start(self, info: RunInfo) -> None:
        TOLD.append(("start", info.name, info.first_step, info.recipe["train"]["steps"]))

    def step(self, entry: dict[str, Any]) -> None:
        TOLD.append(("train", entry))

    def validation(self, entry: dict[str, Any]) -> None:
        TOLD.append(("validation", entry))

    def sample(self, entry: dict[str, Any]) -> None:
        TOLD.append(("sample", entry))

    def stop(self) -> None:
        TOLD.append(("stop",))


class Failing(Reporter):
    def validation(self, entry: dict[str, Any]) -> None:
        raise ConnectionError("no route")


class Notes(Reporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_logger_of_ones_own_is_told_what_metrics_have_and_a_failing_one_is_left_out(tiny: Tiny) -> None:
    TOLD.clear()
    own = f"train.report_to=[{__name__}:Own, {__name__}:Failing]"
    notes = Notes()
    result = train(tiny(*SHORT, own, "train.sample_tokens=3"), reporter=notes)
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    assert TOLD[0] == ("start", "tiny", 0, 4)
    assert TOLD[-1] == ("stop",)
    assert [entry for _, entry in TOLD[1:-1]] == [
        line for line in lines if line["event"] in ("train", "validation", "sample")
    ]
    assert sum("Failing failed (ConnectionError: no route)" in note for note in notes.notes) == 1


def test_samples_at_every_evaluation_change_no_number(tiny: Tiny) -> None:
    plain = read_metrics(train(tiny(*SHORT, run_dir="a")).run_dir / "metrics.jsonl")
    result = train(tiny(*SHORT, "train.sample_tokens=5", run_dir="b"))
    lines = read_metrics(result.run_dir / "metrics.jsonl")
    kept = [line for line in lines if line["event"] == "sample"]
    assert [line["step"] for line in kept] == [0, 2, 4]
    for line in kept:
        assert len(line["samples"]) == 2
        assert all(sample["prompt"] and isinstance(sample["text"], str) for sample in line["samples"])
    assert len({json.dumps(line["samples"]) for line in kept}) > 1
    rest = [line for line in lines if line["event"] != "sample"]
    assert [line.get("loss") for line in rest] == [line.get("loss") for line in plain]


def test_a_model_that_cannot_write_is_no_failure(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from poetx.train import samples

    monkeypatch.setattr(samples, "continued", lambda *a, **k: [][1])
    notes = Notes()
    result = train(tiny(*SHORT, "train.sample_tokens=5"), reporter=notes)
    assert result.step == 4
    assert sum(note.startswith("no samples: ") for note in notes.notes) == 1


@pytest.mark.parametrize("name", LOGGERS)
def test_a_missing_package_is_one_line_before_anything_is_written(
    name: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("torch.utils.tensorboard", "wandb", "trackio", "mlflow"):
        monkeypatch.setitem(sys.modules, module, None)
    recipe = tiny(*SHORT, f"train.report_to={name}")
    with pytest.raises(UserError, match=rf"^train\.report_to={name}: is not installed; pip install {name}, or leave"):
        train(recipe)
    assert not recipe.directory.exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tensorbord", "did you mean 'tensorboard'"),
        ("no:Such", "cannot be made .*; put the directory of no on PYTHONPATH"),
        ("failing:Logger", r"cannot be made \(KeyError: 'token'\)$"),
    ],
)
def test_a_name_that_is_none(name: str, said: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError("token")

    monkeypatch.setitem(sys.modules, "failing", types.SimpleNamespace(Logger=fail))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=said):
        train(tiny(*SHORT, f"train.report_to={name}"))


class Service(types.ModuleType):
    """Stands in for wandb, trackio and mlflow: keeps calls and their keywords, and gives runs a name of its own."""

    def __init__(self) -> None:
        super().__init__("service")
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.id, self.info = "r17", types.SimpleNamespace(run_id="r17")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: (self.calls.append((name, args, kwargs)), self)[1]

    def given(self, name: str) -> list[dict[str, Any]]:
        return [kwargs for called, _, kwargs in self.calls if called == name]


@pytest.mark.parametrize(
    ("logger", "begin", "key", "place"),
    [("wandb", "init", "id", "r17"), ("trackio", "init", "name", None), ("mlflow", "start_run", "run_id", "r17")],
)
def test_a_resumed_run_goes_on_in_the_same_place(
    logger: str, begin: str, key: str, place: str | None, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service()
    monkeypatch.setitem(sys.modules, logger, service)
    train(tiny(*SHORT, f"train.report_to={logger}"))
    (first,) = service.given(begin)
    if logger == "trackio":
        assert (place := first[key]).startswith("tiny run ")
    else:
        assert first[key] is None
    for path in (tiny().directory / "checkpoints").glob("step-*4"):
        (path / "model.safetensors").write_bytes(b"")
    service.calls.clear()
    train(tiny(*SHORT, f"train.report_to={logger}"), resume=True)
    (again,) = service.given(begin)
    assert again[key] == place
    log = "log_metrics" if logger == "mlflow" else "log"
    steps = [kwargs["step"] for kwargs in service.given(log)]
    assert steps == [3, 4, 4]
    assert service.calls[-1][0] in ("finish", "end_run")
    service.calls.clear()
    train(tiny(*SHORT, f"train.report_to={logger}"), overwrite=True)
    assert service.given(begin)[0][key] != place


def test_tensorboard_writes_events_and_goes_on(tiny: Tiny) -> None:
    pytest.importorskip("tensorboard")
    result = train(tiny(*SHORT, "train.report_to=tensorboard", "train.sample_tokens=3"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(result.run_dir / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
