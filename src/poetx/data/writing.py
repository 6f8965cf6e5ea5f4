"""Tokens to disk: files that grow by a document at a time, and how far they have come, to go on from there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from poetx.data.chat import ChatTemplate
from poetx.data.encoding import Encoded, encode
from poetx.data.packing import LABEL, Packer
from poetx.data.sources import Corpus
from poetx.data.split import Split
from poetx.data.tokenizer import embeddings_needed
from poetx.data.tokens import FORMAT, PARTS, DataMeta, fingerprint, token_files
from poetx.errors import UserError
from poetx.files import read_json, sync_to_disk, write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROGRESS = "progress.json"
TELL_EVERY = 10.0  # seconds between lines of progress, and between records of how far the files have come


class TokenWriter:
    """The files of tokens in ``directory``, written in the order of the corpus.

    Args:
        packed: documents lie in windows of so many tokens; 0: one after the other.
        sources: of the training text.
        mixture: each of its sources has windows of its own.

    Attributes:
        corpus, items: which text is being read, training or validation, and how many pieces of it have been.
    """

    def __init__(
        self, directory: Path, *, vocab_size: int, end_id: int, labelled: bool, packed: int, sources: int, mixture: bool
    ) -> None:
        self.dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        self.packed, self.mixture = packed, mixture
        self.counts: dict[str, int] = dict.fromkeys(PARTS, 0)
        self.answers: dict[str, int] = dict.fromkeys(PARTS, 0)
        self.sizes = [0] * sources
        self.chats, self.corpus, self.items, self.source = 0, 0, 0, 0
        self.packers = {part: Packer(packed, end_id) for part in PARTS}
        self.digests = {name: hashlib.sha256() for name in token_files(labelled)}
        self._directory = directory
        self._files: dict[str, Any] = {}

    @contextlib.contextmanager
    def opened(self) -> Iterator[TokenWriter]:
        """The files, open, cut to what was recorded of them by :meth:`record`, and from there on."""
        if (self._directory / PROGRESS).is_file():
            self._restore(read_json(self._directory / PROGRESS))
        with contextlib.ExitStack() as stack:
            for name in self.digests:
                file = stack.enter_context((self._directory / f"{name}.bin").open("ab"))
                size = self._size(name)
                if file.tell() < size:
                    raise UserError(f"{file.name}: shorter than {PROGRESS} says; delete {self._directory}, start anew")
                file.truncate(size)
                self._files[name] = file
                self._rehash(name)
            yield self

    def record(self) -> None:
        """Write down how far the files have come, once they are on the disk."""
        for file in self._files.values():
            file.flush()
            sync_to_disk(Path(file.name))
        state = {
            name: getattr(self, name) for name in ("counts", "answers", "sizes", "chats", "corpus", "items", "source")
        }
        packers = {part: packer.state() for part, packer in self.packers.items()}
        write_text(self._directory / PROGRESS, json.dumps(state | {"packers": packers}))

    def take(self, item: Encoded) -> None:
        """Append a document, or a piece of one: of the training text, unless it is held out, or of validation text."""
        training = self.corpus == 0
        part = "train" if training and not item.held_out else "validation"
        self.items += 1
        self.chats += item.labels is not None
        if not self.packed:
            flags = np.ones(len(item.ids), np.uint8) if item.labels is None else item.labels.astype(np.uint8)
            self._append(part, item.source, item.ids, flags)
            return
        if item.source != self.source and training:
            self._flush("train", end=self.mixture)  # no window has documents of two
        self.source = item.source
        for window in self.packers[part].add(item.ids, item.labels, ends=item.ends):
            self._append(part, item.source, *window)

    def end_corpus(self) -> None:
        """The training text is at its end, or the validation text."""
        if self.packed and self.corpus == 0:
            self._flush("train", end=True)
        self.corpus, self.items, self.source = self.corpus + 1, 0, 0

    def end(self) -> None:
        """All text is at its end."""
        if self.packed:
            self._flush("validation", end=True)

    def _flush(self, part: str, *, end: bool) -> None:
        for window in self.packers[part].flush(end=end):
            self._append(part, self.source, *window)

    def _append(self, part: str, source: int, ids: np.ndarray, flags: np.ndarray) -> None:
        for name, values in ((part, ids.astype(self.dtype)), (f"{part}-flags", flags)):
            if name in self._files:
                raw = values.tobytes()
                self._files[name].write(raw)
                self.digests[name].update(raw)
        self.counts[part] += len(ids)
        self.answers[part] += int((flags & LABEL).sum())
        if part == "train":
            self.sizes[source] += len(ids)

    def _size(self, name: str) -> int:
        part, _, flags = name.partition("-")
        return self.counts[part] * (1 if flags else np.dtype(self.dtype).itemsize)

    def _rehash(self, name: str) -> None:
        with (self._directory / f"{name}.bin").open("rb") as file:
            while block := file.read(1 << 20):
                self.digests[name].update(block)

    def _restore(self, state: dict[str, Any]) -> None:
        packers = state.pop("packers")
        vars(self).update(state)
        for part, packer in self.packers.items():
            packer.restore(packers[part])


def write_tokens(
    directory: Path,
    train: Corpus,
    validation: Corpus | None,
    split: Split,
    tokenizer: Tokenizer,
    end_of_text: str,
    template: ChatTemplate | None,
    packed: int,
    say: Callable[[str], None],
    *,
    resumable: bool = False,
) -> DataMeta:
    """Write the files of tokens; ``packed``: documents lie in windows of so many tokens, 0: one after the other.

    Args:
        resumable: record how far they have come, and go on from there where that was done before.
    """
    vocab_size = embeddings_needed(tokenizer)
    end_id = tokenizer.token_to_id(end_of_text)
    assert end_id is not None
    labelled = bool(packed or template)
    sources = len(train.parts)
    layout: dict[str, Any] = {"vocab_size": vocab_size, "end_id": end_id, "labelled": labelled, "packed": packed}
    with TokenWriter(directory, **layout, sources=sources, mixture=bool(train.weights)).opened() as writer:
        told, speed = time.monotonic(), _Speed(sum(writer.counts.values()))
        for corpus in [train, *([validation] if validation else [])][writer.corpus :]:
            for item in encode(corpus, split, tokenizer, end_id, template, skip=writer.items):
                writer.take(item)
                if time.monotonic() - told > TELL_EVERY:
                    say(speed.text(sum(writer.counts.values())))
                    if resumable:
                        writer.record()
                    told = time.monotonic()
            writer.end_corpus()
        writer.end()
    counts = writer.counts
    for part, number in writer.answers.items():
        if template and number == 0 and counts[part]:
            packer = writer.packers[part]
            if packer.cut and packer.cut == packer.dropped:
                raise UserError(
                    f"data.train={train.source}: each of the {packer.cut} conversations for {part} is longer than "
                    f"data.seq_len={packed} and cut before its answer; raise that"
                )
            raise UserError(f"data.train={train.source}: no answers for {part}, which alone are learnt; give some")
    shares = [[size, weight] for size, weight in zip(writer.sizes, train.weights or [], strict=False)]
    if packed:
        _tell_packing(writer, say)
    return DataMeta(
        format=FORMAT,
        dtype=writer.dtype,
        vocab_size=vocab_size,
        end_of_text=end_of_text,
        end_of_text_id=end_id,
        train_tokens=counts["train"],
        validation_tokens=counts["validation"],
        fingerprint=fingerprint((digest.hexdigest() for digest in writer.digests.values()), shares),
        shares=shares or (),
        labelled=labelled,
        packed=packed,
        template=template.text if template else "",
    )


class _Speed:
    """Tokens a second since it was made, for people who wait."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._started = tokens, time.monotonic()

    def text(self, tokens: int) -> str:
        speed = (tokens - self._tokens) / max(time.monotonic() - self._started, 1e-9)
        return f"{tokens / 1e6:,.1f}M tokens by now, {speed:,.0f} tokens/s"


def _tell_packing(writer: TokenWriter, say: Callable[[str], None]) -> None:
    packers, size, tokens = writer.packers.values(), writer.packed, sum(writer.counts.values())
    used, cut, dropped = (sum(getattr(packer, name) for packer in packers) for name in ("tokens", "cut", "dropped"))
    text = f"{tokens // size} windows of {size} tokens, {1 - used / max(1, tokens):.0%} of them padding"
    if writer.chats:
        text = f"{writer.chats} conversations in {text}"
    if cut:
        text += f"; {cut} conversations are longer than data.seq_len={size} and were cut"
    if dropped:
        text += f"; {dropped} are left out because no answer is in what fits"
    say(text)
