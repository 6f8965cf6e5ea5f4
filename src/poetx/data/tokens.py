"""Tokens on disk: a corpus is tokenized once into memory-mapped files and read back as fixed windows.

    <cache_dir>/data-<key>/train.bin, validation.bin    uint16 or uint32 token ids, documents joined by end-of-text
                           tokenizer.json               the tokenizer that made them
                           meta.json                    counts, dtype, sha256 of the tokens, format version

The key hashes the source files (path, size, modification time), the tokenizer settings and the format version.
The directory is written under another name and renamed, so a kill leaves nothing half-written under this one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from poetx.data.sources import PIECE, SECTION, Corpus, held_out, open_corpus
from poetx.data.tokenizer import (
    END_OF_TEXT,
    embeddings_needed,
    find_end_of_text,
    read_tokenizer,
    tokenizer_file,
    train_tokenizer,
)
from poetx.errors import UserError
from poetx.recipe import Recipe
from poetx.sections import DataRecipe

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

FORMAT = 2
TOKENIZER_CHARACTERS = 64 << 20  # a BPE learns nothing new from more text than this
Progress = Callable[[str], None]


@dataclass(frozen=True)
class DataMeta:
    """What ``meta.json`` holds."""

    format: int
    dtype: str
    vocab_size: int
    end_of_text: str
    end_of_text_id: int
    train_tokens: int
    validation_tokens: int
    fingerprint: str  # sha256 of both token streams: the identity of the data, whatever its path and time stamps


class TokenWindows:
    """Windows of ``seq_len`` tokens from a row of tokens (memory-mapped), each token a label exactly once.

    Window i has the inputs ``[i*seq_len, (i+1)*seq_len)`` and as labels the same range shifted by one.
    """

    def __init__(self, tokens: np.ndarray, *, seq_len: int) -> None:
        self.tokens = tokens
        self.seq_len = seq_len

    def __len__(self) -> int:
        return window_count(len(self.tokens), self.seq_len)

    def batch(self, windows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels of these windows, int64 ``[len(windows), seq_len]`` each, on the CPU."""
        import torch

        length = self.seq_len
        rows = np.stack([self.tokens[i * length : i * length + length + 1] for i in windows]).astype(np.int64)
        both = torch.from_numpy(rows)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


@dataclass(frozen=True)
class PreparedData:
    """Tokenized data of one recipe, ready to train on."""

    directory: Path
    meta: DataMeta
    train: TokenWindows
    validation: TokenWindows

    @property
    def tokenizer_file(self) -> Path:
        """The ``tokenizer.json`` of this data."""
        return self.directory / "tokenizer.json"


def window_count(tokens: int, seq_len: int) -> int:
    """Whole windows in ``tokens`` tokens: the last label needs one token more than the inputs."""
    return max(0, (tokens - 1) // seq_len)


def prepare_data(recipe: Recipe, *, progress: Progress | None = None) -> PreparedData:
    """Tokenize the recipe's text, or find the tokens of an earlier run.

    Args:
        progress: called with one line before each slow part.

    Raises:
        UserError: missing, empty or unreadable text, or fewer tokens than one window.
    """
    data = recipe.data
    assert data.train is not None
    train = open_corpus(data.train)
    validation = open_corpus(data.validation, key="data.validation") if data.validation else None
    tokenizer = data.tokenizer or recipe.model.pretrained
    source = tokenizer_file(tokenizer) if tokenizer else None
    directory = recipe.cache_dir / f"data-{_key(data, train, validation, source)}"
    if not _is_whole(directory):
        _remove_leftovers(recipe.cache_dir)
        _build(directory, data, train, validation, source, progress or logger.info)
    return open_data(directory, data)


def open_data(directory: Path, data: DataRecipe) -> PreparedData:
    """Open prepared tokens. Raises :class:`UserError` when either part is shorter than one window."""
    meta = DataMeta(**json.loads((directory / "meta.json").read_text(encoding="utf-8")))
    _check_length(meta, data)
    parts = {
        name: TokenWindows(np.memmap(directory / f"{name}.bin", dtype=meta.dtype, mode="r"), seq_len=data.seq_len)
        for name in ("train", "validation")
    }
    return PreparedData(directory, meta, parts["train"], parts["validation"])


def encode_corpus(source: str, tokenizer: Tokenizer, end_of_text_id: int, *, key: str) -> np.ndarray:
    """All tokens of a corpus as one int64 array, for evaluation on other text than the run's own."""
    corpus = open_corpus(source, key=key)
    chunks = [ids for ids, _ in _encode(corpus, tokenizer, end_of_text_id, lambda index: False)]
    return np.concatenate(chunks) if chunks else np.empty(0, np.int64)


def _build(
    directory: Path,
    data: DataRecipe,
    train: Corpus,
    validation: Corpus | None,
    source: Path | None,
    progress: Progress,
) -> None:
    fraction = 0.0 if validation else data.validation_fraction
    if validation is None:
        _check_held_out(train, data)
    made_parent = not directory.parent.exists()
    temporary = directory.parent / f".{directory.name}.tmp-{os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        tokenizer, end_of_text = _tokenizer(data, train, fraction, source, progress)
        progress("Tokenizing the text")
        meta = _write_tokens(temporary, train, validation, fraction, tokenizer, end_of_text)
        _check_split(meta, data)
        _check_length(meta, data)
        tokenizer.save(str(temporary / "tokenizer.json"))
        # Last, so that a directory with meta.json has everything.
        (temporary / "meta.json").write_text(json.dumps(asdict(meta), indent=2), encoding="utf-8")
        if directory.exists():  # an incomplete one, made by hand or by a copy that was cut short
            shutil.rmtree(directory)
        temporary.rename(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if made_parent and not any(directory.parent.iterdir()):
            directory.parent.rmdir()
        raise


def _tokenizer(
    data: DataRecipe, train: Corpus, fraction: float, source: Path | None, progress: Progress
) -> tuple[Tokenizer, str]:
    if source is not None:
        tokenizer = read_tokenizer(source)
        return tokenizer, find_end_of_text(tokenizer, data.end_of_text, file=source)
    end_of_text = data.end_of_text or END_OF_TEXT
    progress(f"Training a tokenizer of {data.vocab_size} tokens")
    return train_tokenizer(
        _training_text(train, fraction), vocab_size=data.vocab_size, end_of_text=end_of_text
    ), end_of_text


def _training_text(train: Corpus, fraction: float) -> Iterator[str]:
    characters = 0
    for index, document in enumerate(train.documents()):
        if held_out(index, fraction):
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
    fraction: float,
    tokenizer: Tokenizer,
    end_of_text: str,
) -> DataMeta:
    vocab_size = embeddings_needed(tokenizer)
    end_id = tokenizer.token_to_id(end_of_text)
    assert end_id is not None
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    counts = {"train": 0, "validation": 0}
    digests = {name: hashlib.sha256() for name in counts}
    with (
        (directory / "train.bin").open("wb") as train_file,
        (directory / "validation.bin").open("wb") as val_file,
    ):
        files = {"train": train_file, "validation": val_file}

        def append(ids: np.ndarray, part: str) -> None:
            raw = ids.astype(dtype).tobytes()
            files[part].write(raw)
            digests[part].update(raw)
            counts[part] += len(ids)

        for ids, is_held_out in _encode(train, tokenizer, end_id, lambda index: held_out(index, fraction)):
            append(ids, "validation" if is_held_out else "train")
        if validation is not None:
            for ids, _ in _encode(validation, tokenizer, end_id, lambda index: False):
                append(ids, "validation")
    fingerprint = hashlib.sha256("".join(digests[name].hexdigest() for name in sorted(digests)).encode())
    return DataMeta(
        format=FORMAT,
        dtype=dtype,
        vocab_size=vocab_size,
        end_of_text=end_of_text,
        end_of_text_id=end_id,
        train_tokens=counts["train"],
        validation_tokens=counts["validation"],
        fingerprint=fingerprint.hexdigest(),
    )


def _encode(
    corpus: Corpus, tokenizer: Tokenizer, end_id: int, is_held_out: Callable[[int], bool]
) -> Iterator[tuple[np.ndarray, bool]]:
    """Token ids of the corpus, int64, in order, with the part they belong to; about a piece of text at a time."""
    texts: list[str] = []
    tails: list[tuple[bool, bool]] = []  # (held out, end of a document), one for each text
    size = 0
    for text, held, ends in _marked_pieces(corpus, is_held_out):
        texts.append(text)
        tails.append((held, ends))
        size += len(text)
        if size >= PIECE:
            yield from _encode_batch(texts, tails, tokenizer, end_id)
            texts, tails, size = [], [], 0
    if texts:
        yield from _encode_batch(texts, tails, tokenizer, end_id)


def _marked_pieces(corpus: Corpus, is_held_out: Callable[[int], bool]) -> Iterator[tuple[str, bool, bool]]:
    """Pieces with (held out, end of a document). Neighbouring sections of one file stay together."""
    waiting: tuple[str, bool] | None = None
    for index, document in enumerate(corpus.documents()):
        held = is_held_out(index)
        if waiting is not None:
            yield (*waiting, corpus.kind != "file" or held != waiting[1])
            waiting = None
        for piece in document:
            if waiting is not None:
                yield (*waiting, False)
            waiting = (piece, held)
    if waiting is not None:
        yield (*waiting, True)


def _encode_batch(
    texts: list[str], tails: list[tuple[bool, bool]], tokenizer: Tokenizer, end_id: int
) -> Iterator[tuple[np.ndarray, bool]]:
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for encoding, (held, ends) in zip(encodings, tails, strict=True):
        ids = encoding.ids
        if ends:
            ids.append(end_id)
        yield np.asarray(ids, dtype=np.int64), held


def _key(data: DataRecipe, train: Corpus, validation: Corpus | None, source: Path | None) -> str:
    status = source.stat() if source else None
    parts: dict[str, Any] = {
        "format": FORMAT,
        "train": [train.kind, train.fingerprint()],
        "validation": [validation.kind, validation.fingerprint()] if validation else data.validation_fraction,
        "tokenizer": [str(source), status.st_size, status.st_mtime_ns] if status else data.vocab_size,
        "end_of_text": data.end_of_text,
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _is_whole(directory: Path) -> bool:
    """Whether all files are there with the sizes that ``meta.json`` implies."""
    try:
        meta = DataMeta(**json.loads((directory / "meta.json").read_text(encoding="utf-8")))
        width = np.dtype(meta.dtype).itemsize
        return (
            meta.format == FORMAT
            and (directory / "tokenizer.json").is_file()
            and (directory / "train.bin").stat().st_size == meta.train_tokens * width
            and (directory / "validation.bin").stat().st_size == meta.validation_tokens * width
        )
    except (OSError, ValueError, TypeError):
        return False


def _remove_leftovers(cache_dir: Path) -> None:
    """Remove half-written data of processes that no longer live."""
    for path in cache_dir.glob(".data-*.tmp-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _check_held_out(train: Corpus, data: DataRecipe) -> None:
    """Refuse text too short for the split before anything slow is done; reads to the first held-out document."""
    count = 0
    for index, _ in enumerate(train.documents()):
        if held_out(index, data.validation_fraction):
            return
        count += 1
    if count == 0:
        raise UserError(f"data.train={data.train}: no text to train on")
    if train.kind == "file":
        what = f"a file is held out in sections of {SECTION} characters, and data.train={data.train} has {count}"
    else:
        what = f"whole documents are held out, and data.train={data.train} has {count}"
    remedy = "give more text" if train.kind == "file" else "give more documents"
    if count > 1:
        remedy = f"raise it to {math.ceil(1000 / count) / 1000:g}, {remedy}"
    raise UserError(
        f"data.validation_fraction={data.validation_fraction} holds out nothing: {what}; {remedy}, or give "
        "data.validation=PATH"
    )


def _check_split(meta: DataMeta, data: DataRecipe) -> None:
    if meta.train_tokens == 0:
        raise UserError(f"data.train={data.train}: no text to train on")
    if meta.validation_tokens == 0:
        if data.validation:
            raise UserError(f"data.validation={data.validation}: there is no text in it")
        raise UserError(
            f"data.validation_fraction={data.validation_fraction}: the documents that it holds out of "
            f"data.train={data.train} are empty; change it, or give data.validation=PATH"
        )


def _check_length(meta: DataMeta, data: DataRecipe) -> None:
    if data.validation:
        validation, remedy = f"validation text (data.validation={data.validation})", "give more text"
    else:
        validation, remedy = "validation text", "raise data.validation_fraction, give data.validation=PATH"
    for part, tokens, remedies in (
        ("training text", meta.train_tokens, "give more text"),
        (validation, meta.validation_tokens, remedy),
    ):
        if window_count(tokens, data.seq_len) == 0:
            raise UserError(
                f"the {part} has {tokens} tokens, fewer than one window of data.seq_len={data.seq_len} + 1; "
                f"{remedies} or lower data.seq_len"
            )
