"""Newton–Schulz: the orthogonal matrix near a momentum, for many blocks at once."""

from __future__ import annotations

import torch
from torch import Tensor

from poetx.ops.fold import without_autocast
from poetx.ops.library import device_type
from poetx.ops.single_step import block_peaks

# Five steps of the quintic Newton-Schulz iteration with the coefficients of Muon (Jordan et al. 2024): every singular
# value ends near 1, between 0.7 and 1.2. Odd polynomials of a skew-symmetric matrix are skew-symmetric.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
#: No singular value of what :func:`orthogonalize` returns is larger.
LARGEST_SINGULAR_VALUE = 1.3


def orthogonalize(X_KBB: Tensor, *, skew: bool = True) -> Tensor:
    """The nearest orthogonal-like matrices: five Newton–Schulz steps; of skew-symmetric ones, antisymmetrised again.

    Blocks of zeros stay zero; no finite block gives anything else than finite numbers, however large or small.
    On a GPU in bfloat16, several times faster, which what is not skew comes back in: the singular values are rough in
    any precision.
    """
    a, b, c = _NEWTON_SCHULZ
    # By an exact power of two, near 1 before anything is squared; blocks of subnormal numbers count as zero.
    peaks = block_peaks(X_KBB)
    empty = peaks < torch.finfo(X_KBB.dtype).tiny
    power = torch.ldexp(torch.ones_like(peaks), torch.frexp(peaks.masked_fill(empty, 1.0)).exponent - 1)
    X = (X_KBB / power[:, None, None]).masked_fill_(empty[:, None, None], 0.0)
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    if X.dtype == torch.float32 and device_type(X) == "cuda":
        X = X.bfloat16()
    with without_autocast():
        for _ in range(5):
            A = torch.bmm(X, X.transpose(1, 2))
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    if not skew:
        return X
    X = X.to(X_KBB.dtype)
    return (X - X.transpose(1, 2)) / 2
