"""Every test starts from the same global generator, on one thread; fixtures of a tiny run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from poetx.recipe import Recipe, load_recipe

#: A run that trains in well under a second: 8 documents, 300 tokens, one layer of width 32.
TINY = """
name: tiny
model: {hidden_size: 32, intermediate_size: 48, num_layers: 1, num_heads: 2}
data: {vocab_size: 320, seq_len: 16, validation_fraction: 0.25}
poet: {block_size: 16, init: normalized, merge_every: 5}
optimizer: {lr: 3.0e-3, poet_lr: 2.0e-3, clip: 1.0, warmup_steps: 3}
train: {steps: 12, batch_size: 4, eval_every: 6, eval_windows: 4, checkpoint_every: 6, keep_checkpoints: 3,
        device: cpu}
"""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA GPU")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on two threads, and a child process can be given the same number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of eight text files with enough repetition to be learnt."""
    directory = tmp_path_factory.mktemp("corpus")
    generator = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "the", "of", "and", "quickly", "runs", "résumé"]
    for number in range(8):
        text = "".join(f"{' '.join(generator.choices(words, k=9))}.\n" for _ in range(60))
        (directory / f"{number}.txt").write_text(text, encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of tokenized data for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe as a file."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return path


@pytest.fixture
def tiny(tiny_yaml: Path, corpus: Path, cache_dir: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """``tiny("a.b=c", …)``: the tiny recipe with overrides, its run directory under ``tmp_path``."""

    def make(*overrides: str, run_dir: str | Path = "run") -> Recipe:
        places = (f"data.train={corpus}", f"data.cache_dir={cache_dir}", f"run_dir={tmp_path / run_dir}")
        return load_recipe(str(tiny_yaml), [*places, *overrides])

    return make
