"""Every method by its word: it trains, resumes, exports a plain model, and puts its own keys into any recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import FalconMambaConfig, OlmoeConfig, PreTrainedConfig, Qwen2MoeConfig

from builders import Tiny
from poetx.errors import UserError
from poetx.methods import convert_model, merge_handle, method_of, release_handle
from poetx.models import build_model
from poetx.recipe import Recipe, load_recipe, with_method
from poetx.recipe.shorthands import METHODS
from poetx.train.step import TrainingStep

CPU = torch.device("cpu")


def built(recipe: Recipe) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = build_model(recipe, vocab_size=320, end_of_text_id=0, device=CPU)
    convert_model(model, recipe, CPU)
    return model, method_of(recipe).build_optimizer(model, recipe.train.steps)


def of_config(tiny: Tiny, tmp_path: Path, config: PreTrainedConfig, *settings: str) -> Recipe:
    config.save_pretrained(tmp_path / "config")
    sizes = [f"model.{key}=null" for key in ("hidden_size", "intermediate_size", "num_layers", "num_heads")]
    return tiny(*sizes, f"model.config={tmp_path / 'config'}", "train.dtype=float32", *settings)


@pytest.mark.parametrize("kind", [Qwen2MoeConfig, OlmoeConfig], ids=["qwen2_moe", "olmoe"])
def test_adapters_of_experts_are_merged_into_a_plain_model(
    kind: type[PreTrainedConfig], tiny: Tiny, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_experts": 4, "intermediate_size": 24, "moe_intermediate_size": 24}
    config = kind(**sizes, num_key_value_heads=2, num_experts_per_tok=2, **experts)
    recipe = of_config(tiny, tmp_path, config, "method=lora")
    model, _ = built(recipe)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        want = model.eval()(input_ids=ids).logits
        method_of(recipe).to_dense_(model)
        got = model(input_ids=ids).logits
    plain = build_model(recipe, vocab_size=320, end_of_text_id=0, device=CPU).eval()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.allclose(got, want, atol=1e-4)
    assert (plain(input_ids=ids).logits - want).norm() > 0.01 * want.norm()


def test_what_peft_does_not_adapt_is_one_line(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config = FalconMambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(UserError, match=r"lora: .*mamba.*another method") as error:
        built(of_config(tiny, tmp_path, config, "method=lora"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_can_be_put_into_any_recipe_and_back(name: str) -> None:
    for source in ("demo", "demo-single-step", "llama-60m"):
        recipe = with_method(load_recipe(source, text=False), name)
        assert source == "llama-60m" or recipe == load_recipe(source, [f"method={name}"])
        assert recipe.poet is None or load_recipe(source, [f"method={name}"], text=False).poet == recipe.poet
        assert with_method(recipe, name) == recipe
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        back = with_method(with_method(recipe, "adamw"), "fast")
        assert type(method_of(back)).__name__ == "MergedRotations"


def test_a_rank_above_every_matrix_is_refused(tiny: Tiny) -> None:
    with pytest.raises(UserError, match="rank=33: no matrix has a smaller side of more than 32, so galore"):
        built(tiny("method=galore", "optimizer.rank=33", "train.dtype=float32"))


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UserError, match="method=adamw-8bits: no such method; did you mean 'adamw-8bit'"):
        load_recipe("demo", ["method=adamw-8bits"])


def test_merges_and_releases_are_registered_by_the_method(tiny: Tiny) -> None:
    _, optimizer = built(tiny("train.dtype=float32", "optimizer.clip=null", "optimizer.release_gradients=true"))
    merges, release = merge_handle(optimizer), release_handle(optimizer)
    assert merges is not None
    assert merges.steps == 5
    assert release is not None
    _, plain = built(tiny("train.dtype=float32", "method=adamw"))
    assert merge_handle(plain) is None
    assert release_handle(plain) is None


@pytest.mark.parametrize("name", ["mem", "single-step", "adamw", "muon"])
def test_releasing_gradients_means_both_ends_or_every_matrix_of_a_dense_model(name: str, tiny: Tiny) -> None:
    """During backward the released ones are stepped, so that nothing is left of them for the step."""
    recipe = tiny(f"method={name}", "train.dtype=float32", "optimizer.clip=null", "optimizer.release_gradients=true")
    model, optimizer = built(recipe)
    left: list[str] = []
    step = TrainingStep.of(recipe, model, optimizer)
    step.phase = lambda phase: left.extend(
        n for n, p in model.named_parameters() if phase == "step" and p.grad is not None and p.ndim >= 2
    )
    before = model.lm_head.weight.detach().clone()
    ids = torch.randint(320, (2, 16))
    assert not step([(ids, ids)]).skipped
    assert not torch.equal(model.lm_head.weight, before)
    assert [n for n in left if "skew" not in n and "rotation" not in n] == []


def test_epsilon_is_added_as_published_where_the_recipe_says_so(tiny: Tiny) -> None:
    for mode in ("uncorrected", "corrected"):
        _, optimizer = built(tiny("train.dtype=float32", f"optimizer.poet_eps_mode={mode}"))
        groups = {group["name"]: group for group in optimizer.param_groups}
        assert groups["rotations"].get("eps_mode", "corrected") == mode
        assert groups["decay"].get("eps_mode", "corrected") == "corrected"


def test_muon_steps_the_matrices_between_the_ends_at_its_own_rate(tiny: Tiny) -> None:
    recipe = tiny("method=muon", "train.dtype=float32", "optimizer.lr=0.01", "optimizer.matrix_lr=0.02")
    model, optimizer = built(recipe)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        assert rates[id(parameter)] == (0.02 if inner else 0.01), name


def test_mixed_precision_keeps_float32_weights_and_computes_in_bfloat16(tiny: Tiny) -> None:
    recipe = tiny("method=adamw-mixed")
    model, optimizer = built(recipe)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    ids = torch.randint(320, (2, 16))
    TrainingStep.of(recipe, model, optimizer)([(ids, ids)])
    assert seen == [torch.bfloat16]


def test_taking_a_step_without_looking_gives_the_same_weights(tiny: Tiny) -> None:
    recipe = tiny("train.dtype=float32", "train.chunked_loss=true")
    ids = torch.randint(320, (4, 16))
    ends = []
    for look in (True, False):
        model, optimizer = built(recipe)
        step = TrainingStep.of(recipe, model, optimizer)
        batches = [(ids[:2], ids[:2]), (ids[2:], ids[2:])]
        loss = step(batches, clip=0.1).loss if look else step.take(batches, clip=0.1).item()
        ends.append((loss, [p.detach().clone() for p in model.parameters()]))
    assert ends[0][0] == pytest.approx(ends[1][0])
    for a, b in zip(ends[0][1], ends[1][1], strict=True):
        torch.testing.assert_close(a, b)
