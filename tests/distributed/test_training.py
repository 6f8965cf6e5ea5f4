"""``poetx train`` on several ranks is the run of one process: the same losses, whatever is trained, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from builders import curve, train_losses
from poetx.recipe import load_recipe
from poetx.train.checkpoint import checkpoints
from poetx.train.run import train
from ranks import run_on_two_ranks

#: A merge at the steps 5 and 10 of 12; batches of 4, so 2 sequences a rank.
FORMS = {
    "fast": ["method=fast"],
    "mem, in micro-batches": ["method=mem", "train.micro_batch_size=1"],
    "int8, checkpointed, no logits": ["method=int8", "model.gradient_checkpointing=true", "train.chunked_loss=true"],
    "single-step": ["method=single-step", "train.micro_batch_size=1"],
    "single-step, rotation": ["method=single-step", "poet.update=rotation", "model.gradient_checkpointing=true"],
    "released": ["method=mem", "optimizer.release_gradients=true", "optimizer.clip=null"],
    "dense": ["method=adamw", "train.eval_windows=3"],
}


def on_a_rank(rank: int, directory: str, yaml: str, forms: list[list[str]]) -> None:
    for overrides in forms:
        train(load_recipe(yaml, overrides))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_yaml: Path, corpus: Path, cache_dir: Path) -> Path:
    """Every form by one process, and by two."""
    place = tmp_path_factory.mktemp("forms")
    text = [f"data.train={corpus}", f"data.cache_dir={cache_dir}", "train.checkpoint_every=12", "train.export=false"]

    def forms(ranks: int) -> list[list[str]]:
        return [[*text, *form, f"run_dir={place / str(ranks) / name}"] for name, form in FORMS.items()]

    on_a_rank(0, "", str(tiny_yaml), forms(1))
    run_on_two_ranks(on_a_rank, str(place), str(tiny_yaml), forms(2))
    return place


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_train_what_one_process_trains(form: str, trained: Path) -> None:
    one, two = (curve(trained / ranks / form) for ranks in ("1", "2"))
    assert [(entry["event"], entry["step"]) for entry in one] == [(entry["event"], entry["step"]) for entry in two]
    for alone, together in zip(one, two, strict=True):
        key = "loss" if "loss" in alone else "tokens"
        assert together[key] == pytest.approx(alone[key], rel=1e-5)
        assert together.get("grad_norm", 0) == pytest.approx(alone.get("grad_norm", 0), rel=1e-4)
        assert together.get("merged") == alone.get("merged")
    losses = train_losses(trained / "2" / form)
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert [path.name for path in checkpoints(trained / "2" / form)] == ["step-00000012"]
