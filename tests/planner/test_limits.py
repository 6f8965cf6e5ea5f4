"""Extrapolated layers, phases, searching for the largest batch, and settings that do not go together."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import poetx
from builders import SMALL
from builders import small_config as config
from poetx import UserError
from poetx.memory import measure_memory
from poetx.planner import TrainingSetup, estimate_memory, full_stack, largest_batch, paper
from poetx.planner.batch_limit import search


@pytest.mark.parametrize(
    "setup",
    [
        TrainingSetup(method="adamw"),
        TrainingSetup(method="muon"),
        full_stack(base_optimizer="hfac"),
    ],
    ids=lambda setup: f"{setup.method}-{setup.base_optimizer}-{setup.optimizer_state}",
)
def test_extrapolated_layers_equal_the_full_run(setup):
    setup = setup.replace(block_size=32, seq_len=128)
    few, full = (estimate_memory(config(5), setup, every_layer=every) for every in (False, True))
    assert (few.extrapolated, full.extrapolated) == (True, False)
    assert few.peak == full.peak
    assert (few.categories, few.rotations, few.phase) == (full.categories, full.rotations, full.phase)
    assert {k: v.total for k, v in few.phases.items()} == {k: v.total for k, v in full.phases.items()}
    assert (few.parameters, few.trainable) == (full.parameters, full.trainable)


def test_unequal_layers_are_run_whole():
    from transformers import Gemma3TextConfig

    mixed = Gemma3TextConfig(**SMALL, num_hidden_layers=7, head_dim=16, sliding_window=8)
    assert len(set(mixed.layer_types)) == 2
    estimate = estimate_memory(mixed, method="adamw", seq_len=16)
    assert not estimate.extrapolated


def test_adamw_in_one_dtype_is_five_copies_of_the_weights():
    estimate = estimate_memory("llama-60m", method="adamw", seq_len=8)
    weights = 2 * estimate.parameters
    assert estimate.phase == "step"
    assert estimate.peak == pytest.approx(5 * weights, rel=0.01)  # weights, gradients, two moments, √v of all at once
    assert estimate.categories["optimizer"] == pytest.approx(2 * weights, rel=0.01)


def test_rotations_are_counted_on_their_own():
    estimate = estimate_memory(
        config(1, hidden_size=512, intermediate_size=1280), paper(method="mem", seq_len=8, device="cpu")
    )
    blocks = (2 + 2) + 2 * (2 + 1) + (2 + 2) + 2 * (2 + 5) + (5 + 2)  # q, k and v of two heads in four, o, MLP
    packed = blocks * 256 * 255 // 2 * 2
    split = estimate.phases["step"].rotations
    assert split == {"trainable": packed, "gradient": packed, "optimizer": 2 * packed}


def test_attention_costs_no_square_of_the_sequence():
    short, long = (
        estimate_memory(config(2), method="adamw", seq_len=n).categories["activations"] for n in (1024, 4096)
    )
    assert long == pytest.approx(4 * short, rel=0.02)


def test_attention_dropout_goes_with_checkpointing():
    """A checkpointed layer runs again inside backward, and must take the same kernel there."""
    setup = full_stack(block_size=16, seq_len=32)
    peaks = [estimate_memory(config(2, attention_dropout=p), setup).peak for p in (0.0, 0.1)]
    assert peaks[0] == peaks[1]


def test_a_model_without_fused_attention_is_estimated_with_eager_attention(caplog):
    from transformers import Gemma2Config, ViTConfig

    short, long = (
        estimate_memory(Gemma2Config(**SMALL, num_hidden_layers=1, head_dim=16), method="adamw", seq_len=n)
        for n in (256, 1024)
    )
    scores = 1024**2 * SMALL["num_attention_heads"] * 2
    assert long.phases["backward"].categories["activations"] > scores
    assert short.peak < long.peak
    assert "gemma2: transformers has no fused attention" in caplog.text
    with pytest.raises(UserError, match="^model_type=vit: [^\n]*$"):
        estimate_memory(ViTConfig())


def test_each_saving_saves():
    peaks = [
        estimate_memory(config(2, vocab_size=4000), paper(block_size=32, seq_len=512, batch_size=4, **changes)).peak
        for changes in (
            {"method": "fast"},
            {"method": "mem"},
            {"method": "mem", "activation_checkpointing": True},
            {"method": "mem", "activation_checkpointing": True, "chunked_loss": True},
        )
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < 0.5 * peaks[0]


def test_tied_embeddings_are_counted_once():
    tied, untied = (estimate_memory(config(1, tie_word_embeddings=tie), method="adamw") for tie in (True, False))
    assert untied.parameters - tied.parameters == SMALL["vocab_size"] * SMALL["hidden_size"]


def test_a_function_that_makes_a_model_will_do():
    made = estimate_memory(lambda: AutoModelForCausalLM.from_config(config(2), dtype=torch.bfloat16), method="adamw")
    assert made.peak == estimate_memory(config(2), method="adamw").peak


@pytest.mark.parametrize(("base", "slope", "budget"), [(10, 3, 100), (10, 3, 9), (0, 1, 7), (5, 7, 5), (0, 1, 10**9)])
def test_search_finds_the_edge(base, slope, budget):
    calls = []

    def peak(batch):
        calls.append(batch)
        return base + slope * batch + max(0, 40 * (batch - 8))  # a bend, as where another phase takes over

    found = search(peak, budget, most=1000)
    assert found == max((b for b in range(1, 1001) if peak(b) <= budget), default=0)
    assert len(set(calls[:12])) <= 12


def test_largest_batch_fits_and_one_more_does_not():
    setup = TrainingSetup(method="adamw", seq_len=64)
    limit = largest_batch(config(1), setup, 0.01)
    assert limit.batch_size >= 1
    assert limit.at_limit.peak <= limit.budget < limit.beyond.peak
    assert limit.at_limit.setup.batch_size == limit.batch_size
    assert largest_batch(config(1), setup, 1e-4).batch_size == 0


@pytest.mark.parametrize("budget", [0, -1, float("inf"), float("nan")])
def test_a_budget_is_a_number_of_gb(budget):
    with pytest.raises(UserError, match=f"gpu={budget}: must be a positive, finite number"):
        largest_batch("llama-60m", TrainingSetup(), budget)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "mme"}, "did you mean 'mem'"),
        ({"batch_size": 0}, "at least 1"),
        ({"method": "adamw", "base_optimizer": "smmf"}, "base_optimizer=smmf"),
        ({"method": "muon", "optimizer_state": "int8"}, "optimizer_state=int8"),
        ({"sequence": 5}, "unknown setting 'sequence'"),
    ],
)
def test_mistakes_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        estimate_memory("llama-60m", **changes)


def test_unknown_model_is_named():
    with pytest.raises(UserError, match="llama-8bb: no such shape.*did you mean 'llama-8b'"):
        estimate_memory("llama-8bb")


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
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        phases.append(list(memory.phases))
    assert phases == [["forward", "backward", "step"], ["forward", "backward", "step", "merge"]]
    assert memory.resident > memory.peak > 0
    assert set(memory.to_dict()) == {"peak", "reserved", "resident", "phases"}
    assert len(optimizer._optimizer_step_post_hooks) == hooks
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == (0, 0)
