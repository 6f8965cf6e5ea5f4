"""Evaluation of runs and exported models, on their own text and on other text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

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
