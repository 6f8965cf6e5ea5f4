"""Looking at a finished or running run without touching it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from poetx.spectra import LayerSpectrum, spectrum
from poetx.errors import UserError
from poetx.train.checkpoint import load_model, step_of
from poetx.train.export import rebuild_run
from poetx.models import resolve_device


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
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"{run_dir}: not a run directory (no recipe.yaml in it)")
    run = rebuild_run(run_dir, resolve_device(device))
    if run.recipe.poet is None:
        raise UserError(f"{run_dir}: a dense run (poet: null) has no rotated layers whose spectrum could be kept")
    start = spectrum(run.model)
    load_model(run.checkpoint, run.model)
    return RunSpectrum(step_of(run.checkpoint), spectrum(run.model, start), run.notes)
