"""Recipes: strict keys, types, values, overrides, and the published numbers."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from poetx.config import PoetConfig
from poetx.errors import UserError
from poetx.recipe import RECIPE_DIR, Recipe, builtin_recipes, differing_keys, load_recipe, settled_as
from poetx.recipe.sections import PoetXKeys
from poetx.recipe.several import load_methods
from poetx.recipe.shorthands import SIZED_RECIPES

FORMER = json.loads((Path(__file__).parent / "former_recipes.json").read_text())
BIG = sorted(SIZED_RECIPES)


def flat(values: dict, prefix: str = "") -> dict:
    nested = {k: flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v} for k, v in values.items()}
    return {key: value for part in nested.values() for key, value in part.items()}


#: Keys of which a recipe has another value since.
BETTER = {"demo": {"poet.init_scale": 0.5}}


def former(name: str) -> dict:
    """All keys of a built-in recipe as the version wrote them that had a file for every size."""
    return FORMER["llama-60m"] | FORMER[name]


def nested(values: dict) -> dict:
    out: dict = {}
    for key, value in values.items():
        section, _, last = key.rpartition(".")
        (out.setdefault(section, {}) if section else out)[last] = value
    return out


@pytest.mark.parametrize("name", builtin_recipes())
def test_builtin_recipes_load_and_survive_yaml(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["data.train=builtin", *(["model.pretrained=DIR"] if name == "sft" else [])])
    assert recipe.name == name
    path = tmp_path / "copy.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


@pytest.mark.parametrize("name", FORMER)
def test_builtin_recipes_train_what_they_trained_before(name: str) -> None:
    """Every key that is left has the value it had, or one that trains better; every key that is gone had no effect."""
    before, now = former(name) | BETTER.get(name, {}), flat(load_recipe(name, ["data.train=builtin"]).to_dict())
    assert {key: value for key, value in before.items() if key in now and now[key] != value} == {}
    new = {"lora": None, "model.recompute": "auto", "train.autocast": False, "parallel": "ddp"}
    new["train.cuda_graphs"] = False
    new |= {
        "data.text_field": "text",
        "data.format": "auto",
        "optimizer.dense_optimizer": None,
        "poet.weight_extra_bits": None,
        "poet.merge_angle": None,
    }
    new |= {"data.chat_template": None, "data.pack": None, "train.sample_tokens": 48, "train.report_to": None}
    new |= {"model.offload": None, "model.offload_dir": None, "model.residual_scale": 1.0, "poet.overrides": None}
    new |= {"poet.permutation": "random", "optimizer.poet_momentum": 0.95, "optimizer.nesterov": True}
    new |= {"optimizer.poet_eps_mode": "uncorrected" if name in SIZED_RECIPES else "corrected"}
    new["poet.update"] = {"fixed": "rotation"}.get(before["poet.spectrum"], before["poet.spectrum"])
    assert {key: now[key] for key in now.keys() - before.keys()} == {k: new[k] for k in new if k in now}


@pytest.mark.parametrize("name", FORMER)
def test_runs_of_former_versions_are_read_and_may_be_resumed(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(nested(former(name))), encoding="utf-8")
    now = ["optimizer.poet_eps_mode=corrected"] if name in SIZED_RECIPES else []
    now += [f"{key}={former(name)[key]}" for key in BETTER.get(name, ())]
    old = load_recipe(str(run))
    assert differing_keys(old, settled_as(old, load_recipe(name, ["data.train=builtin", *now]))) == {}
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer.base": "sgd"}, "optimizer.base is called optimizer.dense_optimizer now"),
        ({"poet.weight_residual": True}, "poet.weight_residual is called poet.weight_extra_bits now"),
        ({"optimizer.angle": 0.02}, "optimizer.angle=0.02 has had no effect in this run"),
        ({"poet.partitions": 5, "poet.partition_kind": "random"}, ""),  # of no effect in the paper's form
    ],
)
def test_of_a_former_run_what_has_changed_is_said(
    changes: dict, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(nested(former("demo") | changes)), encoding="utf-8")
    recipe = load_recipe(str(tmp_path))
    assert words in caplog.text
    assert bool(words) == bool(caplog.text)
    assert isinstance(recipe.optimizer, PoetXKeys)
    assert recipe.optimizer.dense_optimizer == changes.get("optimizer.base")


def test_the_former_name_of_the_dense_optimizer_beside_the_new_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = "model: {shape: llama-60m}\ndata: {train: builtin}\noptimizer: {base: sgd, dense_optimizer: adamw}\n"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"^optimizer\.base=sgd with optimizer\.dense_optimizer=adamw: .*leave .* out"):
        load_recipe(str(path))
    with pytest.raises(UserError, match=r"^optimizer\.dense_optimizer=adamw: optimizer\.base is given as well"):
        load_recipe("demo", ["optimizer.base=sgd", "optimizer.dense_optimizer=adamw"])


@pytest.mark.parametrize(
    ("written", "of_a_run", "update"),
    [
        ({}, True, "rotation"),  # a run of a version that had nothing else
        ({}, False, "free"),
        ({"partitions": 1}, False, "rotation"),
        ({"spectrum": "fixed"}, False, "rotation"),
        ({"spectrum": "free"}, True, "free"),
        ({"update": "free"}, True, "free"),
    ],
)
def test_single_steps_keep_the_update_they_were_written_with(
    written: dict, of_a_run: bool, update: str, tmp_path: Path
) -> None:
    values = nested(former("demo-single-step"))
    values["poet"] = {"method": "single-step"} | written
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    recipe = load_recipe(str(tmp_path if of_a_run else path))
    assert recipe.poet is not None
    assert recipe.poet.config.update == update
    assert PoetConfig.from_dict({"method": "single-step"} | written).update == (update if written else "free")
    assert load_recipe(str(path), ["poet.update=rotation"]).poet.config.update == "rotation"  # type: ignore[union-attr]


@pytest.mark.parametrize(("key", "value"), [("partitions", 2), ("partition_kind", "random")])
def test_a_former_single_step_run_that_cannot_go_on_says_so(key: str, value: object, tmp_path: Path) -> None:
    values = nested(former("demo-single-step") | {f"poet.{key}": value})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(UserError, match=rf"^poet\.{key}={value}: of a version before.*start anew"):
        load_recipe(str(tmp_path))


@pytest.mark.parametrize("name", BIG)
def test_big_recipes_ask_for_text(name: str) -> None:
    with pytest.raises(UserError, match=r"data\.train is missing.*data\.train=PATH"):
        load_recipe(name)
    assert load_recipe(name, text=False).data.train is None


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


def test_a_shape_is_its_sizes_and_what_it_trains_at_once() -> None:
    named = load_recipe("llama-8b", text=False)
    assert load_recipe("llama", ["model.shape=llama-8b", "name=llama-8b"], text=False) == named
    grouped = load_recipe("llama", ["model.shape=llama-3.1-8b"], text=False)
    assert (grouped.model.num_key_value_heads, grouped.data.vocab_size) == (8, 128256)
    own = load_recipe("llama-8b", ["model.num_layers=2", "poet.mode=fast", "train.batch_size=6"], text=False)
    assert (own.model.num_layers, own.model.hidden_size, own.train.micro_batch) == (2, 4096, 6)
    assert own.poet is not None
    assert own.poet.config.mode == "fast"
    with pytest.raises(UserError, match=r"model\.shape=llama-8: must be one of .*did you mean 'llama-8b'"):
        load_recipe("demo", ["model.shape=llama-8"])


def test_another_source_of_the_model_replaces_the_files() -> None:
    keep = ["poet.init=keep", "poet.init_scale=1", "poet.residual_scale=1"]
    model = load_recipe("demo", ["model.pretrained=somewhere", *keep]).model
    assert (model.hidden_size, model.num_layers) == (None, None)
    assert load_recipe("demo", ["model.shape=llama-60m"]).model.hidden_size == 512
    assert load_recipe("llama", ["model.config=x"], text=False).model.hidden_size is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", r"^train\.stepz: unknown key; did you mean 'steps'\?$"),
        ("trian.steps=3", r"^trian: unknown key; did you mean 'train'\?$"),
        ("poet.blok_size=64", r"^poet\.blok_size: unknown key; did you mean 'block_size'\?$"),
        ("poet.block_size=0", r"^poet\.block_size=0: must be"),
        ("poet.block_size=-4", r"^poet\.block_size=-4: must be"),
        ("poet.block_size=big", r"^poet\.block_size=big: must be a whole number"),
        ("poet.merge_every=0", r"^poet\.merge_every=0: must be positive"),
        ("train.steps=many", r"^train\.steps=many: must be a whole number"),
        ("train.steps=1.5", r"^train\.steps=1\.5: must be a whole number"),
        ("train.steps=true", r"^train\.steps=True: must be a whole number"),
        ("train.steps=0", r"^train\.steps=0: must be positive"),
        ("train.dtype=float16", r"float16 needs loss scaling.*use bfloat16"),
        ("train.dtype=flaot32", r"must be one of .*did you mean 'float32'"),
        ("train.micro_batch_size=7", r"micro_batch_size=7 does not divide train\.batch_size=8"),
        ("train=3", r"^train: expected keys and values"),
        ("train.steps.now=3", r"^train\.steps\.now: train\.steps is a single value"),
        ("steps=3", r"^steps: unknown key; did you mean 'train\.steps'\?$"),
        ("optimizer.steps=3", r"^optimizer\.steps: unknown key; did you mean 'train\.steps'\?$"),
        ("train.lr=3", r"^train\.lr: unknown key; did you mean 'optimizer\.lr'\?$"),
        ("optimizer.betas=0.9,0.95", r"^optimizer\.betas=0\.9,0\.95: must be a list, written \[0\.9,0\.95\]$"),
        ("optimizer.poet_betas=0.9", r"^optimizer\.poet_betas=0\.9: must be a list$"),
        ("optimizer.angle=0.012", r"^optimizer\.angle=0\.012: is for poet\.method=single-step.*; leave it out$"),
        (
            "optimizer.momentum=0.9",
            r"^optimizer\.momentum=0\.9: is SGD's and has no effect with .*=adamw; leave it out",
        ),
        ("poet.spectrum=free", r"^poet\.update=free: is for poet\.method=single-step"),
        ("poet.group_size=64", r"^poet\.group_size=64: is for poet\.weight_format"),
        ("model.recompute=mem", r"^model\.recompute=mem: is for model\.gradient_checkpointing=true"),
        ("optimizer.name=muon", r"^optimizer\.name=muon trains dense matrices; use it with poet=null"),
        ("lora.rank=4", r"^lora and poet are both set"),
        ("train.dtype=2024-01-01", r"^train\.dtype=2024-01-01: must be one of"),
        ("data.train=2024-01-01", r"^data\.train=2024-01-01: must be text; .* write data\.train=\./2024-01-01$"),
        ("name=2024-13-45", r"^name=2024-13-45: the value is not valid YAML: month"),
        ("train.steps=" + "9" * 5000, r"^train\.steps=9{60,70}\.\.\.: the value is not valid YAML: Exceeds"),
        ("train.steps=" + "9" * 4000, r"^train\.steps=9{60,80}\.\.\.: must be below 2\*\*63$"),
        ("optimizer.lr=1" + "0" * 400, r"^optimizer\.lr=10{60,80}\.\.\.: must be a number$"),
        ("run_dir=~no-such-user/x", r"^run_dir=~no-such-user/x: there is no such user; write \./~no-such-user/x"),
        ("data.train=~no-such-user", r"^data\.train=~no-such-user: there is no such user"),
        ("data.train=" + "[" * 3000, r"not valid YAML"),
        ("optimizer.lr=-1", r"^optimizer\.lr=-1: must be positive"),
        ("optimizer.lr=.nan", r"^optimizer\.lr=nan: must be a number"),
        ("optimizer.betas=[0.9]", r"^optimizer\.betas=\[0\.9\]: must be a list of 2"),
        ("optimizer.betas=[0.9, 1.0]", r"must lie in \[0, 1\)"),
        ("model.num_heads=7", r"num_heads=7 does not divide model\.hidden_size=256"),
        ("steps", r"an override is written key=value"),
        ("train.seed=one", r"^train\.seed=one: must be a whole number$"),
        ("model.config=", r"^model\.config=: .*model\.config has no value; write null to mean none$"),
        ("poet= ", r"poet has no value; write null to mean none$"),
        ("optimizer.clip=None", r"optimizer\.clip has the value None; write null to mean none$"),
        ("data.validation={a: }", r"a has no value; write null"),
        ("data.validation=hf://a/b.txt", r"^data\.validation=hf://a/b\.txt: is an address; download it first"),
        ("data.train=[a.txt, gs://a/b]", r"^data\.train=gs://a/b: is an address"),
        ("train.steps=[", r"not valid YAML"),
    ],
)
def test_mistakes_are_one_line_with_the_dotted_key(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe("demo", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=muon", "poet.mode=mem"], r"^poet\.mode=mem: method=muon means another poet; give one of the two$"),
        (["optimizer.name=smmf", "method=hfac"], r"^optimizer\.name=smmf: method=hfac means another optimizer\.name"),
        (["method=nf4", "poet.weight_format=fp8"], r"^poet\.weight_format=fp8: method=nf4 means another"),
        (["method=fast", "poet={seed: 2, mode: mem}"], r"^poet\.mode=mem: method=fast means another poet\.mode"),
        (["method=fast", "poet=null"], r"^poet=None: method=fast means another"),
        (["poet={}", "poet.seed=3"], r"^poet and poet\.seed are both given"),
        (["method=[mem]"], r"^method=\['mem'\]: no such method"),
        (
            ["data.tokenizer=x", "data.vocab_size=500"],
            r"^data\.vocab_size=500: has no effect with the tokenizer",
        ),
        (["data.validation=x", "data.validation_fraction=0.1"], r"^data\.validation_fraction=0\.1: has no effect with"),
        (["optimizer.clip=off", "optimizer.clip_ramp_start=0.5"], r"^optimizer\.clip_ramp_start=0\.5: has no effect"),
        (["poet.merge_every=null", "optimizer.clip_ramp_until=9"], r"^optimizer\.clip_ramp_until=9: has no effect"),
        (["poet.merge_angle=1.2"], r"^poet\.merge_angle=1\.2: the series that trains rotations ends below 1"),
        (["poet.merge_every=1", "poet.merge_angle=0.2"], r"^poet\.merge_angle=0\.2: has no effect without .* above 1"),
        (["method=sgd", "train.spectrum_every=5"], r"^train\.spectrum_every=5: has no effect where no layer"),
        (
            ["optimizer.dense_optimizer=smmf", "optimizer.eps=1e-7"],
            r"^optimizer\.eps=1e-7: .* optimizer\.poet_eps\)",
        ),
        (["method=lora", "poet.block_size=16"], r"^poet\.block_size=16: method=lora means another poet; give one"),
        (["method=oft", "poet.merge_every=100"], r"^poet\.merge_every=100: is for poet\.method=poet-x and has no ef"),
        (["method=oft", "poet.mode=fast"], r"^poet\.mode=fast: is for poet\.method=poet-x or single-step and has no"),
        (["method=oft", "optimizer.poet_lr=1e-3"], r"^optimizer\.poet_lr=1e-3: is for poet\.method=poet-x and has"),
        (["method=oft", "optimizer.weight_decay=0.1"], r"^optimizer\.weight_decay=0\.1: has no effect on rotations"),
        (["method=oft", "optimizer.name=galore"], r"^optimizer\.name=galore trains dense matrices"),
        (["method=adamw", "optimizer.rank=8"], r"^optimizer\.rank=8: is for galore, fira, apollo and has no effect"),
        (["method=apollo-mini", "optimizer.rank=8"], r"^optimizer\.rank=8: is for galore, fira, apollo and has no ef"),
        (["method=lomo", "optimizer.clip=1"], r"^optimizer\.clip=1: method=lomo means another optimizer\.clip"),
        (["method=lomo", "optimizer.momentum=0.9"], r"^optimizer\.momentum=0\.9: method=lomo means another"),
        (["method=poet", "poet.mode=mem"], r"^poet\.mode=mem: method=poet means another poet\.mode"),
        (["method=poet", "poet.weight_format=int8"], r"^poet\.weight_format=int8: method=poet means another"),
        (["poet.mode=weight", "poet.method=single-step"], r"^poet\.mode='weight' with method='single-step'"),
        (["method=single-step-fixed", "poet.update=free"], r"^poet\.update=free: method=single-step-fixed means"),
        (["method=muon", "optimizer.release_gradients=true"], r"^optimizer\.release_gradients with optimizer\.clip=1"),
        (["poet.overrides={mlp: {update: free}}"], r"^poet\.overrides\['mlp'\]: update has no effect with method='po"),
        (["poet.overrides={mlp: {blocksize: 8}}"], r"^poet\.overrides\['mlp'\]: blocksize: unknown setting; did you"),
        (["poet.overrides=[mlp]"], r"^poet\.overrides=\['mlp'\]: must be \{PATTERN: \{SETTING: VALUE\}\}"),
    ],
)
def test_overrides_that_undo_each_other_or_have_no_effect_are_refused(overrides: list[str], message: str) -> None:
    for order in (overrides, overrides[::-1]):
        with pytest.raises(UserError, match=message):
            load_recipe("demo", order)


def test_a_section_that_is_null_after_its_keys_counts_and_before_them_is_refused() -> None:
    assert load_recipe("demo", ["poet.seed=3", "poet.mode=fast", "poet=null"]).poet is None
    with pytest.raises(UserError, match=r"^poet and poet\.seed are both given"):
        load_recipe("demo", ["poet=null", "poet.seed=3"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=lora", "optimizer.name=hfac"],
        ["method=lora", "lora={rank: 4}"],
        ["method=oft", "poet.weight_format=nf4", "poet.group_size=64"],
        ["method=lomo", "optimizer.clip=null"],
        ["method=single-step", 'poet.overrides={"*mlp*": {block_size: 32}}'],
        ["method=sgd", "poet=null", "train.spectrum_every=null"],
        ["method=adamw", "optimizer.state_dtype=int8"],
        ["train.seed=3", "train.seed=4"],
        ["optimizer.clip=null", "optimizer.clip_ramp_until=0"],
    ],
)
def test_overrides_that_go_together_are_taken(overrides: list[str]) -> None:
    assert load_recipe("demo", overrides)


def test_a_methods_file_has_no_other_method_in_its_sections(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    demo = load_recipe("demo")
    path.write_text(demo.to_yaml() + "method: adafactor\n")
    with pytest.raises(UserError, match="method=adafactor means another poet"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 3}\nmodel: {}\ntrain: {seed: 1}", "train is there twice"),
        ("model: {num_layers: 2, hidden_size: 8, num_layers: 3}", "num_layers is there twice"),
        ("poet:\n  seed: 1\n  'seed': 2", "seed is there twice"),
        ("model: &a {num_layers: 2}\ntrain: {<<: *a, steps: 1, steps: 2}", "steps is there twice"),
    ],
)
def test_a_key_twice_in_a_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"twice.yaml: not valid YAML: {message}"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("written", "steps"), [("020", 20), ("09", 9), ("+7", 7), ("0x1f", 31), ("1_000", 1000), ("2:40", None)]
)
def test_numbers_are_those_that_people_mean(written: str, steps: int | None) -> None:
    if steps is None:
        with pytest.raises(UserError, match=r"^train\.steps=2:40: must be a whole number"):
            load_recipe("demo", [f"train.steps={written}"])
        with pytest.raises(UserError, match=r"^optimizer\.lr=2:40\.5: must be a number"):
            load_recipe("demo", [f"optimizer.lr={written}.5"])
    else:
        assert load_recipe("demo", [f"train.steps={written}"]).train.steps == steps


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
        UserError,
        match=r"poet\.init=normalized would destroy.*use poet\.init=keep poet\.init_scale=1 poet\.residual_scale=1$",
    ):
        load_recipe("demo", [*sizes, "model.pretrained=somewhere"])
    keep = ["poet.init=keep", "poet.init_scale=1", "poet.residual_scale=1"]
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
    assert differing_keys(old, load_recipe("demo", free)) == {}
    changed = ["train.steps=7", "poet.block_size=32", "optimizer.lr=0.5"]
    assert set(differing_keys(old, load_recipe("demo", changed))) == {
        "train.steps",
        "poet.block_size",
        "optimizer.lr",
    }
    assert "poet.block_size" in differing_keys(old, load_recipe("demo", ["poet=null"]))


@pytest.mark.parametrize("written", [None, False, True, "left out"])
def test_a_run_keeps_its_extra_bits_whatever_the_default_is_now(written: bool | str | None, tmp_path: Path) -> None:
    """Also one of a version that did not know them: it had none."""
    overrides = ["data.train=builtin", "poet.init=keep", "poet.init_scale=1", "poet.residual_scale=1"]
    now = load_recipe("demo", overrides)
    values = now.to_dict()
    values["poet"]["weight_extra_bits"] = written
    if written == "left out":
        del values["poet"]["weight_extra_bits"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    old = load_recipe(str(tmp_path))
    assert now.poet.config.keeps_extra_bits
    assert old.poet.config.weight_extra_bits is (False if written == "left out" else written)
    assert differing_keys(old, settled_as(old, now)) == {}
    other = load_recipe(
        "demo", [*overrides, f"poet.weight_extra_bits={str(not old.poet.config.keeps_extra_bits).lower()}"]
    )
    assert set(differing_keys(old, settled_as(old, other))) == {"poet.weight_extra_bits"}
    with pytest.raises(UserError, match=r"poet\.weight_extra_bits.*must be true or false"):
        load_recipe("demo", ["poet.weight_extra_bits=8"])


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
    ("overrides", "key"),
    [
        (["poet=null", "optimizer.poet_lr=1"], "optimizer.poet_lr"),
        (["optimizer.name=adafactor", "optimizer.betas=[0.9,0.95]"], "optimizer.betas"),
        (["optimizer.name=sgd", "optimizer.poet_betas=[0.9,0.95]"], "optimizer.poet_betas"),
        (["poet.method=single-step", "optimizer.poet_lr=1"], "optimizer.poet_lr"),
        (["poet.method=single-step", "poet.neumann_order=7"], "poet.neumann_order"),
        (["poet.method=single-step", "poet.merge_every=5"], "poet.merge_every"),
        (["poet.method=single-step", "optimizer.dense_optimizer=sgd"], "optimizer.dense_optimizer"),
        (["poet=null", "optimizer.dense_optimizer=sgd"], "optimizer.dense_optimizer"),
        (["method=muon", "optimizer.momentum=0.9"], "optimizer.momentum"),
    ],
)
def test_a_key_without_effect_cannot_be_written(overrides: list[str], key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}=.* has no effect with .*; leave it out$"):
        load_recipe("demo", overrides)


def test_a_file_cannot_either(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = (RECIPE_DIR / "demo.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace("optimizer:\n", "optimizer:\n  angle: 0.02\n"), encoding="utf-8")
    with pytest.raises(UserError, match=r"^optimizer\.angle=0\.02: is for poet\.method=single-step"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    "overrides",
    [
        ["poet=null"],
        ["poet.method=single-step"],
        ["optimizer.name=sgd", "optimizer.momentum=0.9"],
        ["optimizer.dense_optimizer=sgd", "optimizer.momentum=0.9"],
        ["poet.method=single-step", "poet.merge_every=null"],
        ["poet.mode=mem", "poet.weight_format=int8", "poet.group_size=64"],
    ],
)
def test_what_the_file_sets_for_another_choice_goes_with_it(overrides: list[str]) -> None:
    recipe = load_recipe("demo", overrides)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("source", "override", "key", "value"),
    [
        ("demo-single-step", "poet.spectrum=fixed", "update", "rotation"),
        ("demo-single-step", "poet.spectrum=free", "update", "free"),
        ("demo", "poet.weight_residual=true", "weight_extra_bits", True),
    ],
)
def test_an_override_by_a_former_name_goes_before_the_file(source: str, override: str, key: str, value: object) -> None:
    poet = load_recipe(source, [override]).poet
    assert poet is not None
    assert poet.model_dump()[key] == value


def test_a_method_may_stand_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: adamw-8bit\nmodel: {shape: llama-60m}\ndata: {train: builtin}\n", encoding="utf-8")
    recipe = load_recipe(str(path))
    assert recipe.poet is None
    assert recipe == load_recipe(str(path), ["method=adamw-8bit"])


def test_with_keys_checks_what_it_changes() -> None:
    recipe = load_recipe("demo")
    assert recipe.with_keys({"train.dtype": "bfloat16"}).train.dtype == "bfloat16"
    with pytest.raises(UserError, match=r"train\.dtype=int3: must be one of"):
        recipe.with_keys({"train.dtype": "int3"})
    with pytest.raises(ValidationError, match="frozen"):
        recipe.name = "other"


@pytest.mark.parametrize("text", ["runs/exp #2", "#3", "a: b", "x ", "folded\nline", "[1", "~root", "'"])
def test_a_place_is_taken_as_it_is_written(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML would read a comment, a mapping or null there, and train in another run's directory."""
    monkeypatch.chdir(tmp_path)
    try:
        recipe = load_recipe("demo", [f"run_dir={text}"])
    except UserError as error:
        assert "run_dir" in str(error)
    else:
        assert str(recipe.run_dir) in (text, os.path.expanduser(text))  # noqa: PTH111
    assert load_recipe("demo", ["run_dir='runs/exp'"]).run_dir == "runs/exp"
    assert load_recipe("demo", ["data.train=t #1.txt"]).data.train == str(tmp_path / "t #1.txt")
    assert load_recipe("demo", ["data.validation=null"]).data.validation is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("poet:\n  # block_size: 8\n", "poet has no value; write null to mean none"),
        ("poet: {merge_every: None}", "merge_every has the value None; write null to mean none"),
        ("poet.block_size: 8", "poet.block_size: is written in two lines in a file, poet: and below it block_size: …"),
    ],
)
def test_what_a_file_leaves_open_is_not_guessed(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((RECIPE_DIR / "demo.yaml").read_text().replace("\npoet:", "\npoet_:") + "\n" + text)
    path.write_text(re.sub(r"(?m)^poet_:\n(?:  .*\n)*", "", path.read_text()))
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    assert message in str(caught.value)
    path.write_text(path.read_text().replace(text, "poet: {}  # None\n"))
    assert load_recipe(str(path)).poet is not None


@pytest.mark.parametrize("damage", [None, "", "{"])
def test_a_run_whose_recipe_is_gone_has_it_in_its_checkpoints(damage: str | None, tmp_path: Path) -> None:
    for step in ("step-00000002", "step-00000010"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
        (tmp_path / "checkpoints" / step / "recipe.yaml").write_text(load_recipe("demo").to_yaml())
    if damage is not None:
        (tmp_path / "recipe.yaml").write_text(damage)
    with pytest.raises(UserError) as caught:
        load_recipe(str(tmp_path))
    assert f"cp {tmp_path}/checkpoints/step-00000010/recipe.yaml {tmp_path}" in str(caught.value)


@pytest.mark.parametrize(
    ("method", "matrices", "rest", "scale"),
    [
        ("adamw", 1.5e-3, 1.2e-2, 0.25),
        ("muon", 3e-3, 1.2e-2, 0.25),
        ("scale", None, 1.2e-2, 0.25),
        ("lora", None, 3e-3, 1),
        ("oft", None, 2e-3, 1),
        ("single-step", None, 1.2e-2, 1),
    ],
)
def test_a_method_in_place_of_rotations_does_not_train_by_their_rates(method, matrices, rest, scale, caplog):
    recipes = [load_recipe("demo", [f"method={method}"]), load_methods("demo", [], [method])[method]]
    for recipe in recipes:
        assert getattr(recipe.optimizer, "matrix_lr", None) == matrices
        assert (recipe.optimizer.lr, recipe.model.residual_scale) == (rest, scale)
    assert ("the recipe's own values are for rotations" in caplog.text) is (method != "single-step")
    given = load_recipe("demo", [f"method={method}", "optimizer.lr=0.01"])
    assert given.optimizer.lr == 0.01
    assert getattr(given.optimizer, "matrix_lr", None) is None


def test_a_rate_below_the_usual_one_is_every_parameters():
    assert load_recipe("llama-60m", ["method=adamw"], text=False).optimizer.matrix_lr is None


def test_a_number_in_quotes_is_told_to_lose_them():
    with pytest.raises(UserError, match=r"must be one of 3, 7, exact; write it without the quotes"):
        load_recipe("demo", ["poet.neumann_order='7'"])


def test_a_key_given_twice_is_said(caplog):
    recipe = load_recipe("demo", ["train.steps=5", "train.seed=3", "train.steps=7", "train.seed=3"])
    assert recipe.train.steps == 7
    assert caplog.messages == ["train.steps is given twice, as 5 and 7; the last counts"]


def test_a_recipe_that_is_a_file_without_its_ending_or_a_model_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("data: {train: builtin}")
    with pytest.raises(UserError, match=r"^mine: no such recipe; did you mean mine\.yaml\?"):
        load_recipe("mine")
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a model: train it by poetx train sft model\.pretrained=base$"):
        load_recipe("base")
