"""Recipes: strict keys, types, values, overrides, and the published numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from poetx.errors import UserError
from poetx.recipe import Recipe, builtin_recipes, differing_keys, load_recipe
from poetx.remarks import remarks

BIG = [name for name in builtin_recipes() if not name.startswith("demo") and not name.endswith("single-step")]


@pytest.mark.parametrize("name", builtin_recipes())
def test_builtin_recipes_load_and_survive_yaml(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["data.train=builtin"])
    assert recipe.name == name
    path = tmp_path / "copy.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize("name", BIG)
def test_big_recipes_ask_for_text(name: str) -> None:
    with pytest.raises(UserError, match=r"data\.train is missing.*data\.train=PATH"):
        load_recipe(name)


@pytest.mark.parametrize("name", BIG)
def test_big_recipes_are_the_published_ones(name: str) -> None:
    recipe = load_recipe(name, ["data.train=x"])
    assert recipe.poet is not None
    assert (recipe.poet.merge_every, recipe.poet.config.block_size, recipe.poet.config.init) == (
        200,
        256,
        "normalized",
    )
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.poet_lr, optimizer.poet_eps, optimizer.weight_decay) == (
        1e-3,
        2.5e-4,
        1e-6,
        0.0,
    )
    assert (optimizer.clip, optimizer.clip_ramp_until, optimizer.clip_ramp_steps) == (0.1, 2000, 10)
    assert (optimizer.warmup_steps, recipe.train.steps, optimizer.min_lr_ratio) == (5000, 600_000, 0.01)
    assert (recipe.data.seq_len, recipe.train.batch_size, recipe.train.dtype) == (256, 512, "auto")


@pytest.mark.parametrize(("name", "billions"), [("llama-3b", 2.76447), ("llama-8b", 8.05), ("llama-13b", 13.0)])
def test_big_recipes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    """Counted from the shape: embedding and head, 4 h² + 3 h m + 2 h a layer, and a norm."""
    model = load_recipe(name, ["data.train=x"]).model
    assert model.hidden_size
    assert model.intermediate_size
    assert model.num_layers
    hidden = model.hidden_size
    layer = 4 * hidden**2 + 3 * hidden * model.intermediate_size + 2 * hidden
    total = 2 * 32_000 * hidden + model.num_layers * layer + hidden
    assert total / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", r"^train\.stepz: unknown key; did you mean 'steps'\?$"),
        ("trian.steps=3", r"^trian: unknown key; did you mean 'train'\?$"),
        ("poet.blok_size=64", r"^poet\.blok_size: unknown key; did you mean 'block_size'\?$"),
        ("poet.block_size=0", r"^poet\.block_size=0: must be"),
        ("poet.block_size=-4", r"^poet\.block_size=-4: must be"),
        ("poet.block_size=big", r"^poet\.block_size='big': must be a whole number"),
        ("poet.merge_every=0", r"^poet\.merge_every=0 must be positive"),
        ("train.steps=many", r"^train\.steps='many': must be a whole number"),
        ("train.steps=1.5", r"^train\.steps=1\.5: must be a whole number"),
        ("train.steps=true", r"^train\.steps=True: must be a whole number"),
        ("train.steps=0", r"^train\.steps=0 must be positive"),
        ("train.dtype=float16", r"float16 needs loss scaling.*use bfloat16"),
        ("train.dtype=flaot32", r"must be one of .*did you mean 'float32'"),
        ("train.micro_batch_size=7", r"micro_batch_size=7 does not divide train\.batch_size=8"),
        ("train=3", r"^train: expected keys and values"),
        ("train.steps.now=3", r"^train\.steps\.now: train\.steps is a single value"),
        ("optimizer.norm_growth=-1", r"^optimizer\.norm_growth=-1: from 0 to less than train\.steps="),
        ("optimizer.norm_growth=nan", r"^optimizer\.norm_growth"),
        ("optimizer.lr=-1", r"^optimizer\.lr=-1\.0 must be positive"),
        ("optimizer.lr=.nan", r"^optimizer\.lr=nan: must be a number"),
        ("optimizer.betas=[0.9]", r"^optimizer\.betas=\[0\.9\]: must be a list of 2"),
        ("optimizer.betas=[0.9, 1.0]", r"must lie in \[0, 1\)"),
        ("model.num_heads=7", r"num_heads=7 does not divide model\.hidden_size=256"),
        ("model.config=x", r"model\.hidden_size is set although model\.config decides it"),
        ("steps", r"an override is written key=value"),
        ("train.steps=[", r"not valid YAML"),
    ],
)
def test_mistakes_are_one_line_with_the_dotted_key(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe("demo", [override])
    assert "\n" not in str(caught.value)


def test_overrides_are_read_as_yaml_and_numbers_in_exponent_form_work() -> None:
    recipe = load_recipe("demo", ["optimizer.lr=1e-3", "train.steps=1e3", "optimizer.clip=null", "poet.mode=mem"])
    assert recipe.optimizer.lr == 1e-3
    assert recipe.train.steps == 1000
    assert isinstance(recipe.train.steps, int)
    assert recipe.optimizer.clip is None
    assert recipe.poet is not None
    assert recipe.poet.config.mode == "mem"


def test_poet_null_is_the_dense_baseline() -> None:
    assert load_recipe("demo", ["poet=null"]).poet is None


def test_a_pretrained_model_must_keep_its_weights() -> None:
    sizes = [f"model.{key}=null" for key in ("hidden_size", "intermediate_size", "num_layers", "num_heads")]
    with pytest.raises(
        UserError, match=r"poet\.init=normalized would destroy.*use poet\.init=keep poet\.residual_scale=1$"
    ):
        load_recipe("demo", [*sizes, "model.pretrained=somewhere"])
    keep = ["poet.init=keep", "poet.residual_scale=1"]
    assert load_recipe("demo", [*sizes, "model.pretrained=somewhere", *keep]).model.pretrained


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"lama-60m: no such recipe; did you mean 'llama-60m'"):
        load_recipe("lama-60m")


def test_broken_yaml_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: [1", encoding="utf-8")
    with pytest.raises(UserError, match=r"r\.yaml: not valid YAML"):
        load_recipe(str(path))


def test_only_cadence_and_places_may_differ_on_resume() -> None:
    old = load_recipe("demo")
    free = ["run_dir=elsewhere", "train.eval_every=7", "train.checkpoint_every=9", "train.device=cpu"]
    assert differing_keys(old, load_recipe("demo", free)) == []
    changed = ["train.steps=7", "poet.block_size=32", "optimizer.lr=0.5"]
    assert set(differing_keys(old, load_recipe("demo", changed))) == {
        "train.steps",
        "poet.block_size",
        "optimizer.lr",
    }
    assert "poet.block_size" in differing_keys(old, load_recipe("demo", ["poet=null"]))


def test_from_dict_is_the_inverse_of_to_dict() -> None:
    recipe = load_recipe("demo", ["poet.target_modules=[q_proj, v_proj]", "optimizer.clip=0"])
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_home_directory_is_meant_by_its_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load_recipe("demo", ["run_dir=~/runs/x"]).directory == Path("/home/somebody/runs/x")
    assert load_recipe("demo", ["run_dir=runs/x"]).directory == Path("runs/x")


@pytest.mark.parametrize(
    ("overrides", "seeds"),
    [([], (0, 0)), (["train.seed=3"], (3, 3)), (["train.seed=3", "poet.seed=4"], (3, 4)), (["poet.seed=4"], (0, 4))],
)
def test_one_seed_is_enough(overrides: list[str], seeds: tuple[int, int]) -> None:
    recipe = load_recipe("demo", overrides)
    assert recipe.poet is not None
    assert (recipe.train.seed, recipe.poet.config.seed) == seeds
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ()),
        (["optimizer.angle=0.02"], ("optimizer.angle",)),
        (["poet.spectrum=free", "poet.partitions=1"], ("poet.partitions", "poet.spectrum")),
        (["poet=null"], ("optimizer.poet_lr",)),
        (["optimizer.name=adafactor", "optimizer.betas=[0.9,0.95]"], ("optimizer.betas",)),
        (["optimizer.momentum=0.9"], ("optimizer.momentum",)),
        (["optimizer.base=sgd", "optimizer.momentum=0.9"], ()),
        (["poet.method=single-step", "poet.merge_every=null"], ("optimizer.poet_lr", "poet.neumann_order")),
        (["optimizer.warmup_steps=900"], ("ends at 33% of its peak",)),
    ],
)
def test_settings_without_effect_are_named(overrides: list[str], words: tuple[str, ...]) -> None:
    said = "; ".join(remarks(load_recipe("demo", overrides)))
    assert bool(said) == bool(words)
    assert all(word in said for word in words)


@pytest.mark.parametrize("name", builtin_recipes())
def test_built_in_recipes_set_nothing_in_vain(name: str) -> None:
    overrides = [] if name.startswith("demo") else ["data.train=text"]
    assert remarks(load_recipe(name, overrides)) == []
