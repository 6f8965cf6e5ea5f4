"""Files that are not ours, runs that moved, checkpoints that broke: nothing is lost and nothing is silently wrong."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import pytest
import torch

from builders import At, Tiny, poison, train_losses
from poetx.data.prepare import prepare_data
from poetx.errors import UserError
from poetx.recipe import load_recipe
from poetx.runs.evaluate import evaluate_run
from poetx.runs.load import load_run
from poetx.train import checkpoint, loop
from poetx.train.checkpoint import checkpoints, step_of
from poetx.train.progress import Reporter
from poetx.train.run import train


@pytest.mark.parametrize("name", ["export/weights", "tokenizer/t", "checkpoints/hf.bin", "recipe.yaml"])
def test_files_of_other_origin_are_not_replaced(tiny: Tiny, name: str) -> None:
    recipe = tiny("train.export=false")
    path = recipe.directory / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(UserError, match="this program did not write"):
        train(recipe)
    assert path.read_text() == "mine"


def test_an_export_outlives_its_checkpoints(tiny: Tiny) -> None:
    recipe = tiny()
    shutil.rmtree(train(recipe).run_dir / "checkpoints")
    with pytest.raises(UserError, match="or an export"):
        train(recipe)
    assert (recipe.directory / "export" / "model.safetensors").is_file()


def test_a_run_directory_means_where_it_is_now(tiny: Tiny, tmp_path: Path) -> None:
    first = train(tiny("train.export=false")).run_dir
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    shutil.rmtree(checkpoints(copy)[-1])
    before = (first / "metrics.jsonl").read_bytes()
    resumed = train(load_recipe(str(copy)), resume=True)
    assert resumed.run_dir == copy
    assert resumed.step == 12
    assert (first / "metrics.jsonl").read_bytes() == before


def test_relative_paths_in_a_run_are_kept_absolute(tiny: Tiny, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus.parent)
    run = train(tiny(f"data.train={corpus.name}", "train.export=false")).run_dir
    monkeypatch.chdir("/")
    assert load_recipe(str(run)).data.train == str(corpus)


def test_evaluating_and_resuming_on_changed_text_is_refused(tiny: Tiny, corpus: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    shutil.copytree(corpus, text)
    run = train(tiny(f"data.train={text}", "train.export=false")).run_dir
    assert evaluate_run(str(run), data=None).perplexity > 1
    (text / "0.txt").write_text("something else entirely " * 300)
    with pytest.raises(UserError, match="was trained on other text"):
        train(load_recipe(str(run)), resume=True)
    with pytest.raises(UserError, match="has changed since it was trained"):
        evaluate_run(str(run), data=None)


def test_a_broken_newer_checkpoint_does_not_push_good_ones_out(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny("train.checkpoint_every=4", "train.export=false")
    train(recipe)
    broken = checkpoints(recipe.directory)[-1]
    (broken / "model.safetensors").write_bytes(b"")
    again = tiny("train.checkpoint_every=1", "train.keep_checkpoints=1", "train.export=false")
    real = loop.train_step

    def stop_after_nine(run, step):
        if run.state.step == 9:
            raise KeyboardInterrupt
        return real(run, step)

    monkeypatch.setattr(loop, "train_step", stop_after_nine)
    with pytest.raises(KeyboardInterrupt):
        train(again, resume=True)
    monkeypatch.undo()
    assert [step_of(path) for path in checkpoints(recipe.directory)] == [9]
    assert train(again, resume=True).step == 12


def test_a_directory_in_use_is_left_alone(tiny: Tiny) -> None:
    recipe = tiny("train.export=false", "train.checkpoint_every=4")
    run = train(recipe).run_dir
    live = run / "checkpoints" / ".step-00000099.tmp"
    live.mkdir()
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for damaged in (None, *checkpoints(run)):  # which the other process may be removing
            if damaged:
                (damaged / "state.json").unlink()
            with pytest.raises(UserError, match="another process is training there"):
                train(recipe, resume=True)
    assert live.is_dir()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only Linux tells where an open file is")
@pytest.mark.parametrize(
    ("event", "at", "to", "words"),
    [
        ("step", 5, "elsewhere", r"is at .*elsewhere now.*step-00000005; continue with: poetx"),
        ("step", 5, None, r"has been moved or removed.* step 5$"),
        ("validation", 12, "elsewhere", r"is at .*elsewhere now.*step-00000012; continue with: poetx"),
        ("write", 12, "elsewhere", r"is at .*elsewhere now.*step-00000012; continue with: poetx"),
    ],
)
def test_a_run_whose_directory_is_moved_stops_and_loses_nothing(
    event: str, at: int, to: str | None, words: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny("train.checkpoint_every=100")

    def move(step: int) -> None:
        if step == at and recipe.directory.exists():
            recipe.directory.rename(tmp_path / to) if to else shutil.rmtree(recipe.directory)

    class Mover(Reporter):
        def step(self, entry: dict) -> None:
            if event == "step":
                move(entry["step"])

        def validation(self, entry: dict) -> None:
            if event == "validation":
                move(entry["step"])

    if event == "write":
        original = checkpoint._write_files
        monkeypatch.setattr(
            checkpoint, "_write_files", lambda place, *rest: (move(rest[2]["train"]["step"]), original(place, *rest))
        )
    with pytest.raises(UserError, match=words):
        train(recipe, reporter=Mover())
    assert not recipe.directory.exists()
    if to:
        assert train(load_recipe(str(tmp_path / to)), resume=True).step == 12


def test_a_last_step_that_is_skipped_still_leaves_a_checkpoint(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 11)
    result = train(tiny("train.checkpoint_every=100", "train.export=false"))
    assert result.skipped_steps == 1
    assert [step_of(path) for path in checkpoints(result.run_dir)] == [12]


def test_weights_that_are_not_finite_are_never_saved(tiny: Tiny) -> None:
    recipe = tiny("optimizer.name=sgd", "optimizer.lr=1e38", "optimizer.clip=null", "train.max_bad_steps=3")
    with pytest.raises(UserError, match=r"there is no checkpoint yet"):
        train(recipe)
    assert checkpoints(recipe.directory) == []


def test_a_context_longer_than_the_models_positions_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(vocab_size=400, n_positions=8, n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path / "gpt2")
    shape = "model={config: " + str(tmp_path / "gpt2") + "}"
    with pytest.raises(UserError, match=r"data.seq_len=16: the model has 8 positions"):
        train(tiny(shape))


def test_chunked_loss_refuses_models_that_change_the_logits(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import Gemma2Config

    config = Gemma2Config(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, head_dim=16
    )
    config.num_key_value_heads = 2
    config.save_pretrained(tmp_path / "gemma")
    shape = "model={config: " + str(tmp_path / "gemma") + "}"
    with pytest.raises(UserError, match="changes the logits after its head"):
        train(tiny(shape, "train.chunked_loss=true"))


def test_dropout_is_drawn_from_restored_generators_and_off_in_evaluation(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(vocab_size=400, n_positions=32, n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path / "gpt2")
    settings = ("model={config: " + str(tmp_path / "gpt2") + "}", "train.export=false", "train.checkpoint_every=5")
    whole = train(tiny(*settings, run_dir="whole"))
    parts = tiny(*settings, run_dir="parts")
    train(parts)
    shutil.rmtree(checkpoints(parts.directory)[-1])
    assert train_losses(train(parts, resume=True).run_dir) == train_losses(whole.run_dir)
    windows = list(range(3))
    text = whole.model
    data = prepare_data(parts).validation
    losses = {loop.evaluate(text, data, windows, batch_size=1, device=torch.device("cpu")) for _ in range(2)}
    assert len(losses) == 1


def test_metrics_that_are_gone_are_said(tiny: Tiny) -> None:
    recipe, told = tiny("train.export=false"), At(0, lambda: None)
    train(recipe)
    shutil.rmtree(recipe.directory / "checkpoints/step-00000012")
    (recipe.directory / "metrics.jsonl").unlink()
    train(recipe, resume=True, reporter=told)
    assert any(note.endswith("metrics.jsonl: is gone; it begins anew after step 6") for note in told.notes)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_checkpoint_is_no_run(tiny: Tiny, overwrite: bool) -> None:
    train(tiny("train.export=false"))
    place = tiny().directory / "checkpoints/step-00000006"
    before = sorted(place.iterdir())
    message = rf"^{place}: is a checkpoint; give its run, {tiny().directory}, read at its newest one$"
    for act in (
        lambda: train(load_recipe(str(place)), overwrite=overwrite, resume=not overwrite),
        lambda: load_run(str(place)),
    ):
        with pytest.raises(UserError, match=message):
            act()
    assert sorted(place.iterdir()) == before


def test_a_run_whose_text_has_moved_says_how_to_go_on(tiny: Tiny, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "text")
    recipe = tiny(f"data.train={tmp_path / 'text'}", "train.export=false")
    train(recipe)
    (tmp_path / "text").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"no such file or directory; where the text has moved, give data\.train=PATH"):
        train(load_recipe(str(recipe.directory)), resume=True)
    moved = load_recipe(str(recipe.directory), [f"data.train={tmp_path / 'elsewhere'}"])
    assert train(moved, resume=True).step == 12
