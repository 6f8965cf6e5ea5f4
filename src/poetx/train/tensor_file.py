"""Safetensors files, written one tensor after another, and read by each rank as far as it keeps what is there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from poetx.distributed.rows import own_part

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def by_size(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Wider values first, so that each tensor in a file begins where its dtype may."""
    return dict(sorted(tensors.items(), key=lambda entry: (-entry[1].itemsize, entry[0])))


def save_tensors(file: Path, tensors: Mapping[str, Tensor], whole: Iterator[Tensor]) -> None:
    """Write what ``whole`` yields of ``tensors``, which are sorted :func:`by_size`, and perhaps sharded.

    Raises:
        OSError: the file cannot be written.
    """
    header, place = {}, 0
    for name, tensor in tensors.items():
        end = place + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in zip(tensors, whole):  # noqa: B905  # what comes after these is another file's
            out.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def read_tensors(file: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file; of those that belong to sharded ones, by name in ``like``, what this rank keeps."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return {name: own_part(tensors, name, like.get(name)) for name in tensors.keys()}  # noqa: SIM118
