"""A whole run on a device that is not the CPU: trained, stopped, resumed, exported."""

from __future__ import annotations

import signal
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

import accelerator
from accelerator import crossings
from builders import At, Tiny, curve, interrupt, train_losses
from poetx import materialize, to_dense_
from poetx.layers import hosted
from poetx.materialize import SafetensorsCheckpoint
from poetx.methods.base import convert_model
from poetx.models import build_model
from poetx.ops import host
from poetx.runs.load import load_run
from poetx.train import loop, run

FORMS = {
    "fast": ("poet.mode=fast", "poet.merge_every=3"),
    "mem and its stack": (
        *("poet.mode=mem", "poet.merge_every=3", "train.chunked_loss=true", "model.gradient_checkpointing=true"),
    ),
    "single-step": ("poet.method=single-step", "optimizer.angle=0.02"),
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch):
    with accelerator.accelerator() as device:
        monkeypatch.setattr(run, "resolve_device", lambda wanted: device)
        yield device


@pytest.mark.parametrize("name", FORMS)
def test_trains_as_on_the_cpu_and_resumes_to_the_bit(name: str, tiny: Tiny, device: torch.device) -> None:
    settings = (*FORMS[name], "train.steps=7")
    whole = run.train(tiny(*settings, run_dir="whole"))
    recipe = tiny(*settings, run_dir="cut")
    assert run.train(recipe, reporter=At(4, interrupt)).signum == signal.SIGINT
    run.train(recipe, resume=True)
    assert curve(recipe.directory) == curve(whole.run_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "resolve_device", lambda wanted: torch.device("cpu"))
        on_cpu = run.train(tiny(*settings, run_dir="cpu"))
    assert losses(whole) == pytest.approx(losses(on_cpu), rel=1e-4)
    assert load_run(str(whole.run_dir), device="cpu").model is not None


@pytest.mark.parametrize(
    ("name", "place"),
    [("mem and its stack", ()), ("mem and its stack", ("model.offload_dir=.",)), ("single-step", ())],
    ids=["mem", "mem in files", "single-step"],
)
def test_a_run_with_its_weights_in_host_memory_is_the_same_run(
    name: str, place: tuple[str, ...], tiny: Tiny, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_kind_of_disk", lambda directory: "ext4")
    settings = (*FORMS[name], "train.steps=7", "train.micro_batch_size=2")
    resident = run.train(tiny(*settings, run_dir="resident"))
    recipe = tiny(*settings, "model.offload=frozen", *place, run_dir="streamed")
    assert run.train(recipe, reporter=At(4, interrupt)).signum == signal.SIGINT
    result = run.train(recipe, resume=True)
    assert losses(result) == losses(resident)
    assert {p.device.type for p in result.model.parameters()} == {"cpu"}
    saved, expected = (load_run(str(r.run_dir), device="cpu").model.state_dict() for r in (result, resident))
    assert all(torch.equal(saved[key], value) for key, value in expected.items())


def losses(result: run.RunResult) -> list[float]:
    return train_losses(result.run_dir)


@pytest.mark.parametrize("name", FORMS)
def test_a_step_of_the_loop_waits_once_at_its_end(
    name: str, tiny: Tiny, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For loss and norm together."""
    plain, seen = loop.train_step, []

    def counted(*args):
        with crossings() as now:
            result = plain(*args)
        seen.append(now)
        return result

    monkeypatch.setattr(loop, "train_step", counted)
    run.train(tiny(*FORMS[name], "train.steps=4"))
    operators = [crossing.partition(" at ")[0] for crossing in seen[-1]]
    inputs_and_labels, of_the_loss = ["_to_copy"] * 2, ["_to_copy"]
    assert operators == inputs_and_labels + of_the_loss


def test_a_checkpoint_goes_to_host_memory_layer_by_layer(
    tiny: Tiny, device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At most the base and two layers at any time; of the embedding, which is larger than a layer here, a few rows."""
    cpu, sizes = torch.device("cpu"), ("hidden_size", "intermediate_size", "num_layers", "num_heads")
    plain = build_model(tiny("train.dtype=float32"), vocab_size=320, end_of_text_id=0, device=cpu)
    plain.save_pretrained(tmp_path / "base")
    settings = (*(f"model.{key}=null" for key in sizes), *FORMS["mem and its stack"], "poet.init=keep")
    recipe = tiny(*settings, "train.dtype=float32", "model.offload=frozen", f"model.pretrained={tmp_path / 'base'}")
    alive, most = Counter(), Counter()

    def counted(kind, function):
        def call(*args, **kwargs):
            tensor = function(*args, **kwargs)
            size = tensor.numel() * tensor.element_size()
            alive[kind] += size
            most[kind] = max(most[kind], alive[kind])
            most["both"] = max(most["both"], alive["read"] + alive["kept"])
            weakref.finalize(tensor.untyped_storage(), alive.subtract, {kind: size})
            return tensor

        return call

    def pieces(self, name, pieces=SafetensorsCheckpoint.pieces):
        return ((rows, counted("read", Tensor.clone)(piece)) for rows, piece in pieces(self, name))

    monkeypatch.setattr(materialize, "_PIECE", 1 << 10)
    monkeypatch.setattr(SafetensorsCheckpoint, "pieces", pieces)
    monkeypatch.setattr(SafetensorsCheckpoint, "read", counted("read", SafetensorsCheckpoint.read))
    monkeypatch.setattr(hosted, "in_host_memory", counted("kept", hosted.in_host_memory))
    model = build_model(recipe, vocab_size=320, end_of_text_id=0, device=device)
    convert_model(model, recipe, device)
    weights = {name: p for name, p in plain.named_parameters() if "proj" in name}
    base = sum(4 * p.numel() for p in weights.values())
    assert alive["kept"] == most["kept"] == base
    assert most["both"] <= base + 2 * max(4 * p.numel() for p in weights.values())
    to_dense_(model)
    assert alive["kept"] == 0  # and of the dense model no second copy is there
    for name, p in weights.items():
        assert torch.equal(model.get_parameter(name).cpu(), p), name
