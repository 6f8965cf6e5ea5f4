"""Rotating the weight instead of the activations: the same layer with fewer and larger moves where tokens are many.

A rotation of N tokens costs 2·N·b multiply-adds a feature, the same rotation of W' [m, n] costs m (or n) instead of N,
and its permutation moves whole rows of a matrix instead of single numbers:

    T_in  = Π_inᵀ  (G_in  W'ᵀ)  [n, m]     b  = x · T_in             the forward of the input's side
    T_out = Π_outᵀ (G_outᵀ W')  [m, n]     da = g · T_out            the backward of the output's side
    T     = T_in with G_out applied, too   y  = x · T                where nothing in between has to be kept

and with the gradient D = gᵀ x of such a weight, both sides permuted, neither activations nor inverses are needed:

    dG_in,k  = D[:, k]ᵀ (G_outᵀ W')[:, k];   dG_out,k = (W' G_inᵀ)[k, :] · D[k, :]ᵀ

Only where the product is float32 or float64: a rotated weight rounded to bfloat16 loses turns that are smaller than
half a unit in its last place, every token the same ones, where rounded activations lose them at random.
"""

from __future__ import annotations

import torch
from torch import Tensor

from poetx.ops.block_diagonal import add_block_outer_, gather, slices, zeros_like_blocks
from poetx.ops.library import device_type

#: Of the rows that are rotated before they are put in their places: the second-level cache of two current cores.
_BYTES = 4 << 20


def cheaper(x_NF: Tensor, rows: int) -> bool:
    """Whether to rotate a weight of ``rows`` vectors rather than the tokens of x: a matter of shape and dtype alone."""
    return device_type(x_NF) == "cpu" and x_NF.dtype in (torch.float32, torch.float64) and x_NF.shape[0] >= rows


def gradient_cheaper(x_NF: Tensor, out_features: int, block_size: int) -> bool:
    """Whether one more product, D = gᵀ x, costs less than gathers, rotations and outer products of all tokens.

    In multiply-adds of a large product: a block product takes 1.5 for each, and moving one number takes 128 (two
    cores with AVX-512; benchmarks/results/layer.jsonl has shapes on either side of the line).
    """
    N, n, m = x_NF.shape[0], x_NF.shape[1], out_features
    if not cheaper(x_NF, max(m, n)):
        return False
    tokens = N * (m + n) * (3 * block_size + 2 * 128)
    weight = N * m * n + m * n * (8 * block_size + 2 * 128)
    return weight < tokens


def turned(W_FC: Tensor, G_KBB: Tensor, perm: Tensor | None = None) -> Tensor:
    """``Diag(G_1 … G_K) · W``, contiguous [F, C]; the last block is cut where F ends.

    With ``perm`` its rows are put where they belong outside the blocks: V with ``V[perm] = Diag(G) · W``.
    """
    out = torch.empty(W_FC.shape, dtype=W_FC.dtype, device=W_FC.device)
    block_size = G_KBB.shape[-1]
    full, rest = divmod(W_FC.shape[0], block_size)
    blocks = W_FC[: full * block_size].unflatten(0, (full, block_size))
    if perm is None:
        if full:
            torch.bmm(G_KBB[:full], blocks, out=out[: full * block_size].view(blocks.shape))
    else:
        perm = perm.long()
        step = max(1, _BYTES // (block_size * W_FC.shape[1] * W_FC.element_size()))
        for first in range(0, full, step):  # a buffer in cache instead of a second whole matrix
            some = torch.bmm(G_KBB[:full][first : first + step], blocks[first : first + step])
            where = perm[first * block_size :][: some.shape[0] * block_size]
            out.index_copy_(0, where, some.flatten(0, 1))
    if rest:
        last = torch.mm(G_KBB[-1, :rest, :rest], W_FC[-rest:])
        if perm is None:
            out[-rest:] = last
        else:
            out.index_copy_(0, perm[-rest:], last)
    return out


def dense_transposed(weight: Tensor, G_in: Tensor, G_out: Tensor, perm_in: Tensor, perm_out: Tensor) -> Tensor:
    """The weight that the layer acts with, native and transposed, [n, m]: ``y = x · T``."""
    return turned(turned(weight, G_out.transpose(1, 2), perm_out).T, G_in, perm_in)


def _permuted(W_FC: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``W[rows][:, columns]``, slice by slice: no second whole matrix, and the slice is still in cache."""
    out = torch.empty_like(W_FC)
    for some in slices(W_FC):
        gather(W_FC.index_select(0, rows[some]), columns, out=out[some])
    return out


def backward_from_weight_gradient(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    G_in: Tensor,
    G_out: Tensor,
    perm_in: Tensor,
    perm_out: Tensor,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dG_in, dG_out) without anything of the forward but x: through D = gᵀ x, W'·G_inᵀ and G_outᵀ·W'."""
    D = _permuted(g.T @ x, perm_out, perm_in)
    dG_in, dG_out = zeros_like_blocks(G_in), zeros_like_blocks(G_out)
    add_block_outer_(dG_out, turned(weight.T, G_in), D.T)
    half = turned(weight, G_out.transpose(1, 2))
    add_block_outer_(dG_in, D, half)
    del D
    if not needs_dx:
        return x.new_empty(0), dG_in, dG_out
    half = torch.empty_like(half).index_copy_(0, perm_out.long(), half)
    return g @ turned(half.T, G_in, perm_in).T, dG_in, dG_out
