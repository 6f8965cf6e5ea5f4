"""Junk in, one line out: recipes and checkpoints that somebody or something has damaged."""

from __future__ import annotations

import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from poetx.errors import UserError
from poetx.recipe import Recipe, load_recipe
from poetx.train.checkpoint import BrokenCheckpoint, checkpoints, find_checkpoint, verify
from poetx.train.run import train

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=20),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
    st.sampled_from(["adamw", "fast", "float16", "bfloat16", "cuda:99", "/dev/null", "1e-3", "all-linear"]),
)


def flat_keys(values: dict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in values.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += flat_keys(value, f"{prefix}{key}.")
    return keys


KEYS = flat_keys(load_recipe("demo").to_dict())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(KEYS), JUNK)
def test_any_value_for_any_key_is_accepted_or_refused_in_one_line(key: str, value: object) -> None:
    try:
        load_recipe("demo", [f"{key}={yaml.safe_dump(value, default_flow_style=True).removesuffix('...').strip()}"])
    except UserError as error:
        assert "\n" not in str(error)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_any_file_is_a_recipe_or_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, data) -> None:
    text = yaml.safe_dump(load_recipe("demo").to_dict()).encode()
    cut = data.draw(st.integers(0, len(text)))
    noise = data.draw(st.binary(max_size=8))
    path = tmp_path_factory.mktemp("fuzz") / "recipe.yaml"
    path.write_bytes(text[:cut] + noise + text[cut + data.draw(st.integers(0, 40)) :])
    try:
        load_recipe(str(path))
    except UserError as error:
        assert "\n" not in str(error)


def flip(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def cut(path: Path, generator: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: generator.randrange(path.stat().st_size)])


def remove(path: Path, generator: random.Random) -> None:
    path.unlink()


@pytest.fixture(scope="module")
def two_runs(tiny_yaml: Path, corpus: Path, cache_dir: Path, tmp_path_factory) -> tuple[Recipe, Recipe]:
    """Two finished runs of recipes that differ in the seed only."""
    runs = []
    for seed in (0, 1):
        place = tmp_path_factory.mktemp("fuzzed") / "run"
        overrides = [f"data.train={corpus}", f"data.cache_dir={cache_dir}", f"run_dir={place}", "train.export=false"]
        runs.append(load_recipe(str(tiny_yaml), [*overrides, f"train.seed={seed}", "train.checkpoint_every=4"]))
        train(runs[-1])
    return runs[0], runs[1]


def test_every_damage_to_every_file_is_found(two_runs: tuple[Recipe, Recipe], tmp_path: Path) -> None:
    source = checkpoints(two_runs[0].directory)[-1]
    other = checkpoints(two_runs[1].directory)[-1]
    generator, cases = random.Random(0), 0
    for file in sorted(path.name for path in source.iterdir()):
        for damage in (flip, flip, flip, cut, remove, "swap"):
            copy = tmp_path / "copy"
            shutil.copytree(source, copy)
            if damage == "swap":
                if (other / file).read_bytes() == (source / file).read_bytes():
                    shutil.rmtree(copy)
                    continue
                shutil.copyfile(other / file, copy / file)
            else:
                damage(copy / file, generator)
            # A flipped bit in the manifest may leave it valid JSON that names another size, sum, file or format.
            with pytest.raises((BrokenCheckpoint, UserError)) as caught:
                verify(copy)
            assert "\n" not in str(caught.value), (file, damage)
            shutil.rmtree(copy)
            cases += 1
    assert cases >= 6 * 5


def test_a_whole_checkpoint_of_another_run_is_not_loaded_in_silence(
    two_runs: tuple[Recipe, Recipe], tmp_path: Path
) -> None:
    recipe, other = two_runs
    newest = checkpoints(recipe.directory)[-1]
    kept = tmp_path / "kept"
    shutil.move(newest, kept)
    shutil.copytree(checkpoints(other.directory)[-1], newest)
    try:
        with pytest.raises(UserError, match=r"another recipe: .*train\.seed \(1 -> 0\)"):
            train(recipe, resume=True)
    finally:
        shutil.rmtree(newest)
        shutil.move(kept, newest)
    assert find_checkpoint(recipe.directory) == (newest, [])


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_no_pickle_is_ever_loaded(tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch) -> None:
    """From a data file, a pretrained directory or a run directory."""
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb())
    for name in ("data.txt", "data.jsonl", "data.bin", "data.pt"):
        (tmp_path / name).write_bytes(bomb)
        with pytest.raises(UserError):
            train(tiny(f"data.train={tmp_path / name}"))
    finished = train(tiny())
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        (finished.run_dir / name).write_bytes(bomb)
    pretrained = tmp_path / "pretrained"
    shutil.copytree(finished.export_dir, pretrained)
    (pretrained / "model.safetensors").unlink()
    (pretrained / "pytorch_model.bin").write_bytes(bomb)
    shape = "model={pretrained: " + str(pretrained) + "}"
    with pytest.raises(UserError) as caught:
        train(tiny(shape, "poet.init=keep", run_dir="other"))
    assert "\n" not in str(caught.value)
    assert not Path("exploded").exists()
