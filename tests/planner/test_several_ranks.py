"""What one rank takes is what is planned for it: tracked in two processes, whole and sharded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.rank_memory import CASES, COMMON, measured

from poetx.memory.tracker import StorageTracker
from poetx.planner import estimate_memory
from ranks import run_on_two_ranks

CHOSEN = ["ddp/fast", "fsdp/mem, bfloat16, checkpointed"]  # the others are rows of the benchmark


def words(case: str) -> list[str]:
    way, form = case.split("/")
    return [*CASES[form], f"parallel={way}", "model.num_layers=1"]


def on_a_rank(rank: int, directory: str) -> None:
    found = {case: measured(words(case)).to_dict() for case in CHOSEN}
    Path(directory, f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("ranks")
    run_on_two_ranks(on_a_rank, str(directory))
    return json.loads((directory / "0.json").read_text())


@pytest.mark.parametrize("case", CHOSEN)
def test_a_rank_takes_what_is_planned(case: str, found: dict[str, Any]) -> None:
    estimate = estimate_memory("demo", [*COMMON, *words(case)], device="cpu", ranks=2)
    assert estimate.peak == pytest.approx(found[case]["peak"], rel=0.05)
    phases = found[case]["phases"]
    for phase, peak in estimate.phases.items():
        assert peak.total == pytest.approx(phases[phase]["total"], rel=0.05), phase
    tracked = max(phases.values(), key=lambda peak: peak["total"])
    for name, size in estimate.categories.items():
        assert size == pytest.approx(tracked[name], abs=0.05 * estimate.peak), name
    assert (estimate.categories["gathered"] > 0) == case.startswith("fsdp")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("method", ["muon", "fast", "single-step"])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_released_gradients_are_planned_for_several_ranks(method: str, micro_batch: int) -> None:
    released = ("optimizer.clip=null", "optimizer.release_gradients=true", "model.num_layers=1")
    batch = ("train.batch_size=8", f"train.micro_batch_size={micro_batch}")
    estimate = estimate_memory("demo", [f"method={method}", *released, *batch], device="cpu", ranks=4)
    alone = [f"method={method}", *released, "train.batch_size=2", f"train.micro_batch_size={micro_batch}"]
    assert estimate.peak == pytest.approx(estimate_memory("demo", alone, device="cpu").peak, rel=0.15)


def test_a_storage_that_grows_from_nothing_is_gathered():
    before = torch.UntypedStorage.resize_
    with StorageTracker() as tracker:
        tracker.enter_phase("forward")
        kept, storage = torch.empty(10), torch.empty(100).untyped_storage()
        storage.resize_(0)
        assert tracker.current == kept.nbytes
        storage.resize_(800)
        tracker.enter_phase("backward")
    assert tracker.split("forward") == {("gathered", False): 800, ("activations", False): kept.nbytes}
    assert torch.UntypedStorage.resize_ is before
