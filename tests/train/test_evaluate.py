"""Evaluation of runs and exported models, on their own text and on other text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from poetx.errors import UserError
from poetx.train.evaluate import evaluate_run
from poetx.train.recipe import Recipe
from poetx.train.run import train

Tiny = Callable[..., Recipe]


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


def test_windows_are_no_longer_than_the_model_has_positions(tiny: Tiny, corpus: Path, tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24, "vocab_size": 320}
    (tmp_path / "gpt2.json").write_text(json.dumps(config))
    sizes = [f"model.{key}=null" for key in ("hidden_size", "intermediate_size", "num_layers", "num_heads")]
    result = train(tiny(*sizes, f"model.config={tmp_path / 'gpt2.json'}", "train.steps=1"))
    data = str(corpus / "0.txt")
    assert evaluate_run(str(result.export_dir), data=data).seq_len == 24
    assert evaluate_run(str(result.run_dir), data=data).seq_len == 16
    for place in (result.export_dir, result.run_dir):
        with pytest.raises(UserError, match="--seq-len=25: the model has 24 positions; use at most that"):
            evaluate_run(str(place), data=data, seq_len=25)
