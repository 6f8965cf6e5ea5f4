"""PoetConfig: round trips, and one clear line for every bad value."""

import pytest

from poetx import PoetConfig, UserError


def test_json_round_trip():
    config = PoetConfig(block_size=64, mode="mem", target_modules=["q_proj"], neumann_order="exact", seed=3)
    assert PoetConfig.from_json(config.to_json()) == config
    assert config.target_modules == ("q_proj",)
    assert hash(config) == hash(PoetConfig.from_dict(config.to_dict()))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_size": 0}, "block_size=0: must be"),
        ({"block_size": -4}, "block_size=-4: must be"),
        ({"block_size": 1}, "block_size=1: must be"),
        ({"block_size": 2.0}, "block_size=2.0: must be"),
        ({"block_size": True}, "block_size=True: must be"),
        ({"mode": "memory"}, "mode='memory': must be one of 'fast', 'mem', 'weight'; did you mean 'mem'"),
        ({"neumann_order": 5}, "neumann_order=5: must be one of 3, 7, 'exact'"),
        ({"neumann_order": 3.0}, "neumann_order=3.0: must be"),
        ({"init": "normal"}, "did you mean 'normalized'"),
        ({"init_scale": 2.0}, "init='keep' leaves the weight alone"),
        ({"init": "uniform", "init_scale": 0}, "init_scale=0: must be a positive"),
        ({"residual_scale": 0.25}, "residual_scale=0.25: init='keep' leaves the weight alone"),
        ({"init": "normalized", "residual_scale": -1}, "residual_scale=-1: must be a positive"),
        ({"init": "normalized", "residual_scale": True}, "residual_scale=True: must be a positive"),
        ({"residual_modules": 3}, "residual_modules=3: must be"),
        ({"residual_modules": "(("}, "residual_modules='((': not a regular expression"),
        ({"rotation_dtype": "float16"}, "rotation_dtype='float16': must be one of"),
        ({"seed": "x"}, "seed='x': must be"),
        ({"target_modules": 3}, "target_modules=3: must be"),
        ({"blocksize": 3}, "unknown key 'blocksize'; did you mean 'block_size'"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(UserError, match="(?s)" + __import__("re").escape(message)):
        PoetConfig.from_dict(values)


def test_the_former_name_of_the_extra_bits_is_taken_and_said(tmp_path):
    import dataclasses

    from poetx.recipe import load_recipe

    with pytest.warns(DeprecationWarning, match="weight_extra_bits=True"):
        config = PoetConfig(weight_residual=True)
    assert config == PoetConfig(weight_extra_bits=True) == PoetConfig.from_dict({"weight_residual": True})
    assert "weight_residual" not in config.to_dict()
    assert dataclasses.replace(config, seed=1).weight_extra_bits
    text = load_recipe("demo").to_yaml().replace("weight_extra_bits: null", "weight_residual: true")
    (tmp_path / "old.yaml").write_text(text)
    assert load_recipe(str(tmp_path / "old.yaml")).poet.config.weight_extra_bits


OLD_AND_NEW = [
    ({"spectrum": "fixed", "update": "free"}, "spectrum='fixed' with .*update='free'"),
    ({"spectrum": "free", "update": "rotation"}, "spectrum='free' with .*update='rotation'"),
    ({"weight_residual": True, "weight_extra_bits": False}, "weight_residual=True with .*weight_extra_bits=False"),
]


@pytest.mark.parametrize(("settings", "message"), OLD_AND_NEW)
def test_an_old_and_a_new_name_with_different_values_are_refused(settings, message, tmp_path):
    from poetx.recipe import load_recipe

    method = {"method": "single-step"} if "update" in settings else {}
    for make in (lambda: PoetConfig(**method, **settings), lambda: PoetConfig.from_dict(method | settings)):
        with pytest.raises(UserError, match=f"{message}.*leave .* out"):
            make()
    text = f"model: {{shape: llama-60m}}\ndata: {{train: builtin}}\npoet: {method | settings}\n"
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=f"poet.{message}"):
        load_recipe(str(tmp_path / "mine.yaml"))
    source = "demo-single-step" if method else "demo"
    with pytest.raises(UserError, match="is given as well, the same key by another name"):
        load_recipe(source, [f"poet.{key}={str(value).lower()}" for key, value in settings.items()])
    same = {"spectrum": "fixed", "update": "rotation"} if method else {"weight_residual": 1, "weight_extra_bits": 1}
    load_recipe(source, [f"poet.{key}={'true' if value == 1 else value}" for key, value in same.items()])


@pytest.mark.parametrize(
    ("settings", "update", "words"),
    [
        ({"partitions": 1, "method": "single-step"}, "rotation", "gone, and still means update='rotation'"),
        ({"partitions": 1, "method": "single-step", "update": "free"}, "free", "gone, and has no effect"),
        ({"partitions": 7}, "free", "gone, and has no effect"),
        ({"partition_kind": "random"}, "free", "gone, and has no effect"),
        ({"spectrum": "free", "method": "single-step"}, "free", "is update='free' now"),
    ],
)
def test_settings_that_are_gone_are_said(settings, update, words, recwarn):
    assert PoetConfig(**settings).update == update
    (warning,) = recwarn
    assert warning.category is DeprecationWarning
    assert words in str(warning.message)
    assert warning.filename == __file__
    assert PoetConfig.from_dict(settings).update == update  # what a version before saved
    assert len(recwarn) == 1


@pytest.mark.parametrize("key", ["partitions", "partition_kind"])
def test_settings_that_are_gone_are_refused_where_they_would_do_nothing(key, tmp_path):
    from poetx.recipe import load_recipe

    for source in ("demo", "demo-single-step"):
        with pytest.raises(UserError, match=f"^poet.{key}=7: is gone"):
            load_recipe(source, [f"poet.{key}=7"])
    path = tmp_path / "mine.yaml"
    path.write_text(f"model: {{shape: llama-60m}}\ndata: {{train: builtin}}\npoet: {{{key}: 7}}\n")
    with pytest.raises(UserError, match=f"^poet.{key}=7: has had no effect with method=poet-x and is gone"):
        load_recipe(str(path))
