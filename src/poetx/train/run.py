"""One run from recipe to export: check everything, then write the run directory, train, export.

Under ``torchrun`` every process is one rank of the same run: all of them train, and the first one writes.

<run_dir>/recipe.yaml        the resolved recipe
          environment.json   versions and devices, the tokenizer's checksum
          conversion.txt     what was converted, what was not and why
          tokenizer/         as transformers reads it
          metrics.jsonl      one line for every step and evaluation
          checkpoints/       see poetx.train.checkpoint
          export/            the trained model as a plain Hugging Face model
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from poetx.data.prepare import prepare_data
from poetx.data.tokens import PreparedData
from poetx.distributed.agreement import agreed, check_equal, first_then_others, from_first, on_first
from poetx.distributed.checksum import check_alike, checksum_of
from poetx.distributed.launch import joined
from poetx.distributed.ranks import rank, rank_count
from poetx.errors import UserError
from poetx.files import locked, remove, write_text
from poetx.methods.base import check_device, convert_model, merge_handle, method_of
from poetx.models import build_model, resolve_device, settled
from poetx.recipe import Recipe, differing_keys, load_recipe, settled_as
from poetx.recipe.loading import flat
from poetx.savings.chunked_loss import check_head
from poetx.spectra import spectrum
from poetx.train import checkpoint as ckpt
from poetx.train.environment import describe, peak_memory_gib, versions
from poetx.train.export import (
    MODEL_SUM,
    TEXT_SUM,
    TOKENIZER_DIR,
    TOKENIZER_SUM,
    check_start,
    export_model,
    recorded,
    save_tokenizer,
    tokenizer_sum,
)
from poetx.train.graphs import NOT_PACKED
from poetx.train.loggers import PLACES, TENSORBOARD_DIR, with_loggers
from poetx.train.loop import TrainingRun, fit
from poetx.train.metrics import MetricsWriter, UnwrittenMetrics, divergence, is_whole, read_metrics
from poetx.train.packing import check_packing
from poetx.train.progress import Reporter, RunInfo, SilentReporter
from poetx.train.sharding import all_ranks, check_shardable, shard_model_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from poetx.conversion_report import ConversionReport

# What a run writes: exactly this is deleted by overwrite=True, whatever else lies in the directory.
_OWN_FILES = ("recipe.yaml", "environment.json", "conversion.txt", "metrics.jsonl", PLACES)
_OWN_DIRS = (TOKENIZER_DIR, "checkpoints", "export", TENSORBOARD_DIR)
LOCK = ".lock"


@dataclass(frozen=True)
class RunResult:
    """How a run ended; on every rank, but for what the first alone writes and measures.

    Attributes:
        signum: the signal that stopped it early, or None when it reached its last step.
        first_perplexity, last_perplexity: of the validation text, before training and at the last evaluation.
        seconds: wall time of training in this process, evaluation included.
        model: dense after an export, else still converted.
        first_validation_tokens: a prompt from the validation text; of conversations, the first one up to its answer.
        chats: whether the text was conversations.
        samples: of every evaluation, see :func:`poetx.train.samples.samples`; the first ones are the untouched model's.
        audit: the ``audit`` line of metrics.jsonl.
        diverged: what says so, where the run did; else empty.
    """

    run_dir: Path
    step: int
    steps: int
    signum: int | None
    first_perplexity: float | None
    last_perplexity: float | None
    seconds: float
    peak_memory_gib: float
    skipped_steps: int
    export_dir: Path | None
    checkpoint: Path | None
    model: PreTrainedModel
    first_validation_tokens: list[int]
    chats: bool
    samples: list[list[dict[str, str]]]
    audit: dict[str, Any]
    diverged: str


def train(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, reporter: Reporter | None = None
) -> RunResult:
    """Train as the recipe says. Nothing is written to the run directory before everything has been checked.

    Args:
        resume: continue from the newest whole checkpoint of the run directory.
        overwrite: delete what an earlier run left in the run directory.
        reporter: told what happens, on the first rank; says nothing by default.

    Raises:
        UserError: anything wrong with recipe, data, model, run directory or checkpoint.
        OSError: a file that cannot be written.
        LostRankError: another rank has ended.
    """
    with joined(), contextlib.ExitStack() as held:
        reporter = (reporter or Reporter()) if rank() == 0 else SilentReporter()
        return _train(recipe, held, resume=resume, overwrite=overwrite, reporter=reporter)


def _train(
    recipe: Recipe, held: contextlib.ExitStack, *, resume: bool, overwrite: bool, reporter: Reporter
) -> RunResult:
    """The run, on every rank; what is in ``held`` is let go once it has ended."""
    _check_same_start(recipe, resume=resume, overwrite=overwrite)
    agreed(lambda: recipe.train.share(rank_count()))
    reporter = on_first(lambda: with_loggers(reporter, recipe.train.report_to)) or reporter
    sharded = recipe.parallel == "fsdp" and rank_count() > 1
    if recipe.parallel == "fsdp" and not sharded:
        reporter.note(
            "parallel=fsdp: one process, so nothing is sharded; torchrun --nproc-per-node N -m poetx train ..."
        )
    if sharded:
        agreed(lambda: check_shardable(recipe))
    run_dir = recipe.directory
    device = agreed(lambda: resolve_device(recipe.train.device))

    def lock() -> None:
        held.enter_context(locked(run_dir / LOCK, busy=f"{run_dir}: another process is training there"))

    def look_around() -> bool:
        ckpt.check_is_run(run_dir)
        if run_dir.exists() and not run_dir.is_dir():
            raise UserError(f"run_dir={run_dir}: is a file")
        if run_dir.is_symlink() and not run_dir.exists():
            raise UserError(f"run_dir={run_dir}: is a link to {run_dir.readlink()}, which is not there; make it first")
        if early := resume and (run_dir / LOCK).exists():  # a checkpoint is read that another process may remove
            lock()
        elif not resume and not overwrite:
            check_free(run_dir)
        return early

    locked_early = on_first(look_around)
    start: Path | None = None
    if resume:
        start, problems = from_first(lambda: ckpt.find_checkpoint(run_dir))
        recipe = agreed(lambda: _resumed(recipe, start, problems, reporter))
    recipe = settled(recipe, device)
    check_device(recipe, device)

    data = first_then_others(lambda: _data(recipe, resume, reporter))
    check_equal({"the text's fingerprint": data.meta.fingerprint})

    began: str | None = None

    def build() -> tuple[Any, ConversionReport | None, torch.optim.Optimizer, Any]:
        nonlocal began
        reporter.stage("Building the model")
        vocabulary = {"vocab_size": data.meta.vocab_size, "end_of_text_id": data.meta.end_of_text_id}
        place = torch.device("cpu") if sharded else device  # as a whole it may not fit
        model = build_model(recipe, **vocabulary, device=place)
        if recipe.model.pretrained:
            began = checksum_of(model) if start is None else recorded(run_dir, MODEL_SUM)
            if start is not None and recipe.train.spectrum_every is not None:
                check_start(model, recipe.model.pretrained, run_dir)
        report = convert_model(model, recipe, place)
        if recipe.train.chunked_loss:
            check_head(model)
        if data.meta.packed:
            check_packing(model)
            if recipe.train.cuda_graphs:
                raise UserError(NOT_PACKED)
        for text in _remarks(recipe, model):
            reporter.note(text)
        if sharded:
            check_alike([*model.named_parameters(), *model.named_buffers()], "before they are sharded")
            shard_model_(model, device, all_ranks(device))
        optimizer = method_of(recipe).build_optimizer(model, recipe.train.steps)
        start_spectrum = None
        if report is not None and recipe.train.spectrum_every is not None and rank() == 0:
            reporter.stage("Measuring the spectrum at the start")
            start_spectrum = spectrum(model)  # a resumed run rebuilds the very same start, so nothing need be stored
        return model, report, optimizer, start_spectrum

    model, report, optimizer, start_spectrum = agreed(build)
    peak_lrs = [group["lr"] for group in optimizer.param_groups]
    state = ckpt.TrainState(data_fingerprint=data.meta.fingerprint)
    if start is not None:
        state = agreed(lambda: _restore(start, model, optimizer, data))

    def begin() -> MetricsWriter:
        run_dir.mkdir(parents=True, exist_ok=True)
        known = (run_dir / LOCK).exists()
        if not locked_early:
            lock()
        # Again, now that nobody else can write here: preparing the data may have taken long.
        if start is not None:
            _set_aside_newer(run_dir, start)
        elif not overwrite:
            check_free(run_dir, known=known)
        if start is not None and not (run_dir / "metrics.jsonl").is_file():
            reporter.note(f"{run_dir / 'metrics.jsonl'}: is gone; it begins anew after step {state.step}")
        _write_run_files(run_dir, recipe, data, report, device, began, fresh=start is None)
        return MetricsWriter(run_dir / "metrics.jsonl", step=state.step)

    run = TrainingRun(
        recipe=recipe,
        run_dir=run_dir,
        model=model,
        optimizer=optimizer,
        peak_lrs=peak_lrs,
        merges=merge_handle(optimizer),
        data=data,
        device=device,
        state=state,
        metrics=on_first(begin) or UnwrittenMetrics(),
        reporter=reporter,
        start_spectrum=start_spectrum,
    )
    return _train_and_export(run, start, report)


def _check_same_start(recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Refuse ranks that would not train the same run; only where its files lie may differ between machines."""
    places = (
        "name",
        "run_dir",
        "data.train",
        "data.validation",
        "data.tokenizer",
        "data.cache_dir",
        "model.pretrained",
        "model.offload_dir",
    )
    keys = {key: value for key, value in flat(recipe.to_dict()) if key not in places}
    code = {name: version for name, version in versions().items() if name in ("poetx", "torch")}
    check_equal(keys | {"--resume": resume, "--overwrite": overwrite} | code)


def _remarks(recipe: Recipe, model: Any) -> Iterator[str]:
    """What people should know of this run before it starts; nothing for most."""
    method, steps, warmup = method_of(recipe), recipe.train.steps, recipe.optimizer.warmup_steps
    if warmup >= steps:
        yield (
            f"optimizer.warmup_steps={warmup} is not below train.steps={steps}: the learning rate ends at "
            f"{steps / warmup:.0%} of its peak"
        )
    if recipe.merge_every is not None and recipe.merge_every > steps:
        yield f"poet.merge_every={recipe.merge_every} is more than train.steps={steps}: nothing is merged on the way"
    if method.acts_in_backward:
        what = "clipping and grad_norm leave" if recipe.optimizer.clip else "grad_norm leaves"
        yield f"{what} out {method.without_norm}"
    share, micro_batch = recipe.train.share(rank_count())
    if recipe.optimizer.release_gradients and share != micro_batch:
        yield (
            f"optimizer.release_gradients saves no memory with train.micro_batch_size={micro_batch}: gradients of "
            f"{share // micro_batch} micro-batches are added up before they are used"
        )
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    weight = getattr(config, "router_aux_loss_coef", 0)
    if weight and not getattr(config, "output_router_logits", False):
        yield (
            "the routers of this mixture of experts train without their load-balancing loss (router_aux_loss_coef="
            f"{weight}): output_router_logits is false in its config, which is where to switch it on"
        )
    adapters = "lora" if recipe.lora else "oft" if recipe.poet and recipe.poet.method == "oft" else ""
    if adapters and not recipe.model.pretrained:
        yield f"{adapters} on fresh weights: they stay random, because only adapters train; give model.pretrained=DIR"


def check_free(run_dir: Path, *, known: bool | None = None) -> None:
    """Refuse a directory with a finished run in it, or with files that are not an earlier start's of ours."""
    ckpt.check_linked(run_dir, _OWN_DIRS)
    known = (run_dir / LOCK).exists() if known is None else known
    if ckpt.checkpoints(run_dir) or (known and (run_dir / "export").exists()):
        raise UserError(
            f"{run_dir}: already has checkpoints or an export; continue it with --resume, choose another with "
            "run_dir=PATH, or delete it with --overwrite"
        )
    found = [name for name in (*_OWN_FILES, *_OWN_DIRS) if (run_dir / name).exists()]
    if found and not known:
        raise UserError(
            f"{run_dir}: has {', '.join(found)} that this program did not write and would replace; choose another "
            "with run_dir=PATH, or replace them with --overwrite"
        )


def _set_aside_newer(run_dir: Path, start: Path) -> None:
    """Rename broken checkpoints newer than ``start``, so that pruning does not take them for the newest."""
    ckpt.remove_leftovers(run_dir)
    if ckpt.find_checkpoint(run_dir)[0] != start:
        raise UserError(f"{run_dir}: another process has trained there meanwhile; run the command again")
    for path in ckpt.checkpoints(run_dir):
        if ckpt.step_of(path) > ckpt.step_of(start):
            aside = path.with_name(f"broken-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def _data(recipe: Recipe, resume: bool, reporter: Reporter) -> PreparedData:
    try:
        return prepare_data(recipe, progress=reporter.stage)
    except UserError as error:
        if resume and "no such file or directory" in str(error):  # a recipe has whole paths, the run may have moved
            raise UserError(f"{error}; where the text has moved, give data.train=PATH beside --resume") from None
        raise


def _resumed(recipe: Recipe, start: Path, problems: list[str], reporter: Reporter) -> Recipe:
    """The recipe to continue with from ``start``: what it leaves open is settled as it was then."""
    for problem in problems:
        reporter.note(f"broken checkpoint passed over: {problem}")
    saved = load_recipe(str(start))
    recipe = settled_as(saved, recipe)
    changed = differing_keys(saved, recipe)
    if changed:
        shown = ", ".join(f"{key} ({old} -> {new})" for key, (old, new) in list(changed.items())[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        remedy = "resume with the same recipe, or start anew with another run_dir"
        if "train.steps" in changed:  # by which its rates and merges were laid out
            remedy += (
                f"; to train a finished model on, model.pretrained={recipe.directory / 'export'} in another run_dir"
            )
        raise UserError(f"{start}: was trained with another recipe: {shown}{more}; {remedy}")
    reporter.note(f"continuing from {start}")
    return recipe


def _restore(
    start: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: PreparedData
) -> ckpt.TrainState:
    state = ckpt.read_state(start)
    if state.data_fingerprint != data.meta.fingerprint:
        raise UserError(
            f"{start}: was trained on other text (the files of data.train or the tokenizer have changed since); "
            "bring them back, or start anew with another run_dir"
        )
    ckpt.load_model(start, model)
    ckpt.load_optimizer(start, model, optimizer)
    return state


def _write_run_files(
    run_dir: Path,
    recipe: Recipe,
    data: PreparedData,
    report: ConversionReport | None,
    device: torch.device,
    began: str | None,
    *,
    fresh: bool,
) -> None:
    if fresh:
        for place in (run_dir / name for name in _OWN_DIRS):
            linked = place.is_symlink() and place.is_dir()  # to a larger disk, say: the link stays
            for path in place.iterdir() if linked else (place,):
                remove(path)
        for name in _OWN_FILES:
            (run_dir / name).unlink(missing_ok=True)
    write_text(run_dir / "recipe.yaml", recipe.to_yaml())  # a resumed run writes them again
    text = f"{method_of(recipe).title}: nothing was converted" if report is None else str(report)
    write_text(run_dir / "conversion.txt", text + "\n")
    source = recipe.data.tokenizer or recipe.model.pretrained or data.tokenizer_source
    place, template = run_dir / TOKENIZER_DIR, data.meta.template
    save_tokenizer(data.tokenizer_file, data.meta.end_of_text, source, place, chat_template=template)
    facts = describe(device) | {"processes": rank_count(), TOKENIZER_SUM: tokenizer_sum(run_dir)}
    facts |= {TEXT_SUM: data.meta.fingerprint} | ({MODEL_SUM: began} if began else {})
    write_text(run_dir / "environment.json", json.dumps(facts, indent=2))


def _train_and_export(run: TrainingRun, start: Path | None, report: ConversionReport | None) -> RunResult:
    recipe, run_dir, reporter = run.recipe, run.run_dir, run.reporter
    reporter.start(
        RunInfo(
            title=_title(run, report),
            steps=recipe.train.steps,
            first_step=run.state.step,
            log_every=recipe.train.log_every,
            name=recipe.name,
            run_dir=run_dir,
            recipe=recipe.to_dict(),
        )
    )
    started = time.perf_counter()
    try:
        stop = fit(run, resume_from=start)
        written = read_metrics(run_dir / "metrics.jsonl") if rank() == 0 else []
        entries = [entry for entry in written if is_whole(entry)]
        audit = _audit(run, entries)
    finally:
        reporter.stop()
        run.metrics.close()
    seconds = time.perf_counter() - started
    finished = run.state.step == recipe.train.steps
    export_dir = run_dir / "export" if finished and recipe.train.export else None
    if export_dir is not None:
        on_first(lambda: _export(run, export_dir))
    saved = ckpt.checkpoints(run_dir)
    validation = [entry for entry in entries if entry["event"] == "validation"]
    return RunResult(
        run_dir=run_dir,
        step=run.state.step,
        steps=recipe.train.steps,
        signum=None if finished else stop.signum,
        first_perplexity=validation[0]["perplexity"] if validation else None,
        last_perplexity=validation[-1]["perplexity"] if validation else None,
        seconds=seconds,
        peak_memory_gib=peak_memory_gib(run.device),
        skipped_steps=run.state.skipped_steps,
        export_dir=export_dir,
        checkpoint=saved[-1] if saved else None,
        model=run.model,
        first_validation_tokens=run.data.validation.prompt(),
        chats=bool(run.data.meta.template),
        samples=[entry["samples"] for entry in entries if entry["event"] == "sample"],
        audit=audit,
        diverged=from_first(lambda: divergence(entries)),
    )


def _export(run: TrainingRun, directory: Path) -> None:
    run.reporter.stage("Exporting the model")
    if run.is_sharded:
        run.model = _from_checkpoint(run)
    method_of(run.recipe).to_dense_(run.model)
    if run.recipe.model.streams_weights:
        torch.nn.Module.to(run.model, "cpu")  # where its layers are now
    shard_size = "1GB" if run.recipe.model.streams_weights else None  # of a model that fills the host's memory
    export_model(run.model, run.run_dir / TOKENIZER_DIR, directory, shard_size=shard_size)


def _from_checkpoint(run: TrainingRun) -> Any:
    """The whole trained model on the CPU of this rank, from the checkpoint that ends the run."""
    recipe, meta, place = run.recipe, run.data.meta, torch.device("cpu")
    vocabulary = {"vocab_size": meta.vocab_size, "end_of_text_id": meta.end_of_text_id}
    model = build_model(recipe, **vocabulary, device=place)
    convert_model(model, recipe, place)
    ckpt.load_model(ckpt.find_checkpoint(run.run_dir)[0], model)
    return model


def _audit(run: TrainingRun, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The line that sums a run up, over all the processes it took."""
    train = [entry for entry in entries if entry["event"] == "train"]
    merges = [entry for entry in train if entry["merged"] and {"merge_angle", "norm_drift"} <= entry.keys()]
    recipe = run.recipe
    return run.metrics.write(
        "audit",
        run.state.step,
        skipped_steps=run.state.skipped_steps,
        merges=len(merges),
        merge_angle=max((entry["merge_angle"] for entry in merges), default=None),
        norm_drift=max((entry["norm_drift"] for entry in merges), default=None),
        tokens=len(train) * recipe.train.batch_size * recipe.data.seq_len,
        peak_memory_gib=round(peak_memory_gib(run.device), 3),
    )


def _title(run: TrainingRun, report: ConversionReport | None) -> str:
    recipe, data = run.recipe, run.data
    parameters = sum(p.numel() for p in run.model.parameters())
    trainable = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    method = method_of(recipe).title + (f", {len(report.converted)} layers converted" if report else "")
    return (
        f"{recipe.name}: {parameters / 1e6:.2f}M parameters ({trainable / 1e6:.2f}M trainable), {method}; "
        f"{data.meta.train_tokens / 1e6:.2f}M tokens, {recipe.train.steps} steps of "
        f"{recipe.train.batch_size} x {recipe.data.seq_len} tokens; {run.device}, {recipe.train.dtype}"
    )
