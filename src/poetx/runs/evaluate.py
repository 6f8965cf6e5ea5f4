"""What a trained model is worth: its loss on validation or other text, and what became of its weights' spectra."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poetx.data.prepare import encode_windows, prepare_data
from poetx.data.sources import open_corpus
from poetx.data.tokens import TokenWindows
from poetx.distributed.agreement import agreed, check_equal
from poetx.errors import UserError
from poetx.models import resolve_device
from poetx.recipe.loading import parsed
from poetx.runs.load import LoadedModel, load_run, rebuild_run, while_it_trains
from poetx.spectra import LayerSpectrum, spectrum
from poetx.train.checkpoint import load_model, step_of
from poetx.train.loop import evaluate
from poetx.train.metrics import perplexity

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

DEFAULT_SEQ_LEN = 256  # for an exported model, which says at most how many positions it has


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats over ``tokens`` predicted tokens of ``source``."""

    loss: float
    perplexity: float
    tokens: int
    seq_len: int
    source: str
    notes: list[str]


def evaluate_run(
    run: str,
    *,
    data: str | None,
    text_field: str | None = None,
    batch_size: int = 8,
    seq_len: int | None = None,
    device: str = "auto",
) -> Evaluation:
    """Evaluate ``run`` (run or exported directory) on ``data``, or on all of the run's own validation text.

    Ranks of a process group take a part of the text each, and all get the result.

    Args:
        text_field: of the records of ``data``; None: the run's, ``text`` of an exported model.
        seq_len: tokens in a window; None: what the run was trained with, of an exported model at most
            ``DEFAULT_SEQ_LEN`` and its positions.

    Raises:
        UserError: no such run, no text, less than one window of it, or a window longer than the model's positions.
    """

    def load() -> tuple[LoadedModel, TokenWindows]:
        loaded = load_run(run, device=device)
        if data is None and loaded.recipe is None:
            raise UserError(f"{run}: an exported model has no validation text of its own; give --data PATH")
        length = _window_length(loaded, seq_len)
        if data is None:
            return loaded, _own_windows(Path(run), loaded, length)
        return loaded, _other_windows(loaded, data, length, text_field)

    loaded, windows = agreed(load)
    check_equal({"the text's length": len(windows.tokens), "the window's": windows.seq_len})
    loss = evaluate(
        loaded.model,
        windows,
        list(range(len(windows))),
        batch_size=batch_size,
        device=loaded.device,
        chunked=loaded.recipe is not None and loaded.recipe.train.chunked_loss,
    )
    source = data or "the run's validation text"
    length = windows.seq_len
    return Evaluation(loss, perplexity(loss), windows.counted(range(len(windows))), length, source, loaded.notes)


def _window_length(loaded: LoadedModel, seq_len: int | None) -> int:
    positions = getattr(loaded.model.config, "max_position_embeddings", None)
    if seq_len is None:
        return loaded.recipe.data.seq_len if loaded.recipe else min(DEFAULT_SEQ_LEN, positions or DEFAULT_SEQ_LEN)
    if positions is not None and seq_len > positions:
        raise UserError(f"--seq-len={seq_len}: the model has {positions} positions; use at most that")
    return seq_len


def _own_windows(run_dir: Path, loaded: LoadedModel, seq_len: int) -> TokenWindows:
    assert loaded.recipe is not None
    data = prepare_data(loaded.recipe)
    if data.meta.fingerprint != loaded.text:
        raise UserError(
            f"{run_dir}: its text ({loaded.recipe.data.train}) or tokenizer has changed since it was trained; "
            "give --data PATH"
        )
    held_out = data.validation
    if held_out.packed and seq_len != held_out.seq_len:
        raise UserError(f"--seq-len={seq_len}: the run's documents are packed into {held_out.seq_len} tokens; use that")
    windows = TokenWindows(held_out.tokens, seq_len=seq_len, flags=held_out.flags, packed=held_out.packed)
    return _checked(windows, "the run's validation text")


def _other_windows(loaded: LoadedModel, data: str, seq_len: int, text_field: str | None) -> TokenWindows:
    assert loaded.end_of_text_id is not None
    field = text_field or (loaded.recipe.data.text_field if loaded.recipe else "text")
    source: Any = dict(parsed([f"data.train={data}"]))["data.train"] if data[:1] in ("[", "{") else data
    if text_field and not open_corpus(source, key="--data", text_field=field).has_text_records:
        logger.warning("--text-field=%s: has no effect, there are no records with text", text_field)
    windows = encode_windows(source, loaded.tokenizer, key="--data", seq_len=seq_len, text_field=field)
    loaded.check_ids(int(windows.tokens.max(initial=0)))
    return _checked(windows, f"--data={data}")


def _checked(windows: TokenWindows, source: str) -> TokenWindows:
    if len(windows) == 0:
        length = windows.seq_len
        raise UserError(
            f"{source}: {len(windows.tokens)} tokens, fewer than one window of {length} + 1; lower --seq-len"
        )
    return windows


@dataclass(frozen=True)
class RunSpectrum:
    """Every rotated layer's spectrum at ``step``, with its drift since the start of the run."""

    step: int
    layers: dict[str, LayerSpectrum]
    notes: list[str]


def run_spectrum(run_dir: Path, *, device: str = "auto") -> RunSpectrum:
    """Spectrum at the newest whole checkpoint against the model that the run started with.

    Raises:
        UserError: not a run directory, no whole checkpoint, or a dense run, which has no rotated layers.
    """
    target = resolve_device(device, "--device")
    return while_it_trains(run_dir, lambda: _spectrum(run_dir, target))


def _spectrum(run_dir: Path, device: torch.device) -> RunSpectrum:
    run = rebuild_run(run_dir, device, same_start=True)
    if run.recipe.poet is None:
        raise UserError(f"{run_dir}: a dense run (poet: null) has no rotated layers whose spectrum could be kept")
    start = spectrum(run.model)
    load_model(run.checkpoint, run.model)
    return RunSpectrum(step_of(run.checkpoint), spectrum(run.model, start), run.notes)
