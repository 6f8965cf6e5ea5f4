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


@pytest.fixture
def config(tmp_path):
    values = {"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128}
    values |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return str(tmp_path)


def test_table_bar_and_batch(app, config):
    shared = ["memory", "--model", config, "--seq-len", "64"]
    table = runner.invoke(app, [*shared, "--compare", "adamw,mem,int8", "--block-size", "64"])
    assert table.exit_code == 0, table.exception
    for word in ("adamw", "mem", "int8", "activations", "of rotations", "peak", "█"):
        assert word in table.stdout
    assert "held by the allocator" not in table.stdout
    card = runner.invoke(app, [*shared, "--mode", "adamw", "--gpu", "0.01", "--reserved"])
    assert "held by the allocator" in card.stdout
    assert "adamw on 0.01 GB: fits, up to batch" in card.stdout


def test_json_and_plot(app, config, tmp_path):
    args = ["memory", "--model", config, "--mode", "mem", "--block-size", "32", "--stack", "--json"]
    result = runner.invoke(app, [*args, "--plot", str(tmp_path / "deep" / "a.png")])
    document = json.loads(result.stdout)
    (estimate,) = document["estimates"]
    assert estimate["peak"] == sum(estimate["categories"].values())
    assert estimate["setup"]["optimizer_state"] == "int8"
    assert (tmp_path / "deep" / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--mode", "adam"], "method='adam'"),
        (["--compare", "adamw,adamww"], "did you mean 'adamw'"),
        (["--model", "nowhere"], "nowhere: no such shape"),
        (["--gpu", "-3"], "gpu=-3.0"),
        (["--gpu", "inf"], "gpu=inf: must be a positive, finite number"),
        (["--mode", "fast", "--weight-format", "int8"], "weight_format=int8: is for method='mem'"),
        (["--mode", "adamw", "--weight-residual"], "weight_extra_bits: is for method='mem' or 'fast'"),
        (["--weight-format", "int9"], "did you mean 'int8'"),
        (["--compare", " , "], "names no mode"),
        (["--mode", "int8", "--weight-format", "int4"], "weight_format=int4: mode=int8"),
        (["--plot", "a.gif"], "must end in .png"),
        (["--mode", "muon", "--optimizer-state", "int8"], "optimizer_state=int8"),
    ],
)
def test_mistakes_are_one_line(app, args, words):
    result = runner.invoke(app, ["memory", *args])
    assert isinstance(result.exception, UserError)
    assert words in str(result.exception)
    assert "\n" not in str(result.exception)


def test_bar_is_as_long_as_its_sum():
    assert bar({"frozen": 10, "trainable": 1, "gradient": 1, "optimizer": 0}, 1 / 3).count("█") == 4
