"""Tokens on disk: memory-mapped files that are read back as fixed windows, and checked before they are.

<cache_dir>/data-<key>/train.bin, validation.bin    uint16 or uint32 token ids, documents joined by end-of-text
                       tokenizer.json               the tokenizer that made them
                       meta.json                    counts, dtype, sha256 of all of this, format version
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from poetx.data.packing import LABEL, START
from poetx.data.sampler import evenly_spread
from poetx.errors import UserError
from poetx.files import read_json, sha256, write_text

if TYPE_CHECKING:
    import torch

FORMAT = 2
PARTS = ("train", "validation")
META, TOKENIZER = "meta.json", "tokenizer.json"
IGNORED = -100  # a label that counts for nothing, as torch has it


@dataclass(frozen=True)
class DataMeta:
    """What ``meta.json`` holds, beside its own ``checksum``. What has its default is left out.

    Attributes:
        fingerprint: sha256 of both token streams: the identity of the data, whatever its path and time stamps.
        shares: of a mixture, tokens and weight of every source in the training part.
        labelled: beside every token is a byte (``train-flags.bin``): whether it counts as a label, and where documents
            begin.
        packed: tokens of a window, where documents lie in windows; 0: one document after the other.
        template: by which conversations were written.
    """

    format: int
    dtype: str
    vocab_size: int
    end_of_text: str
    end_of_text_id: int
    train_tokens: int
    validation_tokens: int
    fingerprint: str
    shares: Sequence[Sequence[float]] = ()
    labelled: bool = False
    packed: int = 0
    template: str = ""

    def written(self) -> dict[str, Any]:
        """As JSON has it."""
        found = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, default) in found.items() if value != default}

    def checksum(self, tokenizer: Path) -> str:
        """Hash of these facts and of the tokenizer's file."""
        return hashlib.sha256((json.dumps(self.written()) + sha256(tokenizer)).encode()).hexdigest()


class Batch(NamedTuple):
    """Sequences side by side, int64 ``[sequences, tokens]`` each. Rows are independent: cut it along dimension 0.

    Attributes:
        labels: the token after each input, or ``IGNORED``.
        position_ids: begin at 0 with every document, where documents do not see each other; None: 0 to tokens − 1.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None

    @property
    def counted(self) -> int:
        """Labels that count."""
        return int((self.labels != IGNORED).sum())

    def rows(self, start: int, end: int) -> Batch:
        """Sequences ``start`` to ``end``."""
        return Batch(*(None if part is None else part[start:end] for part in self))  # pyright: ignore[reportArgumentType]

    def to(self, device: torch.device) -> Batch:
        """A copy on ``device``."""
        return Batch(*(None if part is None else part.to(device) for part in self))  # pyright: ignore[reportArgumentType]


class TokenWindows:
    """Windows of ``seq_len`` tokens from a row of tokens (memory-mapped), each token a label exactly once.

    Window i has the inputs ``[i*seq_len, (i+1)*seq_len)`` and as labels the same range shifted by one. The windows of
    a mixture are numbered one source after the other, and none has tokens of two.

    Args:
        shares: of a mixture, tokens and weight of every source.
        flags: the byte beside every token, see :mod:`poetx.data.packing`; None: all count.
        packed: whether documents lie in windows and do not see each other.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        seq_len: int,
        shares: Sequence[Sequence[float]] = (),
        flags: np.ndarray | None = None,
        packed: bool = False,
    ) -> None:
        self.tokens = tokens
        self.seq_len = seq_len
        self.flags, self.packed = flags, packed
        sizes = [int(size) for size, _ in shares] or [len(tokens)]
        counts = [window_count(size, seq_len) for size in sizes]
        self._first_tokens = [0, *accumulate(sizes)]
        self._first_windows = [0, *accumulate(counts)]
        #: What :func:`poetx.data.sampler.batch_windows` takes.
        self.order: int | list[tuple[int, float]] = (
            [(count, weight) for count, (_, weight) in zip(counts, shares, strict=True)] if shares else counts[0]
        )

    def __len__(self) -> int:
        return self._first_windows[-1]

    def start(self, window: int) -> int:
        """The place of a window's first token."""
        source = bisect_right(self._first_windows, window) - 1
        return self._first_tokens[source] + (window - self._first_windows[source]) * self.seq_len

    def batch(self, windows: list[int]) -> Batch:
        """These windows, on the CPU."""
        import torch

        length = self.seq_len
        rows = np.stack([self.tokens[at : at + length + 1] for at in map(self.start, windows)]).astype(np.int64)
        both = torch.from_numpy(rows)
        inputs, labels, positions = both[:, :-1].contiguous(), both[:, 1:].contiguous(), None
        if self.flags is not None:
            flags = np.stack([self.flags[at : at + length + 1] for at in map(self.start, windows)])
            labels = torch.where(torch.from_numpy(flags[:, 1:] & LABEL != 0), labels, IGNORED)
            if self.packed:
                place = np.broadcast_to(np.arange(length), (len(windows), length))
                starts = np.maximum.accumulate(np.where(flags[:, :-1] & START, place, 0), axis=1)
                positions = torch.from_numpy(place - starts)
        return Batch(inputs, labels, positions)

    def counted(self, windows: Sequence[int]) -> int:
        """Labels that count in these windows."""
        if self.flags is None:
            return len(windows) * self.seq_len
        spans = ((at + 1, at + self.seq_len + 1) for at in map(self.start, windows))
        return sum(int((self.flags[first:end] & LABEL).sum()) for first, end in spans)

    def prompts(self, count: int) -> list[tuple[list[int], list[int]]]:
        """Beginnings to go on from, with their answers where they have any.

        Of conversations in windows the first ones up to their first answer; of texts 16 tokens at places spread evenly.
        """
        if not self.packed or self.flags is None:
            return [(self.tokens[at : at + 16].tolist(), []) for at in map(self.start, evenly_spread(count, len(self)))]
        flags = np.asarray(self.flags[: 1 << 16])
        found = []
        for begin in np.flatnonzero(flags & START)[:-1]:
            labels = flags[begin:] & LABEL != 0
            first = int(np.argmax(labels))
            length = int(np.argmin(labels[first:])) if labels[first:].any() else 0
            if 1 < first < self.seq_len and not (flags[begin + 1 : begin + first + 1] & START).any():
                own = self.tokens[begin : begin + first + length].tolist()
                found.append((own[:first], own[first:]))
            if len(found) == count:
                break
        return found or [(self.tokens[:16].tolist(), [])]

    def prompt(self) -> list[int]:
        """The first document up to its first answer; without answers, the first 16 tokens."""
        end = 16 if self.flags is None else max(1, int(np.argmax(self.flags[: 1 << 16] & LABEL)))
        return self.tokens[:end].tolist()


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
        return self.directory / TOKENIZER

    @property
    def tokenizer_source(self) -> str | None:
        """The directory of this data where it has a tokenizer's other settings, too."""
        return str(self.directory) if (self.directory / "tokenizer_config.json").is_file() else None


def token_files(labelled: bool) -> tuple[str, ...]:
    """Names of the files of tokens and of the bytes beside them."""
    return PARTS + tuple(f"{part}-flags" for part in PARTS if labelled)


def window_count(tokens: int, seq_len: int) -> int:
    """Whole windows in ``tokens`` tokens: the last label needs one token more than the inputs."""
    return max(0, (tokens - 1) // seq_len)


def fingerprint(digests: Iterable[str], shares: Sequence[Sequence[float]]) -> str:
    """The identity of data from the sha256 of each part's file, in order, and the shares of a mixture."""
    return hashlib.sha256(("".join(digests) + (json.dumps(shares) if shares else "")).encode()).hexdigest()


def write_meta(directory: Path, meta: DataMeta) -> None:
    """Write ``meta.json`` beside the files that it is about."""
    document = meta.written() | {"checksum": meta.checksum(directory / TOKENIZER)}
    write_text(directory / META, json.dumps(document, indent=2))


def verified_meta(directory: Path) -> DataMeta:
    """``meta.json`` after every file has been hashed and found to be as it was written: about a second a GB.

    Raises:
        UserError: a file is missing or damaged, or the directory is of another version of poetx.
    """
    facts = read_json(directory / META)
    checksum = facts.pop("checksum", None)
    try:
        needed = {field.name for field in fields(DataMeta) if field.default is MISSING}
        known = {field.name for field in fields(DataMeta)}
        if checksum is None or not needed <= facts.keys() <= known or facts["format"] != FORMAT:
            raise UserError(f"{directory / META}: of another version of poetx")
        meta = DataMeta(**facts)
        if meta.checksum(directory / TOKENIZER) != checksum:
            raise UserError(f"{directory}: {META} or {TOKENIZER} is damaged")
        sums = (sha256(directory / f"{name}.bin") for name in token_files(meta.labelled))
        if fingerprint(sums, meta.shares) != meta.fingerprint:
            raise UserError(f"{directory}: its token files are damaged")
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    return meta


def open_tokens(directory: Path, meta: DataMeta, *, seq_len: int) -> PreparedData:
    """Map the token files of a directory whose ``meta`` has been verified."""
    train, validation = (
        TokenWindows(
            np.memmap(directory / f"{name}.bin", dtype=meta.dtype, mode="r"),
            seq_len=seq_len,
            shares=meta.shares if name == "train" else (),
            flags=np.memmap(directory / f"{name}-flags.bin", dtype=np.uint8, mode="r") if meta.labelled else None,
            packed=bool(meta.packed),
        )
        for name in PARTS
    )
    return PreparedData(directory, meta, train, validation)
