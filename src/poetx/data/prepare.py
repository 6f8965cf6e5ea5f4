"""From text to tokens: a corpus is split and tokenized once, and found again by later runs.

The directory's key hashes the source files (path, size, modification time), the tokenizer settings and the format
version. Runs that start together on the same text wait for the one that tokenizes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from poetx.data.sources import PIECE, Corpus, open_corpus
from poetx.data.split import Split, split_for
from poetx.data.tokenizer import (
    END_OF_TEXT,
    embeddings_needed,
    find_end_of_text,
    read_tokenizer,
    tokenizer_file,
    train_tokenizer,
)
from poetx.data.tokens import (
    FORMAT,
    META,
    PARTS,
    TOKENIZER,
    DataMeta,
    PreparedData,
    fingerprint,
    open_tokens,
    verified_meta,
    window_count,
    write_meta,
)
from poetx.errors import UserError
from poetx.files import locked, new_directory
from poetx.recipe import Recipe
from poetx.recipe.sections import DataRecipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

TOKENIZER_CHARACTERS = 64 << 20  # a BPE learns nothing new from more text than this
Progress = Callable[[str], None]


def prepare_data(recipe: Recipe, *, progress: Progress | None = None) -> PreparedData:
    """Tokenize the recipe's text, or find the tokens of an earlier run, whole and undamaged.

    Args:
        progress: called with one line before each slow part.

    Raises:
        UserError: missing, empty or unreadable text, text that changes meanwhile or that the run would be written into,
            fewer tokens than one window, or a disk that is full.
    """
    data, say = recipe.data, progress or logger.info
    assert data.train is not None
    train = open_corpus(data.train, text_field=data.text_field)
    validation = None
    if data.validation:
        validation = open_corpus(data.validation, key="data.validation", text_field=data.text_field, split="validation")
    _check_apart(recipe, train, "data.train")
    if validation:
        _check_apart(recipe, validation, "data.validation")
    if validation and (shared := set(train.files) & set(validation.files)):
        say(f"data.validation has {len(shared)} files of data.train ({min(shared).name}), which are trained on as well")
    tokenizer = data.tokenizer or recipe.model.pretrained
    source = tokenizer_file(tokenizer) if tokenizer else None
    directory = recipe.cache_dir / f"data-{_key(data, train, validation, source)}"
    made = [path for path in (directory.parent, *directory.parent.parents) if not path.exists()]
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with locked(directory.with_name(f".{directory.name}.lock"), keep=False) as alone:
            meta = _found(directory, say) or _build(directory, data, train, validation, source, say, alone=alone)
            _check_length(meta, data, train)
    except BaseException:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise
    _remove_leftovers(directory.parent)
    return open_tokens(directory, meta, seq_len=data.seq_len)


def _check_apart(recipe: Recipe, text: Corpus, key: str) -> None:
    """Refuse to write into the directory of the text: the next start would read what this one wrote, and not resume."""
    places = {"run_dir": recipe.directory, "data.cache_dir": recipe.cache_dir}
    for part, (name, place) in itertools.product(text.parts, places.items()):
        if part.top is None:
            continue
        top, place = part.top.expanduser().resolve(), place.expanduser().resolve()
        if place.is_relative_to(top) and not any(name.startswith(".") for name in place.relative_to(top).parts):
            raise UserError(
                f"{name}={place}: lies in {key}={part.source}, whose text it would become; give {name}=PATH outside of "
                "it, or put the text into a directory of its own"
            )


def encode_corpus(source: str, tokenizer: Tokenizer, end_of_text_id: int, *, key: str) -> np.ndarray:
    """All tokens of a corpus as one int64 array, for evaluation on other text than the run's own."""
    corpus = open_corpus(source, key=key)
    chunks = [ids for ids, _, _ in _encode(corpus, Split(), tokenizer, end_of_text_id)]
    return np.concatenate(chunks) if chunks else np.empty(0, np.int64)


def _found(directory: Path, say: Progress) -> DataMeta | None:
    """The tokens of an earlier run; None where there are none, or damaged ones, which are made again."""
    if not (directory / META).exists():
        return None
    try:
        return verified_meta(directory)
    except UserError as error:
        say(f"{error}; making it again")
        return None


def _build(
    directory: Path,
    data: DataRecipe,
    train: Corpus,
    validation: Corpus | None,
    source: Path | None,
    say: Progress,
    *,
    alone: bool,
) -> DataMeta:
    """Tokenize into ``directory``. ``alone``: nobody else does so at the same time."""
    read = [corpus for corpus in (train, validation) if corpus]
    before = [_files(corpus) for corpus in read]
    split = Split() if validation else split_for(train, data.validation_fraction)
    if split.note:
        say(split.note)
    with new_directory(directory, remedy="run it again, or with another data.cache_dir=PATH", alone=alone) as temporary:
        tokenizer, end_of_text = _tokenizer(data, train, split, source, say)
        say("Tokenizing the text")
        (temporary / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
        meta = _write_tokens(temporary, train, validation, split, tokenizer, end_of_text)
        for corpus, rows in zip(read, before, strict=True):
            if changed := [old[0] for old, new in zip(rows, _files(corpus), strict=True) if old != new]:
                raise UserError(f"{changed[0]}: has changed while it was read; run it again once nobody writes there")
        _check_split(meta, data, train.source)
        _check_length(meta, data, train)
        write_meta(temporary, meta)
    return meta


def _files(corpus: Corpus) -> list[list[str | int]]:
    return [row for part in corpus.parts for row in part.fingerprint()]


def _tokenizer(
    data: DataRecipe, train: Corpus, split: Split, source: Path | None, say: Progress
) -> tuple[Tokenizer, str]:
    if source is not None:
        tokenizer = read_tokenizer(source)
        return tokenizer, find_end_of_text(tokenizer, data.end_of_text, file=source)
    end_of_text = data.end_of_text or END_OF_TEXT
    say(f"Training a tokenizer of {data.vocab_size} tokens")
    tokenizer = train_tokenizer(_training_text(train, split), vocab_size=data.vocab_size, end_of_text=end_of_text)
    if (found := tokenizer.get_vocab_size()) < data.vocab_size:
        say(f"The text gives a tokenizer of {found} tokens, fewer than data.vocab_size={data.vocab_size}")
    return tokenizer, end_of_text


def _training_text(train: Corpus, split: Split) -> Iterator[str]:
    characters = 0
    for index, document in enumerate(train.documents(split.section)):
        if split.held_out(index):
            continue
        for piece in document:
            yield piece
            characters += len(piece)
            if characters >= TOKENIZER_CHARACTERS:
                return


def _write_tokens(
    directory: Path,
    train: Corpus,
    validation: Corpus | None,
    split: Split,
    tokenizer: Tokenizer,
    end_of_text: str,
) -> DataMeta:
    vocab_size = embeddings_needed(tokenizer)
    end_id = tokenizer.token_to_id(end_of_text)
    assert end_id is not None
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    counts, digests = dict.fromkeys(PARTS, 0), {name: hashlib.sha256() for name in PARTS}
    with (directory / "train.bin").open("wb") as train_file, (directory / "validation.bin").open("wb") as held_file:

        def append(ids: np.ndarray, part: Literal["train", "validation"]) -> None:
            raw = ids.astype(dtype).tobytes()
            (train_file if part == "train" else held_file).write(raw)
            digests[part].update(raw)
            counts[part] += len(ids)

        sizes = [0] * len(train.parts)
        for ids, is_held_out, source in _encode(train, split, tokenizer, end_id):
            append(ids, "validation" if is_held_out else "train")
            sizes[source] += 0 if is_held_out else len(ids)
        if validation is not None:
            for ids, _, _ in _encode(validation, split, tokenizer, end_id):
                append(ids, "validation")
    shares = [[size, weight] for size, weight in zip(sizes, train.weights or [], strict=False)]
    return DataMeta(
        format=FORMAT,
        dtype=dtype,
        vocab_size=vocab_size,
        end_of_text=end_of_text,
        end_of_text_id=end_id,
        train_tokens=counts["train"],
        validation_tokens=counts["validation"],
        fingerprint=fingerprint((digest.hexdigest() for digest in digests.values()), shares),
        shares=shares or (),
    )


def _encode(corpus: Corpus, split: Split, tokenizer: Tokenizer, end_id: int) -> Iterator[tuple[np.ndarray, bool, int]]:
    """Token ids of the corpus, int64, in order, whether they are held out, and the number of their source; about a
    piece of text at a time.
    """
    waiting: list[tuple[str, bool, bool, int]] = []
    size = 0
    for piece in itertools.chain(_marked_pieces(corpus, split), [None]):
        if piece is not None:
            waiting.append(piece)
            size += len(piece[0])
        if waiting and (piece is None or size >= PIECE):
            encodings = tokenizer.encode_batch_fast([piece[0] for piece in waiting], add_special_tokens=False)
            for encoding, (_, held_out, ends, source) in zip(encodings, waiting, strict=True):
                yield np.asarray(encoding.ids + [end_id] * ends, dtype=np.int64), held_out, source
            waiting, size = [], 0


def _marked_pieces(corpus: Corpus, split: Split) -> Iterator[tuple[str, bool, bool, int]]:
    """Pieces with (held out, end of a document, source). Neighbouring sections of one file stay together."""
    index = -1
    for number, part in enumerate(corpus.parts):
        waiting: tuple[str, bool] | None = None
        for index, document in enumerate(part.documents(split.section, corpus.text_field), start=index + 1):  # noqa: B020
            held = split.held_out(index)
            if waiting is not None:
                yield *waiting, part.kind != "file" or held != waiting[1], number
                waiting = None
            for piece in document:
                if waiting is not None:
                    yield *waiting, False, number
                waiting = (piece, held)
        if waiting is not None:
            yield *waiting, True, number


def _key(data: DataRecipe, train: Corpus, validation: Corpus | None, source: Path | None) -> str:
    status = source.stat() if source else None
    parts: dict[str, Any] = {
        "format": FORMAT,
        "train": _identity(train),
        "validation": _identity(validation) if validation else data.validation_fraction,
        "tokenizer": [str(source), status.st_size, status.st_mtime_ns] if status else data.vocab_size,
        "end_of_text": data.end_of_text,
    }
    if data.text_field != "text":
        parts["text_field"] = data.text_field
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _identity(corpus: Corpus) -> list[Any]:
    rows = [[part.kind, part.fingerprint(), part.weight] for part in corpus.parts]
    return rows[0][:2] if len(rows) == 1 else rows


def _remove_leftovers(cache_dir: Path) -> None:
    """Remove half-written data of processes that no longer hold its lock."""
    for path in cache_dir.glob(".data-*.tmp-*"):
        lock = path.with_suffix(".lock")
        with contextlib.suppress(OSError, UserError), locked(lock, busy="in use", keep=False) as alone:
            if alone:
                shutil.rmtree(path, ignore_errors=True)


def _check_split(meta: DataMeta, data: DataRecipe, source: str) -> None:
    if meta.train_tokens == 0:
        raise UserError(f"data.train={source}: no text to train on")
    if meta.validation_tokens == 0:
        if data.validation:
            raise UserError(f"data.validation={data.validation}: there is no text in it")
        raise UserError(
            f"data.validation_fraction={data.validation_fraction}: the documents that it holds out of "
            f"data.train={source} are empty; change it, or give data.validation=PATH"
        )


def _check_length(meta: DataMeta, data: DataRecipe, train: Corpus) -> None:
    if data.validation:
        validation, remedy = f"validation text (data.validation={data.validation})", "give more text"
    else:
        validation, remedy = "validation text", "raise data.validation_fraction, give data.validation=PATH"
    training = [("training text", meta.train_tokens)]
    if meta.shares:
        training = [
            (f"training text of {part.source}", int(size))
            for part, (size, _) in zip(train.parts, meta.shares, strict=True)
        ]
    for part, tokens, remedies in (
        *((part, tokens, "give more text") for part, tokens in training),
        (validation, meta.validation_tokens, remedy),
    ):
        if window_count(tokens, data.seq_len) == 0:
            raise UserError(
                f"the {part} has {tokens} tokens, fewer than one window of data.seq_len={data.seq_len} + 1; "
                f"{remedies} or lower data.seq_len"
            )
