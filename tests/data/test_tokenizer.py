"""The token between documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from poetx.data.tokenizer import find_end_of_text, train_tokenizer
from poetx.errors import UserError


@pytest.mark.parametrize("word", ["gamma", " ", "42"])
def test_an_end_of_text_that_text_has_as_well_is_refused(word: str, tmp_path: Path) -> None:
    own = train_tokenizer(["gamma 42 gamma 42 gamma 42"] * 9, vocab_size=300)
    own.save(str(tmp_path / "tokenizer.json"))
    for use in (
        lambda: find_end_of_text(own, word, file=tmp_path / "tokenizer.json"),
        lambda: train_tokenizer(["a"], vocab_size=300, end_of_text=word),
    ):
        with pytest.raises(UserError, match=rf"^data\.end_of_text={word}: "):
            use()
