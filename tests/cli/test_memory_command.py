"""The command as a user types it."""

import json

import pytest
import typer
from typer.testing import CliRunner

from poetx import UserError
from poetx.cli.memory import bar, register

runner = CliRunner()


@pytest.fixture
def app():
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return app


SIZES = ["model.hidden_size=64", "model.intermediate_size=128", "model.num_layers=1", "model.num_heads=2"]
TINY = ["memory", "demo", *SIZES, "data.vocab_size=300", "data.seq_len=64", "poet.block_size=32"]


def test_table_bar_and_batch(app):
    table = runner.invoke(app, [*TINY, "train.batch_size=4", "--methods", "adamw,int8"])
    assert table.exit_code == 0, table.exception
    for word in ("adamw", "int8", "activations", "of rotations", "peak", "█", "4 x 64 tokens a pass"):
        assert word in table.stdout
    card = runner.invoke(app, [*TINY[:-1], "--methods", "adamw", "--gpu", "0.005"])
    assert "adamw on 0.005 GB: fits, up to batch" in card.stdout


def test_one_of_several_processes_takes_its_part_of_the_batch_and_perhaps_of_the_model(app):
    batch = ["method=mem", "train.batch_size=8", "train.micro_batch_size=4", "--json"]
    sharded = ["parallel=fsdp", "train.sample_tokens=0", "--gpus", "4"]
    alone, whole, parted = (
        json.loads(runner.invoke(app, [*TINY, *words]).stdout)["estimates"]["demo"]["categories"]
        for words in (["method=mem", "train.batch_size=2", "--json"], [*batch, "--gpus", "4"], [*batch, *sharded])
    )
    assert whole["activations"] == alone["activations"]
    assert whole["optimizer"] == alone["optimizer"] > 2.5 * parted["optimizer"]
    assert parted["gathered"] > whole["gathered"] == 0
    assert "over 3 processes; use a multiple of 3" in str(runner.invoke(app, [*TINY, *batch, "--gpus", "3"]).exception)
    table = runner.invoke(app, [*TINY, "train.batch_size=4", *sharded])
    assert "one of 4 processes, parallel=fsdp, 1 x 64 tokens a pass" in table.stdout
    assert "gathered" in table.stdout


def test_json_and_plot(app, tmp_path):
    words = [*TINY, "method=mem", "optimizer.state_dtype=int8", "--json", "--plot", str(tmp_path / "deep" / "a.png")]
    document = json.loads(runner.invoke(app, words).stdout)
    estimate = document["estimates"]["demo"]
    assert estimate["peak"] == sum(estimate["categories"].values())
    assert estimate["recipe"]["optimizer"]["state_dtype"] == "int8"
    assert estimate["recipe"]["train"]["dtype"] == "bfloat16"
    assert (tmp_path / "deep" / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_in_a_comparison_a_setting_reaches_the_methods_that_have_it(app):
    words = [*TINY, "optimizer.state_dtype=same", "--methods", "adamw,mem,muon", "--device", "cpu", "--json"]
    estimates = json.loads(runner.invoke(app, words).stdout)["estimates"]
    assert estimates["adamw"]["recipe"]["optimizer"]["state_dtype"] == "same"
    assert estimates["adamw"]["recipe"]["poet"] is None
    assert estimates["mem"]["recipe"]["poet"]["block_size"] == 32


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--methods", "adam"], "method=adam: no such method"),
        (["--methods", "adamw,adamww"], "did you mean 'adamw'"),
        (["--methods", " , "], "--methods= , : must be different names"),
        (["--methods", "mem,mem"], "--methods=mem,mem: must be different names"),
        (["--gpu", "-3"], "gpu=-3.0"),
        (["--gpu", "inf"], "gpu=inf: must be a positive, finite number"),
        (["--gpu", "1.7e308"], "gpu=1.7e+308: must be a positive, finite number"),
        (["--device", "tpu"], "device=tpu"),
        (["--plot", "a.gif"], "must end in .png"),
        (["nowhere"], "nowhere: no such recipe"),
        (["demo", "model.config=nowhere"], "model.config=/"),
        (["demo", "poet.weight_format=int9"], "int8"),
        (["--batch-size", "8"], "--batch-size: no such option; settings of the recipe are KEY=VALUE"),
        (["demo", "--metods", "mem"], "--metods: no such option"),
        (["demo", "method=mem", "--methods", "fast"], "--methods and method= are both given"),
    ],
)
def test_mistakes_are_one_line(app, args, words):
    result = runner.invoke(app, ["memory", *args])
    assert isinstance(result.exception, UserError)
    assert words in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_setting_is_taken_where_one_method_has_it_and_said_for_the_others(app, caplog):
    words = [*TINY, "poet.group_size=16", "optimizer.angle=0.02", "--methods", "adamw,int8,single-step", "--json"]
    estimates = json.loads(runner.invoke(app, words).stdout)["estimates"]
    assert estimates["int8"]["recipe"]["poet"]["group_size"] == 16
    assert estimates["single-step"]["recipe"]["optimizer"]["angle"] == 0.02
    assert "poet.group_size=16: has no effect with adamw, single-step" in caplog.text
    assert "optimizer.angle=0.02: has no effect with adamw, int8" in caplog.text


def test_bar_is_as_long_as_its_sum():
    assert bar({"frozen": 10, "trainable": 1, "gradient": 1, "optimizer": 0}, 1 / 3).count("█") == 4


def test_a_table_of_ways_is_whole_on_a_narrow_terminal(app, monkeypatch):
    monkeypatch.setattr("poetx.planner.reach.ways", lambda recipe, device: [])
    told = runner.invoke(app, [*TINY, "--gpu", "1", "--host", "1"], env={"COLUMNS": "40"}).stdout
    assert "none fits" in told
    assert "4090 tokens/s" in told
    assert "…" not in told


def test_ways_to_keep_the_frozen_weights_on_a_card_and_a_host(app):
    sizes = [*TINY, "data.seq_len=32", "train.batch_size=2", "train.micro_batch_size=2"]
    words = [*sizes, "--gpu", "0.005", "--host", "1", "--device", "cpu"]
    found = json.loads(runner.invoke(app, [*words, "--json"]).stdout)["ways"]
    kinds = ("float32", "int8", "int4")
    assert [way["name"] for way in found] == [
        f"{kind}, {where}" for where in ("resident", "streamed", "from files") for kind in kinds
    ]
    weights = 4 * (4 * 64 * 64 + 3 * 64 * 128)
    assert len({way["estimate"]["parameters"] for way in found}) == 1  # packed ones count, too
    resident, streamed, filed = found[:3], found[3:6], found[6:]
    for here, there in zip(streamed, filed, strict=True):
        assert there["estimate"]["file"] == here["estimate"]["host"]
        assert here["tokens_per_second"]["h100"] > there["tokens_per_second"]["h100"] > 0
        assert there["keys"] == here["keys"] | {"model.offload_dir": "DIR"}
    assert [way["estimate"]["host"] for way in resident] == [0, 0, 0]
    assert streamed[0]["estimate"]["host"] == weights
    assert weights / 4 < streamed[1]["estimate"]["host"] < weights / 3  # codes, scales and zeros
    assert streamed[2]["estimate"]["host"] < streamed[1]["estimate"]["host"]
    for here, there in zip(resident, streamed, strict=True):
        assert there["estimate"]["peak"] <= here["estimate"]["peak"]
        assert there["estimate"]["moved"] == there["estimate"]["host"]  # one layer: all stay until its backward
        assert set(here["enough_tokens"].values()) == {0}
        assert there["enough_tokens"]["4090"] > there["enough_tokens"]["h100"] / 10 > 0
        assert here["fits"] == (here["estimate"]["peak"] <= 0.005 * 2**30)
    single = runner.invoke(app, [*words, "method=single-step", "--link", "1e-3,1", "--json"]).stdout
    ways = json.loads(single)["ways"]
    assert [way["name"] for way in ways] == ["float32, resident", "float32, streamed"]
    assert ways[1]["estimate"]["stepped"] == 2 * weights  # each comes and goes
    seconds = (ways[1]["estimate"]["moved"] + weights) / 1e6  # by the link that is given, which is slower than products
    assert ways[1]["tokens_per_second"]["here"] == round(64 / seconds)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "8"], "goes with --gpu"),
        (["--host", "8", "--gpu", "1", "--methods", "mem"], "without --methods"),
        (["--host", "nan", "--gpu", "1"], "host=nan: must be a positive"),
        (["--host", "8", "--gpu", "1", "method=adamw"], "weights of method=poet-x and single-step can be"),
        (["--host", "8", "--gpu", "1", "--link", "fast"], "link=fast: must be GB/s and TFLOP/s"),
        (["--link", "50,400"], "--link: goes with --host"),
    ],
)
def test_a_host_that_says_nothing_is_refused(app, words, message):
    tiny = [word for word in TINY if "block_size" not in word or "method=adamw" not in words]
    error = runner.invoke(app, [*tiny, *words]).exception
    assert isinstance(error, UserError)
    assert message in str(error)
