"""Tell transformers that sequences are not packed, for which it waits for a GPU in every forward pass.

Without ``position_ids`` its models make their own, 0, 1, 2, …, and then look at the values whether they begin anew
within a sequence. Inside a CUDA graph they cannot, and compute attention with a mask of ones and zeros, slower and with
other bits.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_told = threading.local()


@contextlib.contextmanager
def one_document(model: nn.Module) -> Iterator[None]:
    """Forward passes inside, on this thread and without positions, take each sequence for one document.

    Of a model whose code is transformers' own: any other may make positions of its own.
    """
    before = getattr(_told, "so", False)
    _told.so = type(model).__module__.startswith("transformers.")
    if _told.so:
        _teach_transformers()
    try:
        yield
    finally:
        _told.so = before


@functools.cache
def _teach_transformers() -> None:
    """Let it ask here first; nothing where a version has no such questions.

    They are whether sequences are packed, and whether values can be looked at: where they cannot, inside a CUDA graph,
    it takes no sequence for one document. Nobody looks at any here, as there is no padding either.
    """
    from transformers import masking_utils

    for name, answer in (("find_packed_sequence_indices", None), ("is_tracing", False)):
        asked: Any = getattr(masking_utils, name, None)
        if asked is not None:
            setattr(masking_utils, name, _answered(asked, answer))


def _answered(asked: Callable[..., Any], answer: Any) -> Callable[..., Any]:
    @functools.wraps(asked)
    def ask(*args: Any, **kwargs: Any) -> Any:
        told = not torch.compiler.is_compiling() and getattr(_told, "so", False)
        return answer if told else asked(*args, **kwargs)

    return ask
