"""Permutations of features on the GPU.

Reading single features at random costs a GPU a whole 32-byte sector each, so a row is read in order, shuffled on the
chip and written in order: 3.4 of the 4.3 TB/s that an H200 copies with, where ``index_select`` reaches 1.3
(``benchmarks/results/routes.jsonl``). The block products between two permutations are cuBLAS's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from poetx.ops.triton.tuning import ceil_div, launch, power_of_2


@triton.jit
def permute_kernel(x, source, out, N, F, x_row, x_column, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """out = x[:, source], whole rows at a time: memory is read and written in order, the shuffle is on the chip."""
    column = tl.arange(0, WIDTH)
    mask = column < F
    index = tl.load(source + column, mask=mask, other=0)
    for turn in range(ROWS):
        n = (tl.program_id(0) * ROWS + turn).to(tl.int64)
        row = tl.load(x + n * x_row + column * x_column, mask=mask & (n < N), other=0.0)
        tl.store(out + n * F + column, tl.gather(row, index, 0), mask=mask & (n < N))


@triton.jit
def inverse_kernel(perm, out, F, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + tl.load(perm + i, mask=i < F, other=0), i, mask=i < F)


#: Widest row, in elements, that :func:`permute` shuffles in shared memory, by bytes an element.
_WIDEST_ROW = {2: 32768, 4: 16384}


def permute(x_NF: Tensor, source: Tensor, out: Tensor | None = None) -> Tensor:
    """``x[:, source]``, contiguous; any dtype of 2 or 4 bytes, rows of at most 64 KiB."""
    N, F = x_NF.shape
    out = torch.empty(N, F, dtype=x_NF.dtype, device=x_NF.device) if out is None else out
    width = max(16, power_of_2(F))
    rows = max(1, min(8, N // 512))
    settings = {"ROWS": rows, "WIDTH": width, "num_warps": 4 if width <= 2048 else 8}
    launch(permute_kernel, (ceil_div(N, rows),), x_NF, source, out, N, F, *x_NF.stride(), **settings)
    return out


def can_permute(x_NF: Tensor, perm: Tensor) -> bool:
    """Whether ``perm`` permutes the columns of x and a row fits into shared memory for :func:`permute`."""
    return x_NF.shape[1] == perm.numel() <= _WIDEST_ROW.get(x_NF.element_size(), 0)


def inverse(perm: Tensor) -> Tensor:
    """The permutation that undoes ``perm``, same dtype, in one launch."""
    out, size = torch.empty_like(perm), 1024
    launch(inverse_kernel, (ceil_div(perm.numel(), size),), perm, out, perm.numel(), SIZE=size)
    return out
