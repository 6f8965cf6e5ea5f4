"""Evaluation of runs and exported models, on their own text and on other text."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from builders import Tiny
from poetx.errors import UserError
from poetx.runs.evaluate import evaluate_run
from poetx.train.run import train


def test_other_text_is_read_whole_whatever_the_tokenizer_file_asks_for(tiny: Tiny, corpus: Path) -> None:
    result = train(tiny("train.steps=1"))
    assert result.export_dir is not None
    data = str(corpus / "0.txt")
    expected = evaluate_run(str(result.export_dir), data=data, seq_len=16)
    file = result.export_dir / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(20)
    tokenizer.save(str(file))
    assert evaluate_run(str(result.export_dir), data=data, seq_len=16) == expected


def gpt2(tmp_path: Path, *, positions: int) -> list[str]:
    """Overrides for a GPT-2 of so many positions."""
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 320}
    path = tmp_path / "gpt2.json"
    path.write_text(json.dumps({**config, "n_positions": positions}))
    sizes = [f"model.{key}=null" for key in ("hidden_size", "intermediate_size", "num_layers", "num_heads")]
    return [*sizes, f"model.config={path}", "train.steps=1"]


def test_windows_are_no_longer_than_the_model_has_positions(tiny: Tiny, corpus: Path, tmp_path: Path) -> None:
    result = train(tiny(*gpt2(tmp_path, positions=24)))
    data = str(corpus / "0.txt")
    assert evaluate_run(str(result.export_dir), data=data).seq_len == 24
    assert evaluate_run(str(result.run_dir), data=data).seq_len == 16
    for place in (result.export_dir, result.run_dir):
        with pytest.raises(UserError, match="--seq-len=25: the model has 24 positions; use at most that"):
            evaluate_run(str(place), data=data, seq_len=25)


def test_windows_longer_than_the_text_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("alpha beta gamma")
    run = str(train(tiny(*gpt2(tmp_path, positions=9999))).run_dir)
    with pytest.raises(UserError, match=r"the run's validation text: \d+ tokens, fewer than one window of 9000 \+ 1"):
        evaluate_run(run, data=None, seq_len=9000)
    with pytest.raises(UserError, match=r"short\.txt: \d+ tokens, fewer than one window.*lower --seq-len"):
        evaluate_run(run, data=str(tmp_path / "short.txt"), seq_len=50)


def test_records_of_other_text_have_the_field_of_the_run(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": f"alpha beta {n} " * 9}) + "\n" for n in range(60)))
    result = train(tiny(f"data.train={path}", "data.text_field=body", "train.steps=1"))
    assert evaluate_run(str(result.run_dir), data=str(path)).tokens > 1000
    with pytest.raises(UserError, match=r'no "text" field .* \(of poetx eval --text-field\), or call it "text"'):
        evaluate_run(str(result.export_dir), data=str(path))
    assert evaluate_run(str(result.export_dir), data=str(path), text_field="body").tokens > 1000


def test_tasks_need_their_package_and_scores_are_lines(monkeypatch, capsys):
    from poetx.cli import main
    from poetx.runs.tasks import score_lines

    for module in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["eval", "nowhere", "--tasks", "arc_easy"]) == 2
    assert "pip install 'poetx[eval]'" in capsys.readouterr().err
    assert main(["eval", "nowhere", "--tasks", "arc_easy", "--data", "a.txt"]) == 2
    assert main(["eval", "nowhere", "--limit", "3"]) == 2
    results = {
        "own": {
            "alias": "own",
            "sample_len": 12,
            "acc,none": 0.5,
            "acc_stderr,none": 0.25,
            "f1,strict": 1,
            "f1_stderr,strict": "N/A",
        }
    }
    count, first, second = (line.split() for line in score_lines(results))
    assert count == ["own", "sample_len", "12"]
    assert first == ["own", "acc", "0.5000", "±", "0.2500"]
    assert second == ["own", "f1", "(strict)", "1.0000"]
