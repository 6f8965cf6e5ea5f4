"""What one rank takes is what is planned for it: tracked in two processes, whole and sharded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from poetx.distributed.ranks import rank_count
from poetx.memory import measure_memory
from poetx.methods.base import convert_model, method_of
from poetx.models import build_model, settled
from poetx.planner import estimate_memory
from poetx.planner.estimate import part_of, planned_recipe
from poetx.train.sharding import all_ranks, shard_model_
from poetx.train.step import TrainingStep
from ranks import run_on_two_ranks

SIZES = ["model.hidden_size=64", "model.intermediate_size=160", "model.num_layers=3", "model.num_heads=4"]
TINY = [*SIZES, "data.vocab_size=300", "data.seq_len=64", "train.batch_size=4", "train.sample_tokens=0"]
BLOCKS = "poet.block_size=32"
CASES: dict[str, list[str]] = {
    "fast, ddp": ["method=fast", BLOCKS],
    "single-step in bfloat16, ddp": ["method=single-step", "train.dtype=bfloat16", BLOCKS],
    "adamw, ddp": ["method=adamw", "optimizer.clip=null"],
    "fast": ["method=fast", BLOCKS, "parallel=fsdp"],
    "mem in bfloat16, checkpointed": [
        *("method=mem", BLOCKS, "parallel=fsdp", "train.dtype=bfloat16", "poet.rotation_dtype=bfloat16"),
        *("model.gradient_checkpointing=true", "train.chunked_loss=true"),
    ],
    "int8": ["method=int8", BLOCKS, "parallel=fsdp"],
    "single-step, in micro-batches": ["method=single-step", BLOCKS, "parallel=fsdp", "train.micro_batch_size=1"],
    "adamw": ["method=adamw", "parallel=fsdp"],
}
CPU = torch.device("cpu")


def on_a_rank(rank: int, directory: str) -> None:
    found = {name: measured(overrides).to_dict() for name, overrides in CASES.items()}
    Path(directory, f"{rank}.json").write_text(json.dumps(found))


def measured(overrides: list[str]) -> Any:
    recipe = planned_recipe("demo", [*TINY, *overrides], None)[1]
    recipe = settled(part_of(recipe, rank_count()), CPU)
    model = build_model(recipe, vocab_size=300, end_of_text_id=0, device=CPU)
    convert_model(model, recipe, CPU)
    if recipe.parallel == "fsdp":
        shard_model_(model, CPU, all_ranks(CPU))
    step = TrainingStep.of(recipe, model, method_of(recipe).build_optimizer(model, recipe.train.steps))
    count, size = recipe.train.batch_size // recipe.train.micro_batch, (recipe.train.micro_batch, 64)
    batches = [(torch.randint(0, 300, size), torch.randint(0, 300, size)) for _ in range(count)]
    step.take(batches)
    with measure_memory(model, step.optimizer) as memory:
        step.phase = memory.phase
        step.take(batches, clip=recipe.optimizer.clip or None)
    return memory


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("ranks")
    run_on_two_ranks(on_a_rank, str(directory))
    return json.loads((directory / "0.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_a_rank_takes_what_is_planned(case: str, found: dict[str, Any]) -> None:
    estimate = estimate_memory("demo", [*TINY, *CASES[case]], device="cpu", ranks=2)
    assert estimate.peak == pytest.approx(found[case]["peak"], rel=0.05)
    phases = found[case]["phases"]
    for phase, peak in estimate.phases.items():
        assert peak.total == pytest.approx(phases[phase]["total"], rel=0.05), phase
        for name, size in peak.categories.items():
            assert size == pytest.approx(phases[phase][name], abs=0.05 * estimate.peak), f"{phase}, {name}"
    assert not torch.distributed.is_initialized()
