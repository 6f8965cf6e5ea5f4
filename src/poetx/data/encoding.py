"""From documents to tokens, about a piece of text at a time, with the part of the data that they belong to."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from poetx.data.chat import ChatTemplate, Span, conversation
from poetx.data.sources import PIECE, Corpus, Part
from poetx.data.split import Split

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_AHEAD = 2  # batches that are tokenized while others are read and written; each uses all cores by itself


@dataclass(frozen=True)
class Encoded:
    """A document or a piece of one.

    Attributes:
        ids: int64.
        labels: of a conversation, which tokens are answers; None: all.
        ends: whether the document ends here.
        source: the number of its part of the corpus.
    """

    ids: np.ndarray
    labels: np.ndarray | None
    ends: bool
    held_out: bool
    source: int


def encode(
    corpus: Corpus, split: Split, tokenizer: Tokenizer, end_id: int, template: ChatTemplate | None, *, skip: int = 0
) -> Iterator[Encoded]:
    """The tokens of a corpus, in order. Texts end with ``end_id``, conversations as their template ends them.

    Args:
        skip: so many of the first items are read and left out.
    """
    held_out = map(split.held_out, itertools.count())
    number = itertools.count()
    for source, part in enumerate(corpus.parts):
        if part.format == "text":
            pieces = _marked_pieces(part, split.section, corpus.text_field, held_out)
            kept = (piece for piece in pieces if next(number) >= skip)
            for encoding, (_, held, ends) in _encoded(tokenizer.encode_batch_fast, kept):
                yield Encoded(np.asarray(encoding.ids + [end_id] * ends, dtype=np.int64), None, ends, held, source)
            continue
        assert template is not None
        chats = (
            (*template.render(conversation(record, part.format, place), place), held)
            for (place, record), held in zip(part.records(), held_out)  # noqa: B905  # as many as there are records
            if next(number) >= skip
        )
        for encoding, (_, spans, held) in _encoded(tokenizer.encode_batch, chats):
            labels = _inside(np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2), spans)
            yield Encoded(np.asarray(encoding.ids, dtype=np.int64), labels, True, held, source)


def _encoded(encode_batch: Callable[..., list[Any]], items: Iterator[tuple]) -> Iterator[tuple[Any, tuple]]:
    """The encodings of items that begin with their text, each with its item: read here, tokenized by other threads."""
    with ThreadPoolExecutor(_AHEAD) as pool:
        waiting: deque[tuple[list[tuple], Future[list[Any]]]] = deque()
        for batch in itertools.chain(_batches(items), [None] * _AHEAD):
            if batch is not None:
                texts = [item[0] for item in batch]
                waiting.append((batch, pool.submit(encode_batch, texts, add_special_tokens=False)))
            if waiting and (batch is None or len(waiting) > _AHEAD):
                first, future = waiting.popleft()
                yield from zip(future.result(), first, strict=True)


def _inside(offsets: np.ndarray, spans: list[Span]) -> np.ndarray:
    """Which tokens, by the characters [begin, end) that they stand for, begin in one of ``spans``."""
    begin, inside = offsets[:, 0], np.zeros(len(offsets), bool)
    for first, last in spans:
        inside |= (begin >= first) & (begin < last) & (offsets[:, 1] > begin)
    return inside


def _batches(items: Iterator[tuple]) -> Iterator[list[tuple]]:
    """About ``PIECE`` characters at a time of items that begin with their text."""
    waiting: list[tuple] = []
    size = 0
    for item in items:
        waiting.append(item)
        size += len(item[0])
        if size >= PIECE:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


def _marked_pieces(
    part: Part, section: int, text_field: str, held_out: Iterator[bool]
) -> Iterator[tuple[str, bool, bool]]:
    """Pieces with (held out, end of a document). Neighbouring sections of one file stay together."""
    waiting: tuple[str, bool] | None = None
    for document in part.documents(section, text_field):
        held = next(held_out)
        if waiting is not None:
            yield *waiting, part.kind != "file" or held != waiting[1]
            waiting = None
        for piece in document:
            if waiting is not None:
                yield *waiting, False
            waiting = (piece, held)
    if waiting is not None:
        yield *waiting, True
