"""What a run tells about itself afterwards: spectrum, audit, report."""

import json
import shutil

import pytest

from poetx.errors import UserError
from poetx.runs.evaluate import run_spectrum
from poetx.runs.report import write_report
from poetx.train.metrics import read_metrics
from poetx.train.run import train


def test_spectrum_is_recorded_kept_and_recomputed_from_the_run_directory(tiny, tmp_path):
    result = train(tiny("train.spectrum_every=4"))
    lines = [e for e in read_metrics(result.run_dir / "metrics.jsonl") if e["event"] == "spectrum"]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert all(layer["drift_median"] < 1e-2 for line in lines for layer in line["layers"].values())
    later = run_spectrum(result.run_dir)
    assert later.step == 12
    assert {name: layer.drift_max for name, layer in later.layers.items()} == {
        name: layer["drift_max"] for name, layer in lines[-1]["layers"].items()
    }
    page = write_report(result.run_dir, tmp_path / "report.html").read_text()
    assert "Median change of singular values" in page
    assert "Largest angle folded" in page


def test_spectrum_after_resuming_still_refers_to_the_start(tiny):
    whole = train(tiny("train.spectrum_every=3", run_dir="whole"))
    train(tiny("train.checkpoint_every=5", "train.export=false", run_dir="parts"))
    parts = tiny("train.checkpoint_every=5", "train.spectrum_every=3", "train.export=false", run_dir="parts")
    newest = parts.directory / "checkpoints" / "step-00000012"
    (newest / "manifest.json").unlink()
    resumed = train(parts, resume=True)

    def at_the_end(result):
        (line,) = [e for e in read_metrics(result.run_dir / "metrics.jsonl") if e["event"] == "spectrum"][-1:]
        return line

    assert at_the_end(resumed) == at_the_end(whole)


def test_audit_counts_over_resumes(tiny):
    first = train(tiny("train.checkpoint_every=5", "train.export=false"))
    assert first.audit["merges"] == 2
    assert first.audit["tokens"] == 12 * 4 * 16
    assert first.audit["norm_drift"] < 1e-5
    (first.run_dir / "checkpoints" / "step-00000012" / "state.json").write_text("{}")
    again = train(tiny("train.checkpoint_every=5", "train.export=false"), resume=True)
    assert again.audit | {"peak_memory_gib": 0} == first.audit | {"peak_memory_gib": 0}
    audits = [line for line in (first.run_dir / "metrics.jsonl").read_text().splitlines() if "audit" in line]
    assert len(audits) == 1
    assert json.loads(audits[0])["skipped_steps"] == 0


def test_dense_runs_and_other_directories_have_no_spectrum(tiny, tmp_path):
    dense = train(tiny("poet=null", "train.export=false"))
    with pytest.raises(UserError, match="dense run"):
        run_spectrum(dense.run_dir)
    with pytest.raises(UserError, match="not a run directory"):
        run_spectrum(tmp_path)


def test_deterministic_mode_is_put_back(tiny):
    import torch

    train(tiny("train.deterministic=true", "train.export=false"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_spectra_are_not_measured_against_another_model(tiny, tmp_path):
    settings = ("poet.init=keep", "model.hidden_size=null", "model.intermediate_size=null", "model.num_layers=null")
    settings += ("model.num_heads=null", "train.steps=6", "train.spectrum_every=3", "train.export=false")
    start = train(tiny("train.steps=1", run_dir="start")).export_dir
    recipe = tiny(*settings, f"model.pretrained={start}")
    train(recipe)
    other = train(tiny("train.steps=1", "train.seed=7", run_dir="other")).export_dir
    shutil.copy(other / "model.safetensors", start)
    for measure in (
        lambda: run_spectrum(recipe.directory),
        lambda: train(tiny(*settings, f"model.pretrained={start}"), resume=True),
    ):
        with pytest.raises(UserError, match=r"^model\.pretrained=.*/export: has changed since the run began"):
            measure()
