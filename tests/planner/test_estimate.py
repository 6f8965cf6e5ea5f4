"""The estimate is what happens: against tracked bytes of real steps by every method, and against arithmetic."""

import json

import pytest
import torch
from torch import nn

from poetx.config import WEIGHT_FORMATS
from poetx.errors import UserError
from poetx.memory import measure_memory
from poetx.methods.base import convert_model, method_of
from poetx.models import build_model, settled
from poetx.planner import estimate_memory
from poetx.planner.estimate import planned_recipe
from poetx.recipe.shorthands import METHODS
from poetx.train.step import TrainingStep

SIZES = ["model.hidden_size=64", "model.intermediate_size=160", "model.num_layers=2", "model.num_heads=4"]
TINY = [*SIZES, "model.num_key_value_heads=2", "data.vocab_size=300", "data.seq_len=96", "train.batch_size=2"]
CPU = torch.device("cpu")


def blocks(method):
    return ["poet.block_size=32"] if any(key == "poet.method" for key in METHODS[method]) else []


def measured(overrides):
    recipe = settled(planned_recipe("demo", overrides, None)[1], CPU)
    model = build_model(recipe, vocab_size=300, end_of_text_id=0, device=CPU)
    convert_model(model, recipe, CPU)
    step = TrainingStep.of(recipe, model, method_of(recipe).build_optimizer(model, recipe.train.steps))
    count, size = recipe.train.batch_size // recipe.train.micro_batch, (recipe.train.micro_batch, 96)
    batches = [(torch.randint(0, 300, size), torch.randint(0, 300, size)) for _ in range(count)]
    step.take(batches)
    with measure_memory(model, step.optimizer) as memory:
        step.phase = memory.phase
        step.take(batches, clip=recipe.optimizer.clip or None)
    return memory


def assert_equal_to_what_is_measured(overrides):
    estimate, memory = estimate_memory("demo", overrides, device="cpu"), measured(overrides)
    assert estimate.peak == pytest.approx(memory.peak, rel=0.05)
    for phase, peak in estimate.phases.items():
        assert peak.total == pytest.approx(memory.phases[phase].total, rel=0.05), phase
    measured_peak = max(memory.phases.values(), key=lambda p: p.total)
    for name, size in estimate.categories.items():
        assert size == pytest.approx(measured_peak.categories[name], abs=0.05 * estimate.peak), name


#: The weight formats are one method on one weight object: int8 here and below, one of three bits, and nf4 below.
@pytest.mark.parametrize("method", [*(name for name in METHODS if name not in WEIGHT_FORMATS[1:]), "bipolar-int3"])
def test_every_method_takes_what_is_measured_on_the_cpu(method):
    if method == "lora":
        pytest.importorskip("peft")
    assert_equal_to_what_is_measured([*TINY, f"method={method}", *blocks(method)])


@pytest.mark.parametrize(
    "settings",
    [
        "method=mem train.dtype=bfloat16 poet.rotation_dtype=bfloat16",
        "method=mem optimizer.state_dtype=int8 optimizer.release_gradients=true optimizer.clip=null",
        "method=fast optimizer.dense_optimizer=smmf train.micro_batch_size=1",
        "method=fast poet.permutation=shared",
        "method=fast poet.permutation=shared model.gradient_checkpointing=true",
        "method=nf4 model.gradient_checkpointing=true train.chunked_loss=true",
        "method=int8 poet.group_size=64 poet.weight_extra_bits=true",
        "method=single-step-mem optimizer.release_gradients=true optimizer.clip=null",
        "method=adamw train.micro_batch_size=1 optimizer.clip=null",
        "method=galore train.micro_batch_size=1 optimizer.release_gradients=true optimizer.clip=null",
    ],
)
def test_savings_and_accumulation_take_what_is_measured_on_the_cpu(settings):
    overrides = settings.split()
    assert_equal_to_what_is_measured([*TINY, *overrides, *blocks(overrides[0].partition("=")[2])])


def test_what_is_no_source_is_refused_and_a_path_is_one(tmp_path):
    for source in (None, 3, {"hidden_size": 64}):
        with pytest.raises(UserError, match="is no recipe, no path of one"):
            estimate_memory(source)
    for model in (nn.Linear(4, 4), lambda: nn.Transformer(8, 2)):
        with pytest.raises(UserError, match=r"^(Linear|Transformer): its forward takes no input_ids"):
            estimate_memory(model)
    with pytest.raises(UserError, match="gives dict, not a model"):
        estimate_memory(dict)
    with pytest.raises(UserError, match="missing.yaml"):
        estimate_memory(tmp_path / "missing.yaml")
    assert planned_recipe("demo", "train.batch_size=2", None)[1].train.batch_size == 2


def test_a_mixture_of_experts_is_planned_in_bfloat16_and_refused_in_float32(tmp_path):
    sizes = {
        "model_type": "olmoe",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_experts": 4,
    }
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "vocab_size": 400}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    shape = ("hidden_size", "intermediate_size", "num_layers", "num_heads")
    asked = [f"model.config={tmp_path}/config.json", *(f"model.{key}=null" for key in shape), "data.seq_len=16"]
    assert estimate_memory("demo", [*asked, "train.dtype=bfloat16"]).peak > 0
    with pytest.raises(UserError, match=r"^train\.dtype=float32: a mixture of experts can be planned in bfloat16 only"):
        estimate_memory("demo", [*asked, "train.dtype=float32"])
