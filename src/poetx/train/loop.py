"""The training loop: accumulate, clip, step, evaluate, checkpoint. Data and schedule depend on the step alone.

Every rank of a process group takes its part of each batch, and they stop, skip and fail together; the first one writes.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from poetx.data.sampler import batch_windows, evenly_spread
from poetx.data.tokens import PreparedData, TokenWindows
from poetx.distributed.agreement import agreed, largest, on_first
from poetx.distributed.checksum import check_alike
from poetx.distributed.ranks import rank, rank_count, sum_
from poetx.distributed.sharded import is_sharded, reshard_
from poetx.errors import UserError
from poetx.layers.walk import converted_layers
from poetx.memory.measure import measure_memory
from poetx.models import not_finite
from poetx.ops.dispatch import machine_obstacle
from poetx.ops.random import seeded, stream_seed
from poetx.recipe import Recipe
from poetx.spectra import LayerSpectrum, spectrum
from poetx.train.checkpoint import TrainState, checkpoints, load_rng, save_checkpoint
from poetx.train.environment import peak_memory_gib
from poetx.train.metrics import MetricsWriter, perplexity
from poetx.train.progress import Reporter
from poetx.train.samples import samples
from poetx.train.schedule import clip_value, lr_factor
from poetx.train.step import StepResult, TrainingStep, language_loss, no_phase
from poetx.training_check import TrainingReport, check_training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from poetx.merge import MergeHandle


_MOVED = 1 << 16  # beyond the numbers of signals


class StopRequest:
    """Set by Ctrl-C or SIGTERM; the loop looks at it after every step."""

    signum: int | None = None


@dataclass
class TrainingRun:
    """Everything one run needs while it trains."""

    recipe: Recipe
    run_dir: Path
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    peak_lrs: list[float]  # one for each parameter group
    merges: MergeHandle | None
    data: PreparedData
    device: torch.device
    state: TrainState
    metrics: MetricsWriter
    reporter: Reporter
    start_spectrum: dict[str, LayerSpectrum] | None = None  # of the model before its first step, where it is watched
    mute: bool = False  # it cannot write samples

    @property
    def is_sharded(self) -> bool:
        """Whether every rank holds its own part of the parameters."""
        return any(map(is_sharded, self.model.parameters()))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything in the model that all ranks must hold alike, by name."""
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()


def fit(run: TrainingRun, *, resume_from: Path | None = None) -> StopRequest:
    """Train from ``run.state.step`` to the recipe's last step, or until a signal asks to stop.

    The global random generators are seeded for the duration (dropout of pretrained models draws from them) and put
    back afterwards.

    Args:
        resume_from: checkpoint whose generator states to continue with.

    Raises:
        UserError: ``train.max_bad_steps`` non-finite steps in a row, or a checkpoint that cannot be written.
    """
    settings = run.recipe.train
    with seeded(settings.seed, run.device), _deterministic(settings.deterministic), stop_signals() as stop:
        if resume_from is not None:
            load_rng(resume_from)
        _take_steps(run, stop)
    return stop


#: A closed terminal sends SIGHUP, Slurm what it was told to, often SIGUSR1.
_STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
_ALWAYS = (signal.SIGINT, signal.SIGTERM)
#: Seconds within which signals count as one: several may be sent at once.
_SOON = 1.0


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _take_steps(run: TrainingRun, stop: StopRequest) -> None:
    settings, state = run.recipe.train, run.state
    step = TrainingStep.of(run.recipe, run.model, run.optimizer, compiled=settings.compile)
    started = time.perf_counter()
    check_alike(run.tensors(), f"before step {state.step + 1}")
    if what := _compiled(run):
        run.reporter.stage(f"compiling {what} for the first steps, a minute or so unless cached ...")
    if state.step == 0:
        _validate(run, started)
        check_training(run.model, run.optimizer, tell=partial(_tell_training, run))
    signum = _agreed_stop(run, stop)
    while state.step < settings.steps and not signum:
        step_started = time.perf_counter()
        facts, memory = _measured_step(run, step)
        state.step += 1
        now = time.perf_counter()
        _record_step(run, facts, seconds=now - started, step_seconds=now - step_started)
        if memory is not None:
            run.metrics.write("memory", state.step, **memory)
        last = state.step == settings.steps
        if last or state.step % settings.eval_every == 0:
            _validate(run, started)
        if settings.spectrum_every and (last or state.step % settings.spectrum_every == 0):
            on_first(lambda: _record_spectrum(run))
        signum = _agreed_stop(run, stop)
        # During a streak of bad steps there is nothing new to keep, unless this is the end.
        due = state.step % settings.checkpoint_every == 0 and state.bad_steps_in_a_row == 0
        if due or last or signum:
            check_alike(run.tensors(), f"after step {state.step}")
            save_now = partial(_save_in_place, run, last=last)
            agreed(save_now) if run.is_sharded else on_first(save_now)
    stop.signum = signum or None


def _compiled(run: TrainingRun) -> str:
    """What the first steps compile, in words; empty: nothing."""
    own = any(True for _ in converted_layers(run.model)) and machine_obstacle(run.device) is None
    parts = ["kernels"] * (run.device.type == "cuda" and own) + ["the model"] * run.recipe.train.compile
    return " and ".join(parts)


def _agreed_stop(run: TrainingRun, stop: StopRequest) -> int:
    """The signal that has reached one of the ranks by now, alike on all of them; 0: none has."""
    found = largest(stop.signum or 0 if run.metrics.in_place() else _MOVED)
    if found == _MOVED:
        on_first(partial(_check_in_place, run))
    return found


def _save_in_place(run: TrainingRun, *, last: bool) -> None:
    """Write a checkpoint into the run's directory, if that is where it was."""
    try:
        _save_if_finite(run, last=last)
    except UserError:
        _check_in_place(run)
        raise


def _check_in_place(run: TrainingRun) -> None:
    """Stop where the run's directory has been moved or removed; saved where the system tells the new place."""
    if run.metrics.in_place():
        return
    now = None if run.is_sharded else run.metrics.place()  # the other ranks would have to hand their parts over
    found = now is not None and now.is_dir() and now != run.run_dir.resolve()
    there = f"is at {now} now" if found else "has been moved or removed"
    text = f"{run.run_dir}: {there}, which training does not follow; stopped after step {run.state.step}"
    if found:
        assert now is not None
        run.run_dir = now
        _save_if_finite(run, last=False)
        text += f"; {_last_good(run)}; continue with: poetx train {now} --resume"
    raise UserError(text)


def _tell_training(run: TrainingRun, report: TrainingReport) -> None:
    """What does not learn in the first steps, as notes and a line of metrics.jsonl; nothing where all is well."""
    if report.problems:
        run.reporter.note(str(report))
        run.metrics.write("training_check", run.state.step + 1, problems=[str(p) for p in report.problems])


def _measured_step(run: TrainingRun, step: TrainingStep) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The step, and what it took by phase where that is due: the same numbers, on the CPU several times slower.

    In a process group that of the first rank.
    """
    every = run.recipe.train.memory_every
    if every is None or rank() or (run.state.step and (run.state.step + 1) % every):
        return train_step(run, step), None
    with measure_memory(run.model, run.optimizer, device=run.device) as probe:
        # The optimizer's own hooks tell the probe of everything after backward.
        step.phase = lambda name: probe.phase(name) if name in ("forward", "backward") else None
        try:
            facts = train_step(run, step)
        finally:
            step.phase = no_phase
    return facts, probe.to_dict()


def train_step(run: TrainingRun, step: TrainingStep) -> dict[str, Any]:
    """Take the optimizer step number ``run.state.step``, counted from 0; returns its line of metrics.jsonl.

    Of several ranks each takes its part of the batch, and draws (dropout) from the seed, its number and the step.
    """
    recipe, state, optimizer = run.recipe, run.state, run.optimizer
    settings, merges, train = recipe.train, run.merges, run.data.train
    factor = lr_factor(
        state.step,
        steps=settings.steps,
        warmup_steps=recipe.optimizer.warmup_steps,
        min_ratio=recipe.optimizer.min_lr_ratio,
    )
    for group, peak in zip(optimizer.param_groups, run.peak_lrs, strict=True):
        group["lr"] = peak * factor
    clip = clip_value(
        recipe.optimizer,
        step=state.step,
        merges=merges.merges if merges else 0,
        steps_since_merge=merges.steps_since_merge if merges else 0,
    )
    windows = batch_windows(state.step, batch_size=settings.batch_size, windows=train.order, seed=settings.seed)
    share, micro_batch = settings.share(rank_count())
    if rank_count() > 1:
        torch.manual_seed(stream_seed(settings.seed, f"rank {rank()}", state.step, "dropout"))
    first = rank() * share
    batch = train.batch(windows[first : first + share])
    micro_batches = [batch.rows(start, start + micro_batch).to(run.device) for start in range(0, share, micro_batch)]
    merges_before = merges.merges if merges else 0
    result = step(micro_batches, clip=clip, tokens=batch.counted)
    if result.skipped:
        agreed(lambda: _count_bad_step(run, result))
    else:
        state.bad_steps_in_a_row = 0
    merged = merges is not None and merges.merges > merges_before
    facts = {"loss": result.loss, "grad_norm": result.grad_norm, "clip": clip}
    if step.acts_in_backward:
        facts["grad_norm_of"] = "rest"  # what is not rotated and not released
    if result.router_loss is not None:
        facts["router_loss"] = result.router_loss
    facts |= {f"lr_{group['name']}": group["lr"] for group in optimizer.param_groups}
    return facts | {"merged": merged} | _merge_facts(merges if merged else None) | {"skipped": result.skipped}


@torch.no_grad()
def evaluate(
    model: Any,
    data: TokenWindows,
    windows: list[int],
    *,
    batch_size: int,
    device: torch.device,
    chunked: bool = False,
    autocast: bool = False,
) -> float:
    """Mean loss in nats a label over these windows, the model in eval mode for the duration.

    ``chunked``: without the logits, as :func:`chunked_loss`. ``autocast``: compute in bfloat16. Each rank of a process
    group takes its part of the windows; all get the mean over all of them.
    """
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    own = windows[rank() :: rank_count()]
    for start in range(0, len(own), batch_size):
        batch = data.batch(own[start : start + batch_size])
        tokens += batch.counted
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            body = model.base_model if chunked else model
            total += float(language_loss(model, body, *batch.to(device), chunked=chunked)[0])
    model.train(was_training)
    reshard_(model)
    if rank_count() > 1:
        total, tokens = sum_(torch.tensor([total, tokens], dtype=torch.float64, device=device)).tolist()
    return total / max(1, tokens)


def save(run: TrainingRun) -> Path:
    """Write a checkpoint of the current step."""
    path = save_checkpoint(
        run.run_dir,
        model=run.model,
        optimizer=run.optimizer,
        state=run.state,
        recipe_yaml=run.recipe.to_yaml(),
        keep=run.recipe.train.keep_checkpoints,
    )
    run.reporter.checkpoint(path)
    return path


def _last_good(run: TrainingRun) -> str:
    saved = checkpoints(run.run_dir)
    return f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"


def _save_if_finite(run: TrainingRun, *, last: bool) -> None:
    """A step may be finite and leave weights that are not; a checkpoint of those would replace a good one."""
    if not not_finite(run.model):
        save(run)
        return
    text = f"step {run.state.step}: weights are not finite, no checkpoint written; {_last_good(run)}"
    if last:
        raise UserError(f"{text}; try lower learning rates (optimizer.lr, optimizer.poet_lr)")
    run.reporter.note(text)


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn signals that ask to end into a request, where nobody else handles or ignores them; main thread only.

    One that comes a second after the first, or later, acts as usual.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    usual = (signal.SIG_DFL, signal.default_int_handler)
    found = (getattr(signal, name, None) for name in _STOP_SIGNALS)
    previous = {number: signal.getsignal(number) for number in found if number is not None}
    previous = {number: before for number, before in previous.items() if before in usual or number in _ALWAYS}
    first = math.inf

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if time.monotonic() - first > _SOON:
            signal.signal(number, previous[number])
            signal.raise_signal(number)
        elif stop.signum is None:
            stop.signum, first = number, time.monotonic()

    for number in previous:
        signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _validate(run: TrainingRun, started: float) -> None:
    settings, data = run.recipe.train, run.data.validation
    windows = evenly_spread(settings.eval_windows, len(data))
    loss = evaluate(
        run.model,
        data,
        windows,
        batch_size=settings.share(rank_count())[1],
        device=run.device,
        chunked=settings.chunked_loss,
        autocast=settings.autocast,
    )
    entry = run.metrics.write(
        "validation",
        run.state.step,
        loss=loss,
        perplexity=perplexity(loss),
        tokens=data.counted(windows),
        seconds=round(time.perf_counter() - started, 3),
    )
    run.reporter.validation(entry)
    if found := samples(run):
        run.reporter.sample(run.metrics.write("sample", run.state.step, samples=found))


def _record_spectrum(run: TrainingRun) -> None:
    """Singular values of every rotated layer against the start: ratios and drifts, one line for all layers."""
    if not run.start_spectrum:
        return
    layers = {
        name: {
            "norm_ratio": now.norm_ratio,
            "drift_median": now.drift_median,
            "drift_max": now.drift_max,
            "entropy": now.entropy,
        }
        for name, now in spectrum(run.model, run.start_spectrum).items()
    }
    run.metrics.write("spectrum", run.state.step, layers=layers)


def _record_step(run: TrainingRun, facts: dict[str, Any], *, seconds: float, step_seconds: float) -> None:
    recipe = run.recipe
    entry = run.metrics.write(
        "train",
        run.state.step,
        **facts,
        tokens_per_second=round(recipe.train.batch_size * recipe.data.seq_len / step_seconds, 1),
        seconds=round(seconds, 3),
        peak_memory_gib=round(peak_memory_gib(run.device), 3),
    )
    run.reporter.step(entry)


def _merge_facts(merges: MergeHandle | None) -> dict[str, float]:
    """What the merge of this step folded: largest angle in radians, largest drift of a weight's norm."""
    report = merges.report if merges else None
    return {} if report is None else {"merge_angle": report.angle, "norm_drift": report.norm_drift}


def _count_bad_step(run: TrainingRun, result: StepResult) -> None:
    state, limit = run.state, run.recipe.train.max_bad_steps
    state.skipped_steps += 1
    state.bad_steps_in_a_row += 1
    what = f"step {state.step + 1}: loss {result.loss}, gradient norm {result.grad_norm}"
    run.reporter.note(f"{what}: step skipped")
    if state.bad_steps_in_a_row >= limit:
        raise UserError(
            f"{what}: {limit} non-finite steps in a row (train.max_bad_steps), stopped; {_last_good(run)}; "
            "try lower learning rates (optimizer.lr, optimizer.poet_lr) or a longer optimizer.warmup_steps"
        )
