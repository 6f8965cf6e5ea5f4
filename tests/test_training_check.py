"""What does not learn is named in the first steps: over model families, and over every way a matrix can be left out."""

import logging

import pytest
import torch
import transformers
from torch import nn

import poetx
from builders import descend, llama
from poetx import POETX, PoetConfig, check_training, convert_, merge_every, param_groups
from poetx.layers.walk import converted_layers
from poetx.optim import build_optimizer, release_gradients

COMMON = {
    **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0},
}
GPT = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
MOE = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 24}
SSM = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
FAMILIES = {
    **{name: {} for name in ("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gpt_neox", "starcoder2")},
    **{name: {} for name in ("olmo", "olmo2", "cohere", "granite", "persimmon")},
    **{name: {"head_dim": 16} for name in ("gemma", "gemma2", "helium")},
    "stablelm": {"partial_rotary_factor": 0.5},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 8},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 2},
    "bloom": {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 2},
    "jamba": {"num_experts": 2, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 4},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
    "mamba": SSM,
    "falcon_mamba": SSM,
    "rwkv": {"vocab_size": 61, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2},
}


def train(model, optimizer, steps=3, ids=None):
    ids = torch.arange(48).view(3, 16) * 7 % 61 if ids is None else ids
    for _ in range(steps):
        logits = model(input_ids=ids).logits
        descend(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), optimizer)


def built(model, method, lr=1e-2):
    convert_(model, PoetConfig(block_size=8, method=method))
    if method == "single-step":
        return POETX(model, lr)
    optimizer = torch.optim.AdamW(param_groups(model, lr=lr, poet_lr=lr))
    merge_every(optimizer, model, steps=2)
    return optimizer


@pytest.mark.parametrize("method", ["poet-x", "single-step"])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_that_trains_in_a_family_of_models_moves(family, method):
    shape = FAMILIES[family]
    shape = shape if "vocab_size" in shape else COMMON | shape
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **shape)).train()
    optimizer = built(model, method)
    before = {name: layer.dense_weight().detach().clone() for name, layer in converted_layers(model)}
    check = check_training(model, optimizer)
    train(model, optimizer)
    assert check.result is not None
    named = {problem.name.rpartition(".")[0] for problem in check.result.problems}
    for name, layer in converted_layers(model):
        assert name in named or not torch.equal(layer.dense_weight(), before[name]), name
    # Positions beyond the text, an expert without a token: nothing else is left out in any family.
    assert not named, str(check.result)


def test_a_family_without_a_plain_linear_layer_is_refused():
    """Falcon's are a subclass with a forward of its own."""
    config = transformers.FalconConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(poetx.UserError, match="matches no linear layer"):
        convert_(transformers.FalconForCausalLM(config))


@pytest.fixture
def small():
    return llama(vocab_size=61, tie_word_embeddings=False).train()


def problems(model, optimizer, **settings):
    check = check_training(model, optimizer)
    train(model, optimizer, **settings)
    return {problem.name: str(problem) for problem in check.report().problems}


def test_parameters_that_the_optimizer_does_not_hold(small):
    convert_(small, PoetConfig(block_size=8))
    groups = param_groups(small, lr=1e-2, poet_lr=1e-2)
    kept = [group for group in groups if group["name"] == "rotations"]
    optimizer = torch.optim.AdamW(kept)
    merge_every(optimizer, small)
    found = problems(small, optimizer)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= found.keys()
    assert not any("proj" in name for name in found)
    assert "build the optimizer after poetx.convert_" in found["lm_head.weight"]


def test_an_optimizer_built_before_the_conversion(small):
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    convert_(small, PoetConfig(block_size=8))
    found = problems(small, optimizer)
    assert sum("does not hold it" in text for text in found.values()) == 2 * 14


def test_frozen_by_mistake_zero_rate_zero_gradient_and_no_call(small):
    optimizer = built(small, "poet-x")
    first, second = small.model.layers
    first.mlp.up_proj.skew_in.requires_grad_(False)
    optimizer.add_param_group({"params": [spare := nn.Parameter(torch.ones(2, 2))], "lr": 0.0})
    small.spare = spare
    small.unused = nn.Linear(4, 4)
    optimizer.add_param_group({"params": list(small.unused.parameters())})
    with torch.no_grad():
        second.input_layernorm.weight.zero_()  # what it feeds is zero
    rotations = optimizer.param_groups[0]
    rotations["params"] = [p for p in rotations["params"] if p is not second.mlp.up_proj.skew_in]
    optimizer.add_param_group({"params": [second.mlp.up_proj.skew_in], "lr": 0.0})
    for group in optimizer.param_groups[1:3]:
        group["params"] = [p for p in group["params"] if p is not second.input_layernorm.weight]
    found = problems(small, optimizer)
    assert "frozen" in found["model.layers.0.mlp.up_proj.skew_in"]
    assert "learning rate was 0" in found["model.layers.1.mlp.up_proj.skew_in"]
    assert "exactly zero" in found["model.layers.1.self_attn.q_proj.skew_in"]
    assert "never called" in found["unused.weight"]
    assert "no gradient" in found["spare"]


def test_steps_below_the_rounding_of_bfloat16(small):
    model = small.bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    found = problems(model, optimizer)
    assert "did not move; steps too small for bfloat16" in found["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize("read", [False, True])
def test_a_single_step_layer_that_is_never_called_trains_if_its_weight_is_read(small, read):
    convert_(small, PoetConfig(block_size=8, method="single-step"))
    layer = small.model.layers[0].mlp.up_proj
    optimizer = POETX(small, 1e-3)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight if read else layer.weight.detach())
    found = problems(small, optimizer)
    if read:
        assert not found
    else:
        assert list(found) == ["model.layers.0.mlp.up_proj.weight"]
        assert "never called" in found["model.layers.0.mlp.up_proj.weight"] or "no gradient" in str(found)


def test_a_backward_pass_that_names_its_inputs_is_named_as_a_cause():
    model = nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20))
    optimizer = built(model, "single-step")
    check = check_training(model, optimizer, steps=1)
    trained = [p for p in model.parameters() if p.requires_grad]
    model(torch.randn(5, 12)).exp().sum().backward(inputs=trained)
    optimizer.step()
    (problem,) = check.report().problems
    assert problem.name == "0.weight"
    assert "backward(inputs=...) names other tensors" in problem.remedy


def test_rotations_without_merging_are_said_in_the_first_steps(small):
    convert_(small, PoetConfig(block_size=8))
    optimizer = torch.optim.AdamW(param_groups(small, lr=1e-3, poet_lr=1e-3))
    (text,) = problems(small, optimizer).values()
    assert "poetx.merge_every" in text


@pytest.mark.parametrize("kind", ["dense", "released", "drop-in", "drop-in released", "lora"])
def test_any_optimizer_of_a_healthy_model_is_told_to_be_well(small, kind, caplog):
    if kind == "lora":
        peft = pytest.importorskip("peft")
        small = peft.get_peft_model(small, peft.LoraConfig(r=2, target_modules="all-linear"))
    if kind.startswith("drop-in"):
        optimizer = POETX(small, 1e-3, block_size=8, release_gradients=kind.endswith("released"))
    else:
        optimizer = build_optimizer([{"params": [p for p in small.parameters() if p.requires_grad]}], lr=1e-2)
    if kind == "released":
        release_gradients(optimizer, small.parameters())
    check = check_training(small, optimizer, steps=2)
    with caplog.at_level(logging.INFO, logger="poetx.training_check"):
        train(small, optimizer, steps=1)
        assert check.result is None
        train(small, optimizer, steps=1)
    assert check.result is not None
    assert not check.result.problems
    assert "received gradient and moved in 2 steps" in caplog.text
    assert not check._hooks


@pytest.mark.parametrize("released", [False, True])
def test_hooks_registered_later_are_still_called_in_the_step_in_which_it_ends(released):
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    optimizer = build_optimizer([{"params": list(model.parameters())}], lr=1e-2)
    check, called = check_training(model, optimizer, steps=2), []
    for name in ("first", "second"):
        optimizer.register_step_post_hook(lambda *_, name=name: called.append(name))
    if released:
        release_gradients(optimizer, model.parameters())
    for _ in range(4):
        descend(model(torch.ones(5, 8)).sum(), optimizer)
    assert check.result is not None
    assert check.result.steps == 2
    assert called == ["first", "second"] * 4
    check.remove()
    assert check._last.id not in optimizer._optimizer_step_post_hooks


def test_watching_changes_no_number_and_leaves_nothing_behind():
    losses = []
    for watch in (False, True):
        torch.manual_seed(3)
        model = llama(vocab_size=61).train()
        optimizer = built(model, "poet-x")
        seen = []
        if watch:
            check_training(model, optimizer, tell=seen.append)
        train(model, optimizer, steps=5)
        losses.append({name: value.clone() for name, value in model.state_dict().items()})
    assert len(seen) == 1
    assert all(torch.equal(losses[0][name], value) for name, value in losses[1].items())
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_run_notes_what_does_not_learn(tiny):
    from poetx.train.metrics import read_metrics
    from poetx.train.progress import Reporter
    from poetx.train.run import train as run

    class Notes(Reporter):
        def __init__(self):
            self.notes = []

        def note(self, text):
            self.notes.append(text)

    reporter = Notes()
    result = run(tiny("poet.merge_every=null", "train.steps=4"), reporter=reporter)
    assert any("poetx.merge_every" in note for note in reporter.notes)
    (line,) = [e for e in read_metrics(result.run_dir / "metrics.jsonl") if e["event"] == "training_check"]
    assert line["step"] == 3
    assert len(line["problems"]) == 1


@pytest.mark.parametrize("method", ["poet-x", "single-step"])
def test_everything_unfrozen_and_a_part_frozen_again_raise_no_alarm(method):
    """``requires_grad_(True)`` of the whole model reaches frozen weights, which a gradient never does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    convert_(model, PoetConfig(method=method, block_size=4))
    model.requires_grad_(False).requires_grad_(True)
    model[2].requires_grad_(False)
    optimizer = (
        POETX(model) if method == "single-step" else torch.optim.AdamW(param_groups(model, lr=1e-3, poet_lr=1e-3))
    )
    if method == "poet-x":
        merge_every(optimizer, model, steps=2)
    check = check_training(model, optimizer, steps=3)
    for _ in range(3):
        descend(model(torch.randn(5, 6)).square().mean(), optimizer)
    assert check.result.problems == ()
    assert check.result.matrices == (2 if method == "single-step" else 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: check_training(model, None),  # type: ignore[arg-type]
        lambda model: merge_every(None, model),  # type: ignore[arg-type]
        lambda model: merge_every(list(model.parameters()), model),
        lambda model: poetx.merge_(model, "sgd"),
    ],
)
def test_what_is_no_optimizer_is_named(call):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    convert_(model, PoetConfig(block_size=4, target_modules=["0"]))
    with pytest.raises(poetx.UserError, match=r"was given for an optimizer, such as torch\.optim\.AdamW"):
        call(model)
