"""The token between documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from poetx.data.tokenizer import dropped_characters, find_end_of_text, train_tokenizer
from poetx.errors import UserError


@pytest.mark.parametrize("word", ["gamma", " ", "42", ".", "the end", "..."])
def test_an_end_of_text_that_text_has_as_well_is_refused_for_a_new_tokenizer(word: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.end_of_text={re.escape(word)}: must be what no text has"):
        train_tokenizer(["a"], vocab_size=300, end_of_text=word)


@pytest.mark.parametrize("word", ["gamma", "42", "Ġgamma", "Ġ"])
def test_an_ordinary_token_of_a_tokenizer_is_refused_as_end_of_text(word: str, tmp_path: Path) -> None:
    own, file = train_tokenizer(["gamma 42 gamma 42 gamma 42"] * 9, vocab_size=300), tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=rf"^data\.end_of_text={word}: an ordinary token"):
        find_end_of_text(own, word, file=file)
    assert find_end_of_text(own, "<|endoftext|>", file=file) == "<|endoftext|>"


def test_characters_that_a_tokenizer_leaves_out_are_found() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    known, text = "hello world", "hello wörld \N{GRINNING FACE} ö\n\t hello"

    def trained(model: models.Model, trainer: trainers.Trainer) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.train_from_iterator([known], trainer)
        return tokenizer

    plain = trained(models.BPE(), trainers.BpeTrainer(special_tokens=["<e>"]))
    assert dropped_characters(plain, [known, text]) == ["ö", "\N{GRINNING FACE}"]
    unknown = trained(models.BPE(unk_token="<u>"), trainers.BpeTrainer(special_tokens=["<e>", "<u>"]))
    assert dropped_characters(unknown, [text]) == []
    assert dropped_characters(train_tokenizer([known], vocab_size=300), [text]) == []
