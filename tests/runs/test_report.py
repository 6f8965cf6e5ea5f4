"""The report page: whole, self-contained, and honest about what is missing."""

import json
import re
import shutil
import subprocess

import pytest

from poetx import UserError
from poetx.runs.report import write_report


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


def numbers(page):
    return json.loads(re.search(r'id="numbers">(.*?)</script>', page)[1])


def test_page_tells_what_the_run_did_and_loads_nothing(tmp_path):
    page = write_report(run_directory(tmp_path / "run"), tmp_path / "out" / "page.html").read_text()
    for fact in ("1,096.63 at the start, 54.60 at the end", "largest angle folded 0.123", "3.2e-06", "1,234 tokens/s"):
        assert fact in page
    charts = {chart["title"]: chart["series"] for chart in numbers(page)["charts"]}
    assert len(charts) == 9
    training, validation = charts["Loss, nats a token"]
    assert training["points"][-1] == [30, 15.0, 4.0]
    assert [point[2] for point in validation["points"]] == [7.0, 4.0]
    assert "model.&lt;q_proj&gt;" in page
    assert "converted 2 layers &lt;b&gt;" in page
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)|(?:src|href|url|import)\s*[=(]", page)


def test_page_of_a_young_or_wounded_run(tmp_path):
    page = write_report(run_directory(tmp_path / "run", steps=8, spectrum=False, broken=True), tmp_path / "p.html")
    text = page.read_text()
    assert len(numbers(text)["charts"]) == 5
    assert "<td>skipped steps</td><td>1</td>" in text


def test_several_runs_are_compared_with_the_baseline(tmp_path):
    first, second = run_directory(tmp_path / "a"), run_directory(tmp_path / "b", steps=20)
    with (second / "metrics.jsonl").open("a") as file:
        for step in (21, 22):  # another process, whose clock begins anew
            line = {
                "event": "train",
                "step": step,
                "loss": 3.0,
                "merged": False,
                "skipped": False,
                "seconds": step - 20.5,
            }
            file.write(json.dumps(line | {"tokens_per_second": 2468.0, "peak_memory_gib": 1.0}) + "\n")
        texts = [{"prompt": "</script>", "text": "<b>"}]
        file.write(json.dumps({"event": "sample", "step": 22, "samples": texts}) + "\n")
        file.write(json.dumps({"event": "audit", "step": 22, "tokens": 22 * 64}) + "\n")
    page = write_report([second, first], tmp_path / "page.html", baseline=first).read_text()
    assert "<th>a</th><th>b</th>" in page
    assert "<td>1.00 GiB <small>2.00×</small></td>" in page
    assert "<td>0:12 <small>0.77×</small></td>" in page  # 10 s, and 1.5 s
    found = numbers(page)
    assert [(run["name"], run["tokens"]) for run in found["runs"]] == [("a", 1), ("b", 64)]
    assert found["runs"][1]["samples"] == [{"step": 22, "samples": texts}]
    seconds = [point[1] for point in found["charts"][0]["series"][1]["points"]]
    assert seconds[-2:] == [10.5, 11.5]
    assert seconds == sorted(seconds)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_draws_every_chart_without_an_error(tmp_path):
    run = run_directory(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "sample", "step": 30, "samples": [{"prompt": "once", "text": " upon"}]}) + "\n")
    page = write_report([run, run_directory(tmp_path / "other", steps=9)], tmp_path / "page.html")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    charts = len(numbers(page.read_text())["charts"])
    assert done.stdout.count("<svg ") == charts
    assert done.stdout.count('class="line') >= charts
    assert "once</span> upon" in done.stdout
    assert 'aria-pressed="true">steps</button>' in done.stdout
    assert ">tokens</button>" not in done.stdout  # of neither is known how many a step took


def test_not_a_run(tmp_path):
    with pytest.raises(UserError, match="is it a run directory"):
        write_report(tmp_path, tmp_path / "page.html")


@pytest.mark.parametrize("content", [b"null", b"[1]", b"{}", b"[" * 100_000, b"\xff", b'{"device": 1, "versions": 3}'])
def test_a_damaged_environment_is_said_in_the_summary(tmp_path, content):
    run = run_directory(tmp_path / "run")
    (run / "environment.json").write_bytes(content)
    assert "<td>device</td><td>unknown: " in write_report(run, tmp_path / "page.html").read_text()


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


def test_losses_of_other_tokens_are_said_not_to_be_comparable(tmp_path, caplog):
    for name, text in (("a", "1"), ("b", "1"), ("c", "2"), ("d", None)):
        facts = {"device": "cpu", "device_name": "x", "versions": {}} | ({"text_fingerprint": text} if text else {})
        (run_directory(tmp_path / name) / "environment.json").write_text(json.dumps(facts))
    page = write_report([tmp_path / name for name in "abcd"], tmp_path / "page.html").read_text()
    said = "c was trained on other tokens than a (other text, or another tokenizer): their losses are not comparable."
    assert caplog.messages == [said]
    assert page.count("not comparable") == page.count(said) == 1


def test_tokens_that_lie_beside_runs_are_left_out(tmp_path, caplog):
    for name in ("a", "b"):
        run_directory(tmp_path / name)
    (tmp_path / "data-12").mkdir()
    for name in ("meta.json", "train.bin"):
        (tmp_path / "data-12" / name).write_text("")
    assert "<title>a · b</title>" in write_report(sorted(tmp_path.iterdir()), tmp_path / "page.html").read_text()
    assert caplog.messages == [f"left out, tokens and no runs: {tmp_path / 'data-12'}"]
    with pytest.raises(UserError, match="is it a run directory"):
        write_report(tmp_path / "data-12", tmp_path / "page.html")
