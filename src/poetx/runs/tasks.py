"""Scores of a run or an exported model on the tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from poetx.errors import UserError, one_line
from poetx.runs.load import load_run


def evaluate_tasks(
    run: str,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: str | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> dict[str, dict[str, Any]]:
    """Metrics of each task by name, as ``lm_eval.simple_evaluate`` gives them.

    Args:
        limit: so many questions of each task; None: all.
        include_path: a directory with tasks of one's own.

    Raises:
        UserError: lm-eval is not installed, there is no such task, or its data cannot be had.
    """
    try:
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--tasks: lm-evaluation-harness is not installed; pip install 'poetx[eval]'") from None
    manager = TaskManager(include_path=include_path)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(f"--tasks={unknown[0]}: no such task; `lm-eval ls tasks` names them")
    loaded = load_run(run, device=device)
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
    try:
        found = simple_evaluate(model=model, tasks=list(tasks), limit=limit, task_manager=manager)
    except (OSError, ConnectionError, ValueError) as error:  # a data set that cannot be had
        raise UserError(f"--tasks={','.join(tasks)}: {type(error).__name__}: {one_line(error)[:200]}") from None
    assert found is not None
    return found["results"]


def score_lines(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for every metric of every task, with its standard error where there is one."""
    for task, metrics in results.items():
        for key, value in metrics.items():
            name, _, which = key.partition(",")
            if isinstance(value, bool) or not isinstance(value, int | float) or name.endswith("_stderr"):
                continue
            error = metrics.get(f"{name}_stderr,{which}" if which else f"{name}_stderr")
            more = f" ± {error:.4f}" if isinstance(error, int | float) else ""
            label = name if which in ("", "none") else f"{name} ({which})"
            yield f"{task:24}{label:28}" + (str(value) if name == "sample_len" else f"{value:.4f}{more}")
