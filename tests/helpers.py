"""Shared by all tests: one tolerance table, and random rotations."""

from __future__ import annotations

import torch
from torch import Tensor

from poetx.ops.cayley import packed_size

#: Largest relative error (norm of the difference over norm of the truth) by dtype; never looser in CI.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def relative_error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-300))


def random_skew(
    size: int, block_size: int, *, angle: float = 0.3, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    """Packed skew blocks [⌈size/b⌉, P] whose largest eigenvalue is about ``angle``; ragged entries zero."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-size // block_size)
    q = torch.randn(blocks, packed_size(block_size), generator=generator, dtype=torch.float64)
    q *= angle / (2 * max(1, block_size - 1) ** 0.5)
    rows, cols = torch.triu_indices(block_size, block_size, 1)
    rest = size - (blocks - 1) * block_size
    q[-1, (rows >= rest) | (cols >= rest)] = 0
    return q.to(dtype)
