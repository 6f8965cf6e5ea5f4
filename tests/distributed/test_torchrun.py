"""Under ``torchrun`` a rank that is killed ends the others, which start again and end where they would have ended."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from builders import Tiny, train_losses
from poetx.cli import main
from poetx.recipe import DEMOS
from poetx.train.run import LOCK, train
from ranks import context


def worker(directory: str, environment: dict[str, str], words: list[str]) -> None:
    """One process as ``torchrun`` starts it, on the command line."""
    os.environ.update(environment)
    os.chdir(directory)
    said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    torch.set_num_threads(1)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    sys.exit(main(words))


def test_a_killed_rank_costs_no_more_than_the_steps_since_the_last_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    settings = ["train.steps=40", "train.eval_every=40", "train.checkpoint_every=5", "train.export=false"]
    whole = train(tiny(*settings, run_dir="whole"))
    killed = tmp_path / "killed"
    (tmp_path / "tiny.yaml").write_text(tiny(*settings, run_dir="killed").to_yaml())
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's, which outlives an attempt
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}

    def start(attempt: int) -> list[multiprocessing.Process]:
        here = common | {"TORCHELASTIC_RESTART_COUNT": str(attempt)}
        environments = [here | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        words = ["train", "tiny.yaml"]
        ranks = [context().Process(target=worker, args=(str(tmp_path), own, words)) for own in environments]
        for process in ranks:
            process.start()
        return ranks

    first, second = start(0)
    while len(train_losses(killed)) < 8 and second.is_alive():
        time.sleep(0.01)
    second.kill()
    first.join(60)
    said = (tmp_path / "said.txt").read_text()
    assert first.exitcode == 1, said
    assert "error: rank 0 of 2: another rank has ended or does not answer, so this one ends, too" in said
    assert "Traceback" not in said
    assert len(train_losses(killed)) < 40
    again = start(1)
    for process in again:
        process.join(60)
    said = (tmp_path / "said.txt").read_text()
    assert [process.exitcode for process in again] == [0, 0], said
    assert re.search(r"continuing from .*killed/checkpoints/step-000000\d\d", said)
    assert said.count("\nreached step 40") == 1
    assert train_losses(killed) == pytest.approx(train_losses(whole.run_dir), rel=1e-5)
    assert not [path for path in killed.rglob("*") if ".tmp" in path.name]


def test_a_demo_that_is_started_again_goes_on_where_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from poetx.cli.train import _asked

    monkeypatch.chdir(tmp_path)
    earlier, own = tmp_path / "runs" / DEMOS[0], tmp_path / "runs" / f"{DEMOS[0]}-2"
    (earlier / "checkpoints/step-00000300").mkdir(parents=True)

    def place_and_resume() -> tuple[Path, bool]:
        recipe, resume, _ = _asked(None, [], resume=False, overwrite=False)
        return tmp_path / recipe.directory, resume

    assert place_and_resume() == (own, False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    own.mkdir()
    (own / LOCK).touch()
    assert place_and_resume() == (own, False)  # it had no checkpoint yet
    (own / "checkpoints/step-00000100").mkdir(parents=True)
    assert place_and_resume() == (own, True)
