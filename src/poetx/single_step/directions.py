"""The direction of the "ortho" rule: momentum made orthogonal."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Five steps of the quintic Newton-Schulz iteration with the coefficients of Muon (Jordan et al. 2024): every singular
# value ends near 1, between 0.7 and 1.2. Odd polynomials of a skew-symmetric matrix are skew-symmetric.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
#: No singular value of what :func:`orthogonalise` returns is larger.
LARGEST_SINGULAR_VALUE = 1.3


@functools.cache
def _cpu_has_bfloat16_tiles() -> bool:
    """Whether this CPU multiplies bfloat16 tiles (AMX); without them bfloat16 is slower than float32."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def orthogonalise(X_KBB: Tensor) -> Tensor:
    """The nearest skew-symmetric orthogonal-like matrices: five Newton–Schulz steps, antisymmetrised again.

    In bfloat16 where that is several times faster; the singular values it gives are rough in any precision.
    """
    a, b, c = _NEWTON_SCHULZ
    X = X_KBB / X_KBB.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    if X.dtype == torch.float32 and (X.is_cuda or (X.device.type == "cpu" and _cpu_has_bfloat16_tiles())):
        X = X.bfloat16()
    for _ in range(5):
        A = torch.bmm(X, X.transpose(1, 2))
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    X = X.to(X_KBB.dtype)
    return (X - X.transpose(1, 2)) / 2
