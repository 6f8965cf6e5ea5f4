"""The estimate is what happens: against tracked bytes of real steps, and against arithmetic."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from builders import small_config as config
from poetx.memory import measure_memory
from poetx.planner import TrainingSetup, estimate_memory
from poetx.planner.build import prepare_, training_step


def measured(setup, layers=2):
    model = AutoModelForCausalLM.from_config(
        config(layers), dtype=torch.float32 if setup.method == "adamw-mixed" else getattr(torch, setup.dtype)
    ).train()
    model = prepare_(model, setup)
    ids = torch.randint(0, 300, (setup.batch_size, setup.seq_len))
    step = training_step(model, ids, setup)
    step.run()
    with measure_memory(model, *step.optimizers) as memory:
        step.run()
    return memory


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "fast"},
        {"method": "mem"},
        {"method": "adamw"},
        {"method": "adamw-mixed"},
        {"method": "mem", "rotation_dtype": "bfloat16"},
        {"method": "mem", "activation_checkpointing": True, "chunked_loss": True},
        {"method": "mem", "optimizer_state": "int8", "release_gradients": True},
        {"method": "fast", "base_optimizer": "smmf"},
        {"method": "muon"},
        {"method": "mem", "weight_format": "int8", "group_size": 64},
        {"method": "mem", "weight_format": "nf4", "activation_checkpointing": True, "chunked_loss": True},
        {"method": "mem", "weight_format": "int8", "group_size": 64, "weight_extra_bits": True},
        {"method": "single-step"},
        {"method": "single-step-mem", "optimizer_state": "int8", "release_gradients": True},
    ],
    ids=lambda changes: "-".join(str(v) for v in changes.values()),
)
def test_estimate_equals_what_is_measured_on_the_cpu(changes):
    narrow = "rotation_dtype" in changes or changes["method"] == "adamw-mixed"
    sizes = {"block_size": 32, "batch_size": 2, "seq_len": 96}
    setup = TrainingSetup(dtype="bfloat16" if narrow else "float32", device="cpu", **sizes, **changes)
    estimate, memory = estimate_memory(config(), setup), measured(setup)
    assert estimate.peak == pytest.approx(memory.peak, rel=0.05)
    for phase, peak in estimate.phases.items():
        assert peak.total == pytest.approx(memory.phases[phase].total, rel=0.05), phase
    measured_peak = max(memory.phases.values(), key=lambda p: p.total)
    for name, size in estimate.categories.items():
        assert size == pytest.approx(measured_peak.categories[name], abs=0.05 * estimate.peak), name
