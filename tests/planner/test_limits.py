"""Extrapolated layers, phases, searching for the largest batch, models of one's own, and settings that do not fit."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import poetx
from builders import SMALL, descend
from builders import small_config as config
from poetx import UserError
from poetx.memory import measure_memory
from poetx.planner import estimate_memory, largest_batch
from poetx.planner.batch_limit import search
from poetx.recipe import load_recipe

ONE = ["train.batch_size=1", "train.micro_batch_size=1"]
STACK = ["model.gradient_checkpointing=true", "train.chunked_loss=true", "optimizer.release_gradients=true"]
STACK += ["optimizer.clip=null", "poet.rotation_dtype=bfloat16"]
FEW = ["poet.target_modules=[q_proj,down_proj]"]  # what is rotated takes most of an estimate's time


def recipe(*overrides, method="adamw", seq_len=64):
    return load_recipe("llama-60m", [f"method={method}", *ONE, f"data.seq_len={seq_len}", *overrides], text=False)


@pytest.mark.parametrize(
    "trains",
    [
        recipe(),
        recipe(method="muon"),
        recipe(*STACK, *FEW, "poet.block_size=32", "optimizer.dense_optimizer=hfac", method="mem"),
    ],
    ids=["adamw", "muon", "stack"],
)
def test_extrapolated_layers_equal_the_full_run(trains):
    few, full = (estimate_memory(config(5), recipe=trains, every_layer=every) for every in (False, True))
    assert (few.extrapolated, full.extrapolated) == (True, False)
    assert few.peak == full.peak
    assert (few.categories, few.rotations, few.phase) == (full.categories, full.rotations, full.phase)
    assert {k: v.total for k, v in few.phases.items()} == {k: v.total for k, v in full.phases.items()}
    assert (few.parameters, few.trainable) == (full.parameters, full.trainable)


def test_unequal_layers_are_run_whole():
    from transformers import Gemma3TextConfig

    mixed = Gemma3TextConfig(**SMALL, num_hidden_layers=5, head_dim=16, sliding_window=8)
    mixed.layer_types = ["sliding_attention"] * 4 + ["full_attention"]
    assert not estimate_memory(mixed, recipe=recipe(seq_len=16)).extrapolated


def test_adamw_in_one_dtype_is_five_copies_of_the_weights():
    estimate = estimate_memory(recipe("optimizer.state_dtype=same", seq_len=8))
    weights = 2 * estimate.parameters
    assert estimate.phase == "step"
    assert estimate.peak == pytest.approx(5 * weights, rel=0.01)  # weights, gradients, two moments, √v of all at once
    assert estimate.categories["optimizer"] == pytest.approx(2 * weights, rel=0.01)


def test_rotations_are_counted_on_their_own():
    trains = recipe(
        "poet.rotation_dtype=bfloat16", "train.dtype=bfloat16", "poet.block_size=256", method="mem", seq_len=8
    )
    estimate = estimate_memory(config(1, hidden_size=512, intermediate_size=1280), recipe=trains, device="cpu")
    blocks = (2 + 2) + 2 * (2 + 1) + (2 + 2) + 2 * (2 + 5) + (5 + 2)  # q, k and v of two heads in four, o, MLP
    packed = blocks * 256 * 255 // 2 * 2
    split = estimate.phases["step"].rotations
    assert split == {"trainable": packed, "gradient": packed, "optimizer": 2 * packed}


def test_attention_costs_no_square_of_the_sequence():
    short, long = (estimate_memory(config(1), recipe=recipe(seq_len=n)).categories["activations"] for n in (512, 2048))
    assert long == pytest.approx(4 * short, rel=0.03)


def test_attention_dropout_goes_with_checkpointing():
    """A checkpointed layer runs again inside backward, and must take the same kernel there."""
    trains = recipe(*STACK, *FEW, "poet.block_size=16", method="mem", seq_len=32)
    peaks = [estimate_memory(config(1, attention_dropout=p), recipe=trains).peak for p in (0.0, 0.1)]
    assert peaks[0] == peaks[1]


def test_a_model_without_fused_attention_is_estimated_with_eager_attention(caplog):
    from transformers import Gemma2Config, ViTConfig

    eager = Gemma2Config(**SMALL, num_hidden_layers=1, head_dim=16)
    short, long = (estimate_memory(eager, recipe=recipe(seq_len=n)) for n in (256, 1024))
    scores = 1024**2 * SMALL["num_attention_heads"] * 2
    assert long.phases["backward"].categories["activations"] > scores
    assert short.peak < long.peak
    assert "gemma2: transformers has no fused attention" in caplog.text
    with pytest.raises(UserError, match="^model_type=vit: [^\n]*$"):
        estimate_memory(ViTConfig())


def test_each_saving_saves():
    sizes = ["poet.block_size=32", "train.batch_size=4", "train.micro_batch_size=4"]
    peaks = [
        estimate_memory(config(2, vocab_size=4000), recipe=recipe(*sizes, *STACK[:n], method=method, seq_len=256)).peak
        for method, n in (("fast", 0), ("mem", 0), ("mem", 1), ("mem", 2))
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < 0.55 * peaks[0]


def test_accumulated_gradients_are_there_during_the_next_pass():
    once, twice, often = (estimate_memory(config(1), recipe=recipe(f"train.batch_size={n}")) for n in (1, 2, 64))
    assert twice.phases["forward"].categories["gradient"] > 0 == once.phases["forward"].categories["gradient"]
    assert often.peak == twice.peak


def test_a_model_of_ones_own_is_a_module_a_function_or_a_config():
    trains = recipe()
    model = AutoModelForCausalLM.from_config(config(1, tie_word_embeddings=True), dtype=torch.bfloat16)
    of_config = estimate_memory(config(1, tie_word_embeddings=True), recipe=trains)
    assert estimate_memory(model, recipe=trains).peak == of_config.peak
    assert not any(p.is_meta for p in model.parameters())
    assert type(model.lm_head) is torch.nn.Linear
    made = estimate_memory(
        lambda: AutoModelForCausalLM.from_config(config(1, tie_word_embeddings=True), dtype=torch.bfloat16),
        recipe=trains,
    )
    assert made.peak == of_config.peak
    untied = estimate_memory(config(1), recipe=trains)
    assert untied.parameters - of_config.parameters == SMALL["vocab_size"] * SMALL["hidden_size"]


def test_a_checkpoint_is_planned_without_its_weights_and_text(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config(1).to_dict()))
    estimate = estimate_memory("llama-60m", [f"model.pretrained={tmp_path}", "poet.init=keep", *ONE])
    assert estimate.parameters > SMALL["vocab_size"] * SMALL["hidden_size"]


@pytest.mark.parametrize(("base", "slope", "budget"), [(10, 3, 100), (10, 3, 9), (0, 1, 7), (5, 7, 5), (0, 1, 10**9)])
def test_search_finds_the_edge_in_a_few_looks(base, slope, budget):
    calls = []

    def peak(batch):
        calls.append(batch)
        return base + slope * batch + max(0, 40 * (batch - 8))  # a bend, as where another phase takes over

    found = search(peak, budget, most=1000)
    assert len(calls) <= 14
    assert found == max((b for b in range(1, 1001) if peak(b) <= budget), default=0)


def test_largest_batch_fits_and_one_more_does_not():
    limit = largest_batch(config(1), 0.01, recipe=recipe())
    assert limit.batch_size >= 1
    assert limit.at_limit.peak <= limit.budget < limit.beyond.peak
    assert limit.at_limit.recipe.train.micro_batch_size == limit.batch_size
    assert largest_batch(config(1), 1e-4, recipe=recipe()).batch_size == 0


@pytest.mark.parametrize(
    ("source", "arguments", "words"),
    [
        ("llama-60m", {"overrides": ["method=mme"]}, "did you mean 'mem'"),
        ("llama-60m", {"overrides": ["train.micro_batch_size=0"]}, "train.micro_batch_size"),
        ("llama-60m", {"overrides": ["data.sequence=5"]}, "data.sequence.*unknown"),
        ("llama-60m", {"device": "tpu"}, "device=tpu: must be one of cuda, cpu"),
        ("llama-60mm", {}, "no such recipe.*did you mean 'llama-60m'"),
        ("llama-60m", {"overrides": ["data.tokenizer=/nowhere"]}, "data.tokenizer=/nowhere: no such file"),
        (recipe(), {"overrides": ["train.steps=5"]}, "are for a recipe's name or path"),
    ],
)
def test_mistakes_are_named(source, arguments, words):
    with pytest.raises(UserError, match=words):
        estimate_memory(source, **arguments)


@pytest.mark.parametrize("budget", [0, -1, float("inf"), float("nan")])
def test_a_budget_is_a_number_of_gb(budget):
    with pytest.raises(UserError, match=f"gpu={budget}: must be a positive, finite number"):
        largest_batch("llama-60m", budget)


def test_former_names_of_the_planner_warn_once_where_they_are_now():
    import poetx.memory

    with pytest.warns(DeprecationWarning, match=r"has moved to poetx\.planner\.batch_limit"):
        assert poetx.memory.largest_batch is largest_batch


def test_measuring_sees_merges_and_leaves_nothing_behind():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, num_hidden_layers=1)).train()
    poetx.convert_(model, poetx.PoetConfig(block_size=32))
    optimizer = torch.optim.AdamW(poetx.param_groups(model, lr=1e-3, poet_lr=1e-3))
    poetx.merge_every(optimizer, model, steps=2)
    ids = torch.randint(0, 300, (1, 32))
    hooks = len(optimizer._optimizer_step_post_hooks)
    phases = []
    for _ in range(2):
        with measure_memory(model, optimizer) as memory:
            descend(model(input_ids=ids, labels=ids).loss, optimizer)
        phases.append(list(memory.phases))
    assert phases == [["forward", "backward", "step"], ["forward", "backward", "step", "merge"]]
    assert memory.resident > memory.peak > 0
    assert set(memory.to_dict()) == {"peak", "reserved", "resident", "phases"}
    assert len(optimizer._optimizer_step_post_hooks) == hooks
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == (0, 0)
