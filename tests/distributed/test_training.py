"""``poetx train`` on several ranks is the run of one process: the same losses, whatever happens, written once."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from builders import At, curve, interrupt, poison, train_losses
from helpers import relative_error
from poetx import PoetConfig, convert_
from poetx.distributed.gradients import GradientAverage
from poetx.errors import UserError
from poetx.layers.walk import poet_layers
from poetx.recipe import load_recipe
from poetx.train import loop, tensor_file
from poetx.train.checkpoint import checkpoints, step_of, tensor_shapes
from poetx.train.run import train
from poetx.train.step import average_of
from ranks import run_on_ranks, run_on_two_ranks

#: A merge at the steps 5 and 10 of 12; batches of 4, so 2 sequences a rank.
FORMS = {
    "fast, in micro-batches": ["method=fast", "train.micro_batch_size=1"],
    "int8, checkpointed, no logits": ["method=int8", "model.gradient_checkpointing=true", "train.chunked_loss=true"],
    "single-step": ["method=single-step", "train.micro_batch_size=1"],
    "single-step, rotation": ["method=single-step", "poet.update=rotation", "model.gradient_checkpointing=true"],
    "sharded": ["method=fast", "parallel=fsdp", "model.tie_embeddings=true"],
    "sharded, bfloat16": ["method=fast", "parallel=fsdp", "train.dtype=bfloat16"],
    "sharded, autocast to bfloat16": ["method=single-step", "parallel=fsdp", "train.autocast=true"],
    "sharded, int8, no logits": [
        *("method=int8", "model.gradient_checkpointing=true", "train.chunked_loss=true", "train.export=true"),
        "parallel=fsdp",
    ],
    "sharded, single-step": [
        *("method=single-step", "train.micro_batch_size=1", "model.gradient_checkpointing=true", "parallel=fsdp"),
        "train.chunked_loss=true",
    ],
    "released": ["method=mem", "optimizer.release_gradients=true", "optimizer.clip=null", "train.eval_windows=3"],
    "released, accumulated": [
        *("method=galore", "optimizer.release_gradients=true", "optimizer.clip=null", "train.micro_batch_size=1")
    ],
}
#: What happens to a run, by what is done on one of the ranks; all of it to a single step, whose backward acts.
EVENTS: dict[str, list[str]] = {
    "not finite on rank 1": ["method=single-step", "train.max_bad_steps=3"],
    "stopped on rank 1": ["method=single-step"],
    "a full disk on rank 0": ["method=fast"],
    "a full disk on rank 0, sharded": ["method=fast", "parallel=fsdp", "train.steps=2", "train.checkpoint_every=1"],
    "another recipe on rank 1": ["method=fast"],
    "not divisible": ["method=fast", "train.batch_size=5"],
    "other weights on rank 1": ["method=fast"],
}
#: Runs that one process began, and stopped after step 5.
CONTINUED = {
    "one, then two": ["method=single-step"],
    "one, then two, sharded": [*FORMS["sharded"], "train.checkpoint_every=8"],
    "one, then two, sharded, single-step": [*FORMS["sharded, single-step"], "train.checkpoint_every=8"],
}


#: Runs that four ranks go on with from what two wrote: whose, from which step, and how.
MOVED = {
    "ddp, then sharded": ("stopped on rank 1", 5, ["method=single-step", "parallel=fsdp", "train.export=true"]),
    "sharded, then ddp": ("one, then two, sharded", 8, [*CONTINUED["one, then two, sharded"], "parallel=ddp"]),
}


def on_a_rank(rank: int, directory: str, yaml: str, runs: dict[str, list[str]]) -> None:
    place = Path(directory)
    torch.save(averaged(rank), place / f"averaged-{rank}-of-{torch.distributed.get_world_size()}.pt")
    torch.save(average(rank), place / f"gradients-{rank}-of-{torch.distributed.get_world_size()}.pt")
    for name, overrides in runs.items():
        with pytest.MonkeyPatch.context() as patch:
            if rank == (0 if "rank 0" in name else 1) and name in EVENTS:
                overrides = [*overrides, *meddle(name, patch)]
            try:
                recipe = load_recipe(yaml, overrides)
                result = train(recipe, resume=bool(checkpoints(recipe.directory)))
                outcome = {"step": result.step, "signum": result.signum, "skipped": result.skipped_steps}
            except UserError as error:
                outcome = {"error": str(error)}
        (place / f"{name}-{rank}.json").write_text(json.dumps(outcome))


def average(rank: int) -> list[list[torch.Tensor | None]]:
    """Gradients of seven parameters, one a bucket of its own, after each of two steps of two backward passes.

    Parameter i is used in the first step on rank 0 where i is even, on rank 1 where i is a multiple of 3, once or
    twice. The third is sent by rows, the last in bfloat16.
    """
    parameters = [torch.full((size, 1), 1.0, requires_grad=True) for size in (3, 1, 40, 2, 5, 1, 3)]
    sent_in = {parameters[6]: torch.bfloat16}
    gradients = GradientAverage(parameters, bucket_bytes=32, sent_in=sent_in, by_row=[parameters[2]])
    results = []
    for step in range(2):
        for number in range(2):
            used = [p for i, p in enumerate(parameters) if step or (i % (2 + rank) == 0 and i >= 3 * number)]
            if number:
                gradients.start()
            sum((p.sum() * (rank + 1) for p in used), torch.zeros((), requires_grad=True)).backward()
        gradients.finish()
        results.append([p.grad for p in parameters])
        for p in parameters:
            p.grad = None
    return results


def averaged(rank: int) -> dict[str, Any]:
    """Gradients of an embedding, of one tied to a head and of a bfloat16 layer, their means, and the sizes sent."""
    torch.manual_seed(0)
    tokens = torch.tensor([1, 5, 5]) if rank else torch.tensor([2, 5])
    plain, tied, head = torch.nn.Embedding(50, 4), torch.nn.Embedding(50, 4), torch.nn.Linear(4, 50, bias=False)
    head.weight = tied.weight
    rotated = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False)).bfloat16()
    convert_(rotated, PoetConfig(block_size=4, init="normalized"))
    model = torch.nn.ModuleDict({"plain": plain, "tied": tied, "head": head, "rotated": rotated})
    gradients = average_of(model.parameters(), model)

    def backward() -> None:
        x = plain(tokens)
        (head(x + tied(tokens)).square().sum() + rotated(x.bfloat16()).exp().sum()).backward()

    def grads() -> dict[str, torch.Tensor]:
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    backward()
    own, sizes, reduce = grads(), [], torch.distributed.all_reduce
    model.zero_grad()

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append((tensor.dtype, tensor.numel()))
        return reduce(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", all_reduce)
        gradients.start()
        backward()
        gradients.finish()
    return {"own": own, "mean": grads(), "sizes": sizes}


def meddle(name: str, patch: pytest.MonkeyPatch) -> list[str]:
    """Do on this rank alone what the event says; overrides of its recipe."""
    if name == "not finite on rank 1":
        poison(patch, 4, 5)
    elif name == "stopped on rank 1":
        patched_step(patch, 5, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    elif name.startswith("a full disk on rank 0"):
        patch.setattr(tensor_file, "save_tensors", lambda *args: fail(OSError(errno.ENOSPC, "no room")))
    elif name == "other weights on rank 1":
        patched_step(patch, 7, swap_two_columns)
    return ["train.steps=13"] if name == "another recipe on rank 1" else []


def patched_step(patch: pytest.MonkeyPatch, at: int, action: Callable[[loop.TrainingRun], object]) -> None:
    original = loop.train_step

    def train_step(run: loop.TrainingRun, step: loop.TrainingStep) -> dict:
        facts = original(run, step)
        if run.state.step + 1 == at:
            action(run)
        return facts

    patch.setattr(loop, "train_step", train_step)


def swap_two_columns(run: loop.TrainingRun) -> None:
    """The same numbers at other places, as by another permutation."""
    weight = next(layer for _, layer in poet_layers(run.model)).frozen_weight.stored.tensors[0].data
    weight[:, [0, 1]] = weight[:, [1, 0]]


def fail(error: Exception) -> None:
    raise error


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_yaml: Path, corpus: Path, cache_dir: Path) -> Path:
    """Every form by one process and by two, and every event; all of two in one pair of processes."""
    place = tmp_path_factory.mktemp("ranks")
    text = [f"data.train={corpus}", f"data.cache_dir={cache_dir}", "train.checkpoint_every=12", "train.export=false"]

    def settings(ranks: int, name: str) -> list[str]:
        own = MOVED[name][2] if name in MOVED else (FORMS | EVENTS | CONTINUED)[name]
        return [*text, *own, f"run_dir={place / str(ranks) / name}"]

    for name in FORMS:
        train(load_recipe(str(tiny_yaml), settings(1, name)))
    for name in CONTINUED:
        train(load_recipe(str(tiny_yaml), settings(2, name)), reporter=At(5, interrupt))
    names = [*FORMS, *EVENTS, *CONTINUED]
    run_on_two_ranks(on_a_rank, str(place), str(tiny_yaml), {name: settings(2, name) for name in names})
    for name, (source, step, _) in MOVED.items():
        shutil.copytree(place / "2" / source, place / "4" / name)
        for later in checkpoints(place / "4" / name):
            if step_of(later) > step:
                shutil.rmtree(later)
    moved = {name: settings(4, name) for name in MOVED}
    run_on_ranks(4, on_a_rank, str(place), str(tiny_yaml), moved)
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, 4, 5)
        train(load_recipe(str(tiny_yaml), settings(1, "not finite on rank 1")))
    train(load_recipe(str(tiny_yaml), settings(1, "stopped on rank 1")))
    return place


def outcomes(place: Path, name: str) -> list[dict]:
    return [json.loads((place / f"{name}-{rank}.json").read_text()) for rank in range(2)]


def assert_same_curve(one: Path, two: Path, tolerance: float = 1e-5) -> None:
    one_curve, two_curve = ([entry for entry in curve(run_dir) if entry["event"] != "audit"] for run_dir in (one, two))
    assert [(e["event"], e["step"]) for e in one_curve] == [(e["event"], e["step"]) for e in two_curve]
    for alone, together in zip(one_curve, two_curve, strict=True):
        assert (together["loss"] is None) == (alone["loss"] is None)
        assert together["loss"] is None or together["loss"] == pytest.approx(alone["loss"], rel=tolerance)
        assert (together.get("merged"), together.get("skipped")) == (alone.get("merged"), alone.get("skipped"))
        if (norm := alone.get("grad_norm")) is not None:
            assert together["grad_norm"] == pytest.approx(norm, rel=10 * tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_train_what_one_process_trains(form: str, trained: Path) -> None:
    tolerance = 1e-3 if "bfloat16" in form else 1e-5
    assert_same_curve(trained / "1" / form, trained / "2" / form, tolerance)
    losses = train_losses(trained / "2" / form)
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert [path.name for path in checkpoints(trained / "2" / form)] == ["step-00000012"]


def test_gradients_are_averaged_whoever_has_one(trained: Path) -> None:
    first, second = (torch.load(trained / f"gradients-{rank}-of-2.pt") for rank in range(2))
    # Times used on either rank, of which each pass adds 1 on rank 0 and 2 on rank 1, over two ranks.
    uses = [(1, 1), (0, 0), (1, 0), (0, 2), (2, 0), (0, 0), (2, 2)]
    wanted = [[None if not a + b else (a + 2 * b) / 2 for a, b in uses], [3.0] * 7]
    for step in range(2):
        for mine, theirs, value in zip(first[step], second[step], wanted[step], strict=True):
            assert (mine is None) == (theirs is None) == (value is None)
            assert value is None or (torch.equal(mine, theirs) and torch.all(mine == value))


def test_rotations_of_bfloat16_layers_and_rows_of_embeddings_send_no_more_than_they_need(trained: Path) -> None:
    first, second = (torch.load(trained / f"averaged-{rank}-of-2.pt") for rank in range(2))
    bfloat16, float32 = torch.bfloat16, torch.float32
    # Both skews of 6 numbers together; the tied embedding whole; of the plain one the rows 1, 2 and 5, and which.
    assert sorted(first["sizes"], key=str) == sorted(
        [(bfloat16, 12), (float32, 200), (torch.uint8, 50), (float32, 12), (torch.int32, 4)], key=str
    )
    for name, mean in first["mean"].items():
        assert torch.equal(mean, second["mean"][name]), name
        wanted = (first["own"][name] + second["own"][name]) / 2
        assert mean.dtype == wanted.dtype
        assert relative_error(mean, wanted) < (2**-7 if "skew" in name else 1e-6), name
    assert first["mean"]["plain.weight"].ne(0).any(1).nonzero().flatten().tolist() == [1, 2, 5]


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all_and_leaves_no_trace(trained: Path) -> None:
    name = "not finite on rank 1"
    assert outcomes(trained, name) == [{"step": 12, "signum": None, "skipped": 2}] * 2
    assert_same_curve(trained / "1" / name, trained / "2" / name)


def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_one_process_goes_on(
    trained: Path, tiny_yaml: Path
) -> None:
    name = "stopped on rank 1"
    assert outcomes(trained, name) == [{"step": 5, "signum": signal.SIGTERM, "skipped": 0}] * 2
    run_dir = trained / "2" / name
    assert [path.name for path in checkpoints(run_dir)] == ["step-00000005"]
    train(load_recipe(str(run_dir)), resume=True)
    assert_same_curve(trained / "1" / name, run_dir)


def test_ranks_go_on_with_the_run_of_one_process(trained: Path) -> None:
    assert outcomes(trained, "one, then two") == [{"step": 12, "signum": None, "skipped": 0}] * 2
    assert_same_curve(trained / "1" / "stopped on rank 1", trained / "2" / "one, then two")


@pytest.mark.parametrize("form", ["sharded", "sharded, single-step"])
def test_sharded_ranks_go_on_with_the_run_of_one_process_which_goes_on_with_theirs(form: str, trained: Path) -> None:
    name = f"one, then two, {form}"
    assert outcomes(trained, name) == [{"step": 12, "signum": None, "skipped": 0}] * 2
    alone, together = trained / "1" / form, trained / "2" / name
    assert_same_curve(alone, together)
    (*_, at_8, at_12), (*_, own) = checkpoints(together), checkpoints(alone)
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert tensor_shapes(at_12, file) == tensor_shapes(own, file)
    shutil.rmtree(at_12)
    assert step_of(at_8) == 8
    train(load_recipe(str(together)), resume=True)
    assert_same_curve(alone, together)


@pytest.mark.parametrize(
    ("name", "alone"), [("ddp, then sharded", "stopped on rank 1"), ("sharded, then ddp", "sharded")]
)
def test_four_ranks_go_on_with_the_run_of_two_which_parted_it_otherwise(name: str, alone: str, trained: Path) -> None:
    for rank in range(4):
        assert json.loads((trained / f"{name}-{rank}.json").read_text()) == {"step": 12, "signum": None, "skipped": 0}
    assert_same_curve(trained / "1" / alone, trained / "4" / name)
    assert (trained / "4" / name / "export" / "model.safetensors").exists() == (name == "ddp, then sharded")


def test_a_sharded_run_exports_the_model_of_one_process(trained: Path) -> None:
    files = [trained / str(ranks) / "sharded, int8, no logits" / "export" / "model.safetensors" for ranks in (1, 2)]
    one, two = map(load_file, files)
    assert one.keys() == two.keys()
    for name in one:
        assert relative_error(two[name], one[name]) < 1e-3, name  # a weight may round to a neighbouring code


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a full disk on rank 0", "could not be written (no room); free some space"),
        ("a full disk on rank 0, sharded", "could not be written (no room); free some space"),
        ("another recipe on rank 1", "rank 1 differs from rank 0: train.steps is 13 there, and 12 on rank 0"),
        ("not divisible", "train.batch_size=5: cannot be parted evenly over 2 processes; use a multiple of 2"),
        ("other weights on rank 1", "model.layers.0.self_attn.q_proj: differs between ranks after merge 2 (1 of "),
    ],
)
def test_what_fails_on_one_rank_is_the_same_error_on_all(name: str, words: str, trained: Path) -> None:
    first, second = outcomes(trained, name)
    assert words in first["error"]
    assert first == second
