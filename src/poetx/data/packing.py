"""Documents side by side in windows, so that none reaches over a window's end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: Bits of the byte beside every token: whether it counts as a label, and whether a document begins with it.
LABEL, START = 1, 2
_OPEN = 32  # windows that wait for a document that fits


@dataclass
class Packer:
    """Lays documents into windows of ``size`` tokens: each into the fullest of a few open windows that has room.

    Attributes:
        padding: the token that fills windows up.
        cut, dropped: documents whose end did not fit, and those left out because no label of them would count.
    """

    size: int
    padding: int
    cut: int = 0
    dropped: int = 0
    tokens: int = 0
    _open: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _text: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, ids: np.ndarray, labels: np.ndarray | None, *, ends: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Take a document and yield the windows that are full: tokens and their bytes.

        Args:
            labels: which tokens count; a document longer than a window is then cut. None: a piece of text, of which all
                count; it goes on in the next window.
            ends: whether the text ends with this piece.
        """
        if labels is not None:
            flags = labels.astype(np.uint8) * LABEL
            self.cut += len(ids) > self.size
            ids, flags = ids[: self.size].copy(), flags[: self.size]
            if flags[1:].any():
                yield from self._place(ids, flags)
            else:
                self.dropped += 1
            return
        if self._text is not None:
            ids = np.concatenate([self._text[0], ids])
        while len(ids) >= self.size or (ends and len(ids)):
            piece, ids = ids[: self.size], ids[self.size :]
            yield from self._place(piece, np.full(len(piece), LABEL, np.uint8))
        self._text = None if ends else (ids, ids)

    def flush(self, *, end: bool = True) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield all windows that are open, and at the ``end`` the one token more that the last window's labels need."""
        for ids, flags in self._open:
            yield self._filled(ids, flags)
        self._open.clear()
        if end:
            yield np.array([self.padding]), np.array([START], np.uint8)

    def state(self) -> dict[str, Any]:
        """Plain values from which :meth:`restore` goes on."""
        rows = [[ids.tolist(), flags.tolist()] for ids, flags in self._open]
        text = None if self._text is None else self._text[0].tolist()
        return {"cut": self.cut, "dropped": self.dropped, "tokens": self.tokens, "open": rows, "text": text}

    def restore(self, state: dict[str, Any]) -> None:
        """Be as the packer was whose :meth:`state` this is."""
        self.cut, self.dropped, self.tokens = state["cut"], state["dropped"], state["tokens"]
        self._open = [(np.array(ids, np.int64), np.array(flags, np.uint8)) for ids, flags in state["open"]]
        text = None if state["text"] is None else np.array(state["text"], np.int64)
        self._text = None if text is None else (text, text)

    def _place(self, ids: np.ndarray, flags: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        flags[0] = START  # nothing before it predicts it
        self.tokens += len(ids)
        room = [
            (len(known), number) for number, (known, _) in enumerate(self._open) if len(known) + len(ids) <= self.size
        ]
        if room:
            known, known_flags = self._open.pop(max(room)[1])
            ids, flags = np.concatenate([known, ids]), np.concatenate([known_flags, flags])
        elif len(self._open) == _OPEN:
            fullest = max(range(_OPEN), key=lambda number: len(self._open[number][0]))
            yield self._filled(*self._open.pop(fullest))
        if len(ids) == self.size:
            yield ids, flags
        else:
            self._open.append((ids, flags))

    def _filled(self, ids: np.ndarray, flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rest = self.size - len(ids)
        bits = np.zeros(rest, np.uint8)
        bits[:1] = START
        return np.concatenate([ids, np.full(rest, self.padding)]), np.concatenate([flags, bits])
