"""Other programs that keep a run's numbers: ``train.report_to``. ``metrics.jsonl`` is written whatever they do.

A logger is a :class:`~poetx.train.progress.Reporter`; one of your own is named ``module:Class`` and made without
arguments. A run that is resumed goes on in the same place of each.
"""

from __future__ import annotations

import html
import importlib
import json
import math
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from poetx.errors import UserError, nearest, one_line
from poetx.files import read_json, write_text
from poetx.train.progress import Reporter, RunInfo

PLACES = "loggers.json"  # in the run directory: what each calls the run
TENSORBOARD_DIR = "tensorboard"
_PROJECT = "poetx"


class Logger(Reporter):
    """Hands numbers and samples to a program that keeps them."""

    package = ""

    def __init__(self) -> None:
        self._module = _imported(self.package)

    def step(self, entry: dict[str, Any]) -> None:
        self._put("train", entry)

    def validation(self, entry: dict[str, Any]) -> None:
        self._put("validation", entry)

    def sample(self, entry: dict[str, Any]) -> None:
        for number, text in enumerate(entry["samples"]):
            self.text(f"sample {number}", text["prompt"] + text["text"], entry["step"])

    def _put(self, event: str, entry: dict[str, Any]) -> None:
        kept = {key: float(value) for key, value in entry.items() if isinstance(value, int | float) and key != "step"}
        self.numbers({f"{event}/{key}": value for key, value in kept.items() if math.isfinite(value)}, entry["step"])

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Keep these numbers of a step."""

    def text(self, name: str, text: str, step: int) -> None:
        """Keep a text of a step."""


class TensorBoard(Logger):
    """Writes events to ``tensorboard/`` in the run directory."""

    package = "torch.utils.tensorboard"

    def start(self, info: RunInfo) -> None:
        self._writer = self._module.SummaryWriter(
            log_dir=str(info.run_dir / TENSORBOARD_DIR), purge_step=info.first_step + 1 if info.first_step else None
        )

    def numbers(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, f"```\n{text}\n```", step)

    def stop(self) -> None:
        self._writer.close()


class WandB(Logger):
    """Weights & Biases; project and account are those of its own settings and environment."""

    package = "wandb"

    def start(self, info: RunInfo) -> None:
        known = _place(info.run_dir, self.package)
        self._run = self._module.init(
            project=None if os.environ.get("WANDB_PROJECT") else _PROJECT,
            name=info.name,
            config=info.recipe,
            dir=str(info.run_dir),
            id=known,
            resume="allow",
        )
        _keep(info.run_dir, self.package, self._run.id)

    def numbers(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        self._run.log({name: self._module.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def stop(self) -> None:
        self._run.finish()


class Trackio(Logger):
    """Trackio, on this machine unless its environment says otherwise."""

    package = "trackio"

    def start(self, info: RunInfo) -> None:
        # Its runs are known by their names: another one of this name would be gone on with.
        name = _place(info.run_dir, self.package) or f"{info.name} {info.run_dir.name} {secrets.token_hex(3)}"
        self._module.init(project=_PROJECT, name=name, config=info.recipe, resume="allow")
        _keep(info.run_dir, self.package, name)

    def numbers(self, values: dict[str, float], step: int) -> None:
        self._module.log(values, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        self._module.log({name: text}, step=step)

    def stop(self) -> None:
        self._module.finish()


class MLflow(Logger):
    """MLflow; server and experiment are those of its own environment."""

    package = "mlflow"

    def start(self, info: RunInfo) -> None:
        known = _place(info.run_dir, self.package)
        self._run = self._module.start_run(run_id=known, run_name=None if known else info.name)
        _keep(info.run_dir, self.package, self._run.info.run_id)
        if known is None:
            self._module.log_dict(info.recipe, "recipe.json")

    def numbers(self, values: dict[str, float], step: int) -> None:
        self._module.log_metrics(values, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        self._module.log_text(text, f"samples/step-{step:08}/{name}.txt")

    def stop(self) -> None:
        self._module.end_run()


LOGGERS: dict[str, Callable[[], Reporter]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}


class Several(Reporter):
    """The first reporter, and others beside it, which a run does not fail of: one that does is told of and left out."""

    def __init__(self, first: Reporter, others: Sequence[Reporter]) -> None:
        self._first, self._others = first, list(others)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Reporter, name):
            return object.__getattribute__(self, name)
        return lambda *arguments: self._tell(name, *arguments)

    def _tell(self, name: str, *arguments: Any) -> None:
        getattr(self._first, name)(*arguments)
        for other in list(self._others):
            try:
                getattr(other, name)(*arguments)
            except Exception as error:  # whatever a service raises
                self._others.remove(other)
                what = f"{type(error).__name__}: {one_line(error)[:160]}"
                self._first.note(f"{type(other).__name__} failed ({what}); the run goes on without it")


def with_loggers(reporter: Reporter, names: str | Sequence[str] | None) -> Reporter:
    """``reporter``, and the loggers that ``train.report_to`` names beside it.

    Raises:
        UserError: no such logger, or its package is not installed.
    """
    names = [names] if isinstance(names, str) else list(names or ())
    return Several(reporter, [_made(name) for name in names]) if names else reporter


def _made(name: str) -> Reporter:
    module, _, attribute = name.partition(":")
    if not attribute and name not in LOGGERS:
        raise UserError(
            f"train.report_to={name}: must be one of {', '.join(LOGGERS)}, or module:Class of your own"
            f"{nearest(name, LOGGERS)}"
        )
    try:
        return LOGGERS[name]() if name in LOGGERS else getattr(importlib.import_module(module), attribute)()
    except UserError:
        raise
    except Exception as error:
        remedy = ""
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            remedy = f"; put the directory of {error.name} on PYTHONPATH"
        what = f"{type(error).__name__}: {one_line(error)[:160]}"
        raise UserError(f"train.report_to={name}: cannot be made ({what}){remedy}") from None


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.rpartition(".")[2]
        raise UserError(
            f"train.report_to={name}: is not installed; pip install {name}, or leave it out (metrics.jsonl has it all)"
        ) from None


def _place(run_dir: Path, logger: str) -> str | None:
    return read_json(run_dir / PLACES).get(logger) if (run_dir / PLACES).is_file() else None


def _keep(run_dir: Path, logger: str, place: str) -> None:
    known = read_json(run_dir / PLACES) if (run_dir / PLACES).is_file() else {}
    write_text(run_dir / PLACES, json.dumps(known | {logger: place}))
