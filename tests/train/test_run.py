"""The run directory: its contents, what a failing start leaves (nothing), resuming, exporting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from builders import At, Tiny, interrupt, train_losses
from poetx import files
from poetx.distributed import launch
from poetx.errors import UserError
from poetx.recipe import Recipe, load_recipe
from poetx.runs.generate import generate_text
from poetx.runs.load import load_run
from poetx.train import checkpoint as ckpt
from poetx.train.metrics import read_metrics
from poetx.train.run import train


def test_everything_that_belongs_to_a_run_is_there(tiny: Tiny) -> None:
    recipe = tiny()
    result = train(recipe)
    run_dir = result.run_dir
    assert load_recipe(str(run_dir)).to_dict()["poet"] == recipe.to_dict()["poet"]
    assert load_recipe(str(run_dir)).train.dtype == "float32"  # "auto" settled
    assert "q_proj" in (run_dir / "conversion.txt").read_text()
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    events = [(entry["event"], entry["step"]) for entry in read_metrics(run_dir / "metrics.jsonl")]
    assert [step for event, step in events if event == "train"] == list(range(1, 13))
    assert [step for event, step in events if event == "validation"] == [0, 6, 12]
    assert [ckpt.step_of(path) for path in ckpt.checkpoints(run_dir)] == [6, 12]


def test_the_export_loads_with_transformers_alone_and_computes_the_same(tiny: Tiny) -> None:
    """12 steps end with rotations that are two steps old, so folding them is part of what is tested."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = train(tiny())
    assert result.export_dir is not None
    exported = AutoModelForCausalLM.from_pretrained(result.export_dir)
    tokenizer = AutoTokenizer.from_pretrained(result.export_dir)
    assert type(exported.model.layers[0].mlp.up_proj) is torch.nn.Linear
    ids = tokenizer("alpha beta gamma", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "alpha beta gamma"
    restored = load_run(str(result.run_dir), device="cpu")
    with torch.no_grad():
        expected = restored.model(ids).logits
        assert torch.equal(exported(ids).logits, expected)
        loss = _validation_loss(exported, result.run_dir, load_recipe(str(result.run_dir)))
    last = [e for e in read_metrics(result.run_dir / "metrics.jsonl") if e["event"] == "validation"][-1]
    assert loss == pytest.approx(last["loss"], rel=1e-4)  # rotated (order 3) against folded (exact)


def _validation_loss(model: torch.nn.Module, run_dir: Path, recipe: Recipe) -> float:
    from poetx.data.prepare import prepare_data
    from poetx.data.sampler import evenly_spread
    from poetx.train.loop import evaluate

    data = prepare_data(recipe).validation
    windows = evenly_spread(recipe.train.eval_windows, len(data))
    return evaluate(model, data, windows, batch_size=4, device=torch.device("cpu"))


def test_tied_embeddings_stay_tied_through_checkpoint_and_export(tiny: Tiny) -> None:
    recipe = tiny("model.tie_embeddings=true", "train.steps=6")
    train(recipe)
    model = load_run(str(recipe.directory), device="cpu").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    exported = load_run(str(recipe.directory / "export"), device="cpu").model
    assert torch.equal(exported.lm_head.weight, model.model.embed_tokens.weight)


def test_continuing_from_a_pretrained_model_keeps_its_function_at_the_start(tiny: Tiny) -> None:
    first = train(tiny(run_dir="first"))
    sizes = [f"model.{key}=null" for key in ("hidden_size", "intermediate_size", "num_layers", "num_heads")]
    recipe = tiny(*sizes, f"model.pretrained={first.export_dir}", "poet.init=keep", "train.steps=2", run_dir="second")
    second = train(recipe)
    assert second.first_perplexity == pytest.approx(first.last_perplexity, rel=1e-3)


def test_generation_is_seeded_and_leaves_the_global_generator_alone(tiny: Tiny) -> None:
    result = train(tiny("train.steps=6"))
    loaded = load_run(str(result.run_dir), device="cpu")
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    texts = [generate_text(loaded, "alpha", max_new_tokens=12, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(2), expected)
    assert texts[0] == texts[1] != texts[2]
    assert generate_text(loaded, "", max_new_tokens=3, temperature=0.0) is not None


def test_a_finished_run_is_not_trained_over_by_mistake(tiny: Tiny) -> None:
    recipe = tiny("train.steps=2")
    train(recipe)
    (recipe.directory / "notes.txt").write_text("mine")
    before = (recipe.directory / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"already has checkpoints.*continue it with --resume.*--overwrite"):
        train(recipe)
    with pytest.raises(UserError, match="fewer than one window"):  # a failing start deletes nothing either
        train(tiny("data.seq_len=100000"), overwrite=True)
    assert (recipe.directory / "metrics.jsonl").read_text() == before
    train(tiny("train.steps=1"), overwrite=True)
    assert [ckpt.step_of(path) for path in ckpt.checkpoints(recipe.directory)] == [1]
    assert (recipe.directory / "notes.txt").read_text() == "mine"


def test_resuming_with_another_recipe_names_what_differs(tiny: Tiny) -> None:
    train(tiny("train.steps=2"))
    with pytest.raises(
        UserError,
        match=r"another recipe: train\.steps \(2 -> 3\); .*; to train a finished model on, model\.pretrained=",
    ):
        train(tiny("train.steps=3"), resume=True)
    with pytest.raises(UserError, match=r"poet\.block_size \(16 -> 8\)"):
        train(tiny("train.steps=2", "poet.block_size=8"), resume=True)
    resumed = train(tiny("train.steps=2", "train.eval_every=1", "train.log_every=3"), resume=True)
    assert (resumed.step, resumed.signum) == (2, None)


def test_a_full_disk_during_training_is_one_line(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny()

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync_to_disk", full)
    with pytest.raises(UserError, match="No space left on device"):
        train(recipe)
    assert list((recipe.directory / "checkpoints").iterdir()) == []


def test_text_that_has_moved_can_be_resumed(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("some words to begin with\n" * 4000)
    settings = (f"data.cache_dir={tmp_path / 'c'}", "data.validation_fraction=0.5", "train.checkpoint_every=2")
    whole = train(tiny(f"data.train={path}", *settings, "train.steps=4", run_dir="whole"))
    parts = tiny(f"data.train={path}", *settings, "train.steps=4", run_dir="parts")
    train(parts)
    (parts.directory / "checkpoints" / "step-00000004" / "manifest.json").unlink()
    path.rename(tmp_path / "elsewhere.txt")
    moved = tiny(f"data.train={tmp_path / 'elsewhere.txt'}", *settings, "train.steps=4", run_dir="parts")
    resumed = train(moved, resume=True)
    assert train_losses(resumed.run_dir) == train_losses(whole.run_dir)


def test_a_host_without_an_address_is_refused_soon(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "PATIENT", 0)
    with pytest.raises(
        UserError, match=r"^MASTER_ADDR=no-such-host\.invalid: no such host .*; set it to that of rank 0"
    ):
        train(tiny())


@pytest.mark.parametrize(
    ("world", "words"),
    [("2", "WORLD_SIZE=2 without RANK: .* torchrun"), ("two", "WORLD_SIZE=two: must be"), ("1", ""), ("", "")],
)
def test_one_of_several_processes_that_cannot_find_the_others_is_refused_before_anything_is_written(
    world: str, words: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.delenv("RANK", raising=False)
    recipe = tiny("train.steps=1", "train.export=false")
    if not words:
        assert train(recipe).step == 1
        return
    with pytest.raises(UserError, match=words):
        train(recipe)
    assert not recipe.directory.exists()


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["method=single-step"], "leave out rotated matrices"),
        (["optimizer.release_gradients=true", "optimizer.clip=null"], "leaves out released gradients"),
        (["method=adamw"], ""),
        (["poet.merge_every=1000"], "poet.merge_every=1000 is more than train.steps=12: nothing is merged"),
        (["optimizer.warmup_steps=36", "optimizer.clip_ramp_until=0"], "the learning rate ends at 33% of its peak"),
    ],
)
def test_what_people_should_know_is_said_at_the_start(overrides: list[str], word: str, tiny: Tiny) -> None:
    reporter = At(0, interrupt)
    result = train(tiny(*overrides, "train.export=false"), reporter=reporter)
    assert word in "; ".join(reporter.notes)
    assert bool(word) == bool(reporter.notes)
    lines = [e for e in read_metrics(result.run_dir / "metrics.jsonl") if e["event"] == "train"]
    assert {e.get("grad_norm_of") for e in lines} == ({"rest"} if "leave" in word else {None})


@pytest.mark.parametrize("kind", ["qwen2_moe", "olmoe"])
def test_the_routers_of_a_mixture_of_experts_train_with_their_loss_or_it_is_said(
    kind: str, tiny: Tiny, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"shared_expert_intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 400, "max_position_embeddings": 64}
    found = {}
    for on, weight in ((True, 1.0), (True, 0.0), (False, 1.0)):
        config = tmp_path / f"{on}{weight}.json"
        own = {"model_type": kind, "output_router_logits": on, "router_aux_loss_coef": weight}
        config.write_text(json.dumps(sizes | own))
        reporter = At(0, interrupt)
        recipe = tiny(f"model.config={config}", "method=adamw", "train.steps=1", "train.micro_batch_size=2",
                      "train.export=false", run_dir=config.stem)  # fmt: skip
        train(recipe, reporter=reporter)
        (line,) = [e for e in read_metrics(recipe.directory / "metrics.jsonl") if e["event"] == "train"]
        found[on, weight] = line
        assert any("load-balancing loss" in note for note in reporter.notes) == (not on)
        if on:
            with pytest.raises(UserError, match="output_router_logits"):
                train(recipe.with_keys({"train.chunked_loss": True, "run_dir": str(tmp_path / "chunked")}))
    # at the start of about the size that balanced routers have: their number of choices for every token
    assert found[True, 1.0]["router_loss"] == pytest.approx(2, rel=0.5)
    assert found[True, 0.0]["router_loss"] == 0
    assert found[True, 1.0]["grad_norm"] != found[True, 0.0]["grad_norm"] == found[False, 1.0]["grad_norm"]
    assert "router_loss" not in found[False, 1.0]
    assert found[True, 1.0]["loss"] == found[False, 1.0]["loss"]


def test_a_run_directory_that_links_to_nothing_is_refused_before_anything_is_made(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny()
    recipe.directory.parent.mkdir(parents=True, exist_ok=True)
    recipe.directory.symlink_to(tmp_path / "nowhere")
    before = sorted(recipe.directory.parent.iterdir())
    with pytest.raises(UserError, match="is a link to .*nowhere, which is not there"):
        train(recipe)
    assert sorted(recipe.directory.parent.iterdir()) == before
