"""The training loop: accumulate, clip, step, evaluate, checkpoint. Data and schedule depend on the step alone."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

from poetx.data.sampler import batch_windows, evenly_spread
from poetx.data.tokens import PreparedData, TokenWindows
from poetx.errors import UserError
from poetx.layers.shared_blocks import shared_blocks
from poetx.memory.measure import measure_memory
from poetx.optim.gradient_release import ReleaseHandle
from poetx.recipe import Recipe
from poetx.savings.chunked_loss import chunked_cross_entropy
from poetx.spectra import LayerSpectrum, spectrum
from poetx.train.checkpoint import TrainState, checkpoints, load_rng, save_checkpoint
from poetx.train.environment import peak_memory_gib
from poetx.train.metrics import MetricsWriter, perplexity
from poetx.train.progress import Reporter
from poetx.train.schedule import clip_value, lr_factor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from poetx.merge import MergeReport


class MergeHandle(Protocol):
    """What the loop reads of the object that :func:`poetx.merge_every` returns."""

    steps_since_merge: int
    merges: int
    report: MergeReport | None


class StopRequest:
    """Set by Ctrl-C or SIGTERM; the loop looks at it after every step."""

    signum: int | None = None


def _no_phase(name: str) -> None:
    """Nobody measures."""


@dataclass
class Trainer:
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
    phase: Callable[[str], None] = _no_phase  # told when forward and backward begin, while memory is measured
    start_spectrum: dict[str, LayerSpectrum] | None = None  # of the model before its first step, where it is watched
    release: ReleaseHandle | None = None


@dataclass(frozen=True)
class StepResult:
    """Loss and gradient norm of one optimizer step, and what became of it."""

    loss: float  # mean over the tokens of the batch, nats
    grad_norm: float  # before clipping
    clip: float | None
    merged: bool
    skipped: bool


def fit(trainer: Trainer, *, resume_from: Path | None = None) -> StopRequest:
    """Train from ``trainer.state.step`` to the recipe's last step, or until a signal asks to stop.

    The global random generators are seeded for the duration (dropout of pretrained models draws from them) and put
    back afterwards.

    Args:
        resume_from: checkpoint whose generator states to continue with.

    Raises:
        UserError: ``train.max_bad_steps`` non-finite steps in a row, or a checkpoint that cannot be written.
    """
    cuda_devices = [trainer.device] if trainer.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=cuda_devices),
        _deterministic(trainer.recipe.train.deterministic),
        stop_signals() as stop,
    ):
        torch.manual_seed(trainer.recipe.train.seed)
        if resume_from is not None:
            load_rng(resume_from)
        _run(trainer, stop)
    return stop


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _run(trainer: Trainer, stop: StopRequest) -> None:
    settings, state = trainer.recipe.train, trainer.state
    model: Any = trainer.model
    body = model.base_model if settings.chunked_loss else model
    forward = torch.compile(body) if settings.compile else body
    started = time.perf_counter()
    if state.step == 0:
        _validate(trainer, started)
    while state.step < settings.steps and stop.signum is None:
        step_started = time.perf_counter()
        result, memory = _measured_step(trainer, forward)
        state.step += 1
        now = time.perf_counter()
        _record_step(trainer, result, seconds=now - started, step_seconds=now - step_started)
        if memory is not None:
            trainer.metrics.write("memory", state.step, **memory)
        last = state.step == settings.steps
        if last or state.step % settings.eval_every == 0:
            _validate(trainer, started)
        if trainer.start_spectrum and settings.spectrum_every and (last or state.step % settings.spectrum_every == 0):
            _record_spectrum(trainer)
        # During a streak of bad steps there is nothing new to keep, unless this is the end.
        due = state.step % settings.checkpoint_every == 0 and state.bad_steps_in_a_row == 0
        if due or last or stop.signum is not None:
            _save_if_finite(trainer, last=last)


def _measured_step(trainer: Trainer, forward: Any) -> tuple[StepResult, dict[str, Any] | None]:
    """The step, and what it took by phase where that is due: the same numbers, on the CPU several times slower."""
    every = trainer.recipe.train.memory_every
    if every is None or (trainer.state.step and (trainer.state.step + 1) % every):
        return train_step(trainer, forward), None
    with measure_memory(trainer.model, trainer.optimizer, device=trainer.device) as probe:
        trainer.phase = probe.phase
        try:
            result = train_step(trainer, forward)
        finally:
            trainer.phase = _no_phase
    return result, probe.to_dict()


def train_step(trainer: Trainer, forward: Any) -> StepResult:
    """One optimizer step on the batch of 0-based step ``trainer.state.step``; skipped when it is not finite.

    The gradient is that of the mean loss over all tokens of the batch, however it is cut into micro-batches.
    """
    recipe, state, optimizer = trainer.recipe, trainer.state, trainer.optimizer
    settings, merges = recipe.train, trainer.merges
    factor = lr_factor(
        state.step,
        steps=settings.steps,
        warmup_steps=recipe.optimizer.warmup_steps,
        min_ratio=recipe.optimizer.min_lr_ratio,
    )
    for group, peak in zip(optimizer.param_groups, trainer.peak_lrs, strict=True):
        group["lr"] = peak * factor
    clip = clip_value(
        recipe.optimizer,
        step=state.step,
        merges=merges.merges if merges else 0,
        steps_since_merge=merges.steps_since_merge if merges else 0,
    )
    total = _accumulate_gradients(trainer, forward)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    loss, norm = torch.stack([total.double(), grad_norm.to(total.device).double()]).cpu().tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        optimizer.zero_grad()
        if trainer.release is not None:
            trainer.release.reset()
        _count_bad_step(trainer, loss, norm)
        return StepResult(loss, norm, clip, merged=False, skipped=True)
    if clip is not None and norm > clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, grad_norm)
    merges_before = merges.merges if merges else 0
    optimizer.step()
    optimizer.zero_grad()
    state.bad_steps_in_a_row = 0
    merged = merges is not None and merges.merges > merges_before
    return StepResult(loss, norm, clip, merged=merged, skipped=False)


def _accumulate_gradients(trainer: Trainer, forward: Any) -> torch.Tensor:
    """Backward over the micro-batches of the current step; the mean loss over all its tokens, a scalar."""
    settings, train = trainer.recipe.train, trainer.data.train
    windows = batch_windows(trainer.state.step, batch_size=settings.batch_size, windows=len(train), seed=settings.seed)
    tokens = settings.batch_size * train.seq_len
    trainer.model.train()
    total = torch.zeros((), dtype=torch.float32, device=trainer.device)
    starts = range(0, settings.batch_size, settings.micro_batch)
    with shared_blocks(trainer.model) if len(starts) > 1 else contextlib.nullcontext():
        for start in starts:
            inputs, labels = train.batch(windows[start : start + settings.micro_batch])
            inputs, labels = inputs.to(trainer.device), labels.to(trainer.device)
            trainer.phase("forward")
            if settings.chunked_loss:
                loss = chunked_loss(trainer.model, forward, inputs, labels) / tokens
            else:
                loss = summed_loss(forward, inputs, labels) / tokens
            if _acts_in_backward(trainer.recipe) and not loss.isfinite():
                return loss.detach()  # what backward does with it could not be taken back
            trainer.phase("backward")
            loss.backward()
            total += loss.detach()
    return total


def _acts_in_backward(recipe: Recipe) -> bool:
    """Whether backward already updates parameters (released gradients) or a momentum (single-step layers)."""
    single_step = recipe.poet is not None and recipe.poet.config.method == "single-step"
    return recipe.optimizer.release_gradients or single_step


def summed_loss(forward: Any, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats summed over all tokens, in float32; ``inputs`` and ``labels`` are [sequences, tokens]."""
    logits = forward(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def chunked_loss(model: Any, forward: Any, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The number :func:`summed_loss` gives, through the last hidden state: the logits never exist as a whole."""
    head = model.get_output_embeddings()
    hidden = forward(input_ids=inputs, use_cache=False).last_hidden_state
    return chunked_cross_entropy(hidden, head.weight, labels, bias=head.bias, reduction="sum")


@torch.no_grad()
def evaluate(
    model: Any,
    data: TokenWindows,
    windows: list[int],
    *,
    batch_size: int,
    device: torch.device,
    chunked: bool = False,
) -> float:
    """Mean loss in nats a token over these windows, the model in eval mode for the duration.

    ``chunked``: without the logits, as :func:`chunked_loss`.
    """
    was_training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(windows), batch_size):
        inputs, labels = data.batch(windows[start : start + batch_size])
        inputs, labels = inputs.to(device), labels.to(device)
        if chunked:
            total += float(chunked_loss(model, model.base_model, inputs, labels))
        else:
            total += float(summed_loss(model, inputs, labels))
    model.train(was_training)
    return total / (len(windows) * data.seq_len)


def save(trainer: Trainer) -> Path:
    """Write a checkpoint of the current step."""
    path = save_checkpoint(
        trainer.run_dir,
        model=trainer.model,
        optimizer=trainer.optimizer,
        state=trainer.state,
        recipe_yaml=trainer.recipe.to_yaml(),
        keep=trainer.recipe.train.keep_checkpoints,
    )
    trainer.reporter.checkpoint(path)
    return path


def _save_if_finite(trainer: Trainer, *, last: bool) -> None:
    """A step may be finite and leave weights that are not; a checkpoint of those would replace a good one."""
    if all(bool(p.isfinite().all()) for p in trainer.model.parameters() if p.is_floating_point()):
        save(trainer)
        return
    saved = checkpoints(trainer.run_dir)
    where = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
    text = f"step {trainer.state.step}: weights are not finite, no checkpoint written; {where}"
    if last:
        raise UserError(f"{text}; try lower learning rates (optimizer.lr, optimizer.poet_lr)")
    trainer.reporter.note(text)


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request; a second one acts as usual. Only possible in the main thread."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handler(number: int, frame: FrameType | None) -> None:
        stop.signum = number
        for number_, handler_ in previous.items():
            signal.signal(number_, handler_)

    for number in previous:
        signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number, handler_ in previous.items():
            signal.signal(number, handler_)


def _validate(trainer: Trainer, started: float) -> None:
    settings, data = trainer.recipe.train, trainer.data.validation
    windows = evenly_spread(settings.eval_windows, len(data))
    loss = evaluate(
        trainer.model,
        data,
        windows,
        batch_size=settings.micro_batch,
        device=trainer.device,
        chunked=settings.chunked_loss,
    )
    entry = trainer.metrics.write(
        "validation",
        trainer.state.step,
        loss=loss,
        perplexity=perplexity(loss),
        tokens=len(windows) * data.seq_len,
        seconds=round(time.perf_counter() - started, 3),
    )
    trainer.reporter.validation(entry)


def _record_spectrum(trainer: Trainer) -> None:
    """Singular values of every rotated layer against the start: ratios and drifts, one line for all layers."""
    layers = {
        name: {
            "norm_ratio": now.norm_ratio,
            "drift_median": now.drift_median,
            "drift_max": now.drift_max,
            "entropy": now.entropy,
        }
        for name, now in spectrum(trainer.model, trainer.start_spectrum).items()
    }
    trainer.metrics.write("spectrum", trainer.state.step, layers=layers)


def _record_step(trainer: Trainer, result: StepResult, *, seconds: float, step_seconds: float) -> None:
    recipe = trainer.recipe
    lrs = {f"lr_{group['name']}": group["lr"] for group in trainer.optimizer.param_groups}
    entry = trainer.metrics.write(
        "train",
        trainer.state.step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        clip=result.clip,
        **lrs,
        merged=result.merged,
        **_merge_facts(trainer.merges if result.merged else None),
        skipped=result.skipped,
        tokens_per_second=round(recipe.train.batch_size * recipe.data.seq_len / step_seconds, 1),
        seconds=round(seconds, 3),
        peak_memory_gib=round(peak_memory_gib(trainer.device), 3),
    )
    trainer.reporter.step(entry)


def _merge_facts(merges: MergeHandle | None) -> dict[str, float]:
    """What the merge of this step folded: largest angle in radians, largest drift of a weight's norm."""
    report = merges.report if merges else None
    return {} if report is None else {"merge_angle": report.angle, "norm_drift": report.norm_drift}


def _count_bad_step(trainer: Trainer, loss: float, norm: float) -> None:
    state, limit = trainer.state, trainer.recipe.train.max_bad_steps
    state.skipped_steps += 1
    state.bad_steps_in_a_row += 1
    what = f"step {state.step + 1}: loss {loss}, gradient norm {norm}"
    trainer.reporter.note(f"{what}: step skipped")
    if state.bad_steps_in_a_row >= limit:
        saved = checkpoints(trainer.run_dir)
        where = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        raise UserError(
            f"{what}: {limit} non-finite steps in a row (train.max_bad_steps), stopped; {where}; "
            "try lower learning rates (optimizer.lr, optimizer.poet_lr) or a longer optimizer.warmup_steps"
        )
