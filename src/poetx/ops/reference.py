"""The mathematics of POET-X, written as the papers write it: the ground truth of every test.

Plain torch, autograd's own backward, any dtype (float64 in the tests), no speed. Letters: N tokens, m
out_features, n in_features, K blocks of B = block_size, P = B(B-1)/2 packed entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: ``order`` value that stands for the exact Cayley transform instead of a truncated Neumann series.
EXACT = -1


def unpack_skew(q_KP: Tensor, block_size: int) -> Tensor:
    """Skew-symmetric Q [K, B, B] from its strict upper triangle [K, P], row by row."""
    rows, cols = torch.triu_indices(block_size, block_size, 1, device=q_KP.device)
    Q_KBB = q_KP.new_zeros(q_KP.shape[0], block_size, block_size)
    Q_KBB[:, rows, cols] = q_KP
    return Q_KBB - Q_KBB.transpose(1, 2)


def cayley_neumann(Q_KBB: Tensor, order: int) -> Tensor:
    """``(I + Q)(I + Q + … + Q^k)``, k = ``order`` (POET-X eq. of the CNP); ``(I + Q)(I − Q)⁻¹`` if EXACT."""
    identity = torch.eye(Q_KBB.shape[-1], dtype=Q_KBB.dtype, device=Q_KBB.device)
    if order == EXACT:
        return torch.linalg.solve(identity - Q_KBB, identity + Q_KBB)
    power, series = identity.expand_as(Q_KBB), identity.expand_as(Q_KBB)
    for _ in range(order):
        power = power @ Q_KBB
        series = series + power
    return (identity + Q_KBB) @ series


def block_diagonal(G_KBB: Tensor, size: int) -> Tensor:
    """Diag(G_1 … G_K) as one [size, size] matrix; the last block is cut where ``size`` ends."""
    return torch.block_diag(*G_KBB)[:size, :size]


def rotation_of_blocks(q_KP: Tensor, size: int, block_size: int, order: int) -> Tensor:
    """``Diag(G_1 … G_K)`` [size, size] from packed q [K, P]."""
    Q = unpack_skew(q_KP, block_size)
    if rest := size % block_size:  # the last block ends there
        inside = torch.ones(Q.shape, dtype=torch.bool, device=Q.device)
        inside[-1, rest:], inside[-1, :, rest:] = False, False
        Q = Q * inside
    return block_diagonal(cayley_neumann(Q, order), size)


def rotation_matrix(q_KP: Tensor, perm: Tensor, block_size: int, order: int) -> Tensor:
    """``Πᵀ Diag(G_1 … G_K) Π``, acting on a row from the right, with Π given by ``x' = x[:, perm]``."""
    size = perm.numel()
    D = rotation_of_blocks(q_KP, size, block_size, order)
    Pi = torch.eye(size, dtype=D.dtype, device=D.device)[perm.long()]
    return Pi.T @ D @ Pi


def poet_linear(
    x: Tensor,
    weight: Tensor,
    q_in: Tensor,
    q_out: Tensor,
    perm_in: Tensor,
    perm_out: Tensor,
    block_size_in: int,
    block_size_out: int,
    order: int,
    bias: Tensor | None = None,
) -> Tensor:
    """``y = x · P · W0ᵀ · R + bias`` with ``weight`` = W0 [m, n] in its native frame, nothing folded into it.

    x [N, n] → y [N, m]. P and R are the input and output rotations; the bias is outside the rotation.
    """
    P = rotation_matrix(q_in, perm_in, block_size_in, order)
    R = rotation_matrix(q_out, perm_out, block_size_out, order)
    y = x @ P @ weight.T @ R
    return y if bias is None else y + bias
