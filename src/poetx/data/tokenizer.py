"""Byte-level BPE: trained on the run's own text, or an existing Hugging Face tokenizer."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poetx.errors import UserError, nearest, one_line
from poetx.files import check_fetched, read_json
from poetx.recipe.places import found_instead

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_CONFIG = "tokenizer_config.json"  # beside tokenizer.json
# Tokens that known tokenizers put between documents, most specific first.
_USUAL_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, end_of_text: str = END_OF_TEXT) -> Tokenizer:
    """A byte-level BPE of at most ``vocab_size`` tokens, the same for the same texts and size.

    Raises:
        UserError: ``end_of_text`` is words and punctuation, which text has as well.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if re.fullmatch(r"[\w\s.,:;!?'\"()-]*", end_of_text):
        raise UserError(f"data.end_of_text={end_of_text}: must be what no text has, such as {END_OF_TEXT}")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_text],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_file(source: str, key: str = "data.tokenizer") -> Path:
    """The ``tokenizer.json`` meant by a file or directory. Raises :class:`UserError` when there is none."""
    path = Path(source).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{key}={source}: {found_instead(path, 'tokenizer.json')}")
    return file.resolve()


def read_tokenizer(file: Path) -> Tokenizer:
    """Read a ``tokenizer.json``. Raises :class:`UserError` when it is not one."""
    from tokenizers import Tokenizer

    check_fetched(file)
    try:
        return whole_text(Tokenizer.from_file(str(file)))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{file}: not a tokenizer ({' '.join(str(error).split())})") from None


def whole_text(tokenizer: Tokenizer) -> Tokenizer:
    """``tokenizer`` without the truncation and padding that some files ask for: a corpus is longer than any limit."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_tokenizer(directory: Path, remedy: str = "") -> Any:
    """The transformers tokenizer saved in a directory. Raises :class:`UserError` when its files are damaged or gone."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # by what is wrong in the files, transformers raises nearly any class
        what = one_line(error) if any(directory.glob("*token*")) else "no tokenizer files there"
        raise UserError(f"{directory}: its tokenizer cannot be read ({what}){remedy}") from None


def embeddings_needed(tokenizer: Tokenizer) -> int:
    """One more than the largest id. More than there are tokens where a file leaves ids out."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def find_end_of_text(tokenizer: Tokenizer, wanted: str | None, *, file: Path) -> str:
    """The token between documents: ``wanted``, or the one named beside ``file``, or a usual name.

    Raises:
        UserError: the tokenizer has no such token.
    """
    vocab = tokenizer.get_vocab()
    if wanted is not None:
        if wanted not in vocab:
            raise UserError(f"data.end_of_text={wanted}: not a token of {file}{nearest(wanted, _USUAL_ENDS)}")
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        written = (wanted, tokenizer.decode([vocab[wanted]], skip_special_tokens=False))  # "Ġfox" is written " fox"
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in written]
        if wanted not in added and [vocab[wanted]] in ids:
            raise UserError(
                f"data.end_of_text={wanted}: an ordinary token of {file}, which text has as well; name a special one"
            )
        return wanted
    for candidate in (*_declared_end(file.parent / TOKENIZER_CONFIG), *_USUAL_ENDS):
        if candidate in vocab:
            return candidate
    raise UserError(f"{file}: no end-of-text token found; name one with data.end_of_text=TOKEN")


def fast_tokenizer(file: Path, end_of_text: str) -> PreTrainedTokenizerFast:
    """The transformers tokenizer around a ``tokenizer.json``, as saved into an export."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_file=str(file), bos_token=end_of_text, eos_token=end_of_text, pad_token=end_of_text
    )


def _declared_end(config: Path) -> list[str]:
    """``eos_token`` of a ``tokenizer_config.json``, where there is one: a string, or a dict with ``content``."""
    try:
        token = read_json(config).get("eos_token")
    except UserError:  # none there, or one that says nothing
        return []
    if isinstance(token, dict):
        token = token.get("content")
    return [token] if isinstance(token, str) else []


def dropped_characters(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """Printable characters of ``texts`` that no token stands for, the most frequent first.

    A vocabulary without bytes and without an unknown token has none for what it does not know.
    """
    model = json.loads(tokenizer.to_str())["model"]
    if model.get("unk_token") is not None or model.get("unk_id") is not None:
        return []
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    # What has a token has others where there are three of it.
    seen = [character for character, _ in counts.most_common() if character.isprintable() and character != " "]
    return [character for character in seen if ids(character) == ids(3 * character)]
