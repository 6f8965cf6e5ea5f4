"""The report page: whole, self-contained, and honest about what is missing."""

import json
import re

import pytest

from poetx import UserError
from poetx.runs import report
from poetx.runs.report import write_report
from poetx.train.metrics import read_metrics


def run_directory(path, *, steps=30, spectrum=True, broken=False):
    lines = [{"event": "validation", "step": 0, "loss": 7.0, "perplexity": 1096.63}]
    for step in range(1, steps + 1):
        bad = broken and step == 7
        entry = {
            "event": "train",
            "step": step,
            "loss": None if bad else 7 - step / 10,
            "grad_norm": None if bad else 1.0,
            "clip": 1.0,
            "lr_rotations": 1e-3,
            "lr_decay": 2e-3,
            "merged": step % 10 == 0,
            "skipped": bad,
            "tokens_per_second": 1234.0,
            "seconds": step / 2,
            "peak_memory_gib": 0.5,
        }
        if entry["merged"]:
            entry |= {"merge_angle": 0.123, "norm_drift": 1e-7}
        lines.append(entry)
    if spectrum:
        layer = {"norm_ratio": 1.0000002, "drift_median": 3.25e-6, "drift_max": 1e-4, "entropy": 0.9}
        lines.append({"event": "spectrum", "step": steps, "layers": {"model.<q_proj>": layer}})
    lines.append({"event": "validation", "step": steps, "loss": 4.0, "perplexity": 54.6})
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "conversion.txt").write_text("converted 2 layers <b>")
    return path


def test_page_tells_what_the_run_did_and_loads_nothing(tmp_path):
    page = write_report(run_directory(tmp_path / "run"), tmp_path / "out" / "page.html").read_text()
    for fact in ("1,096.63 at the start, 54.60 at the end", "largest angle folded 0.123", "3.2e-06", "1,234 tokens/s"):
        assert fact in page
    assert page.count("<svg") == 9
    assert "model.&lt;q_proj&gt;" in page
    assert "converted 2 layers &lt;b&gt;" in page
    assert "<script" not in page
    links = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page)
    assert all(link.startswith("#") for link in links)


def test_page_of_a_young_or_wounded_run(tmp_path):
    page = write_report(run_directory(tmp_path / "run", steps=8, spectrum=False, broken=True), tmp_path / "p.html")
    text = page.read_text()
    assert text.count("<svg") == 5
    assert "<td>skipped steps</td><td>1</td>" in text


def test_not_a_run(tmp_path):
    with pytest.raises(UserError, match="is it a run directory"):
        write_report(tmp_path, tmp_path / "page.html")


@pytest.mark.parametrize("content", [b"null", b"[1]", b"{}", b"[" * 100_000, b"\xff", b'{"device": 1, "versions": 3}'])
def test_a_damaged_environment_is_said_in_the_summary(tmp_path, content):
    run = run_directory(tmp_path / "run")
    (run / "environment.json").write_bytes(content)
    train = [entry for entry in read_metrics(run / "metrics.jsonl") if entry["event"] == "train"]
    assert "<td>device</td><td>unknown: " in report._summary(run, train, [], [])


def test_damaged_lines_and_texts_do_not_spoil_the_page(tmp_path):
    run = run_directory(tmp_path / "run", steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 3, "loss": "3.5"}\n{"event": "spectrum", "step": 5, "layers": {}}\n')
    for name in ("recipe.yaml", "conversion.txt"):
        (run / name).write_bytes(b"caf\xe9 <\xff")
    page = write_report(run, tmp_path / "page.html").read_text()
    assert page.count("caf\ufffd &lt;\ufffd") == 2
    assert "<td>steps</td><td>3</td>" in page
    assert "<td>left out</td><td>2 damaged lines of metrics.jsonl</td>" in page
