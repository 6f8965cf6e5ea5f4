"""The single step's functions: gradients at the identity, the fold, and block outer products."""

import pytest
import torch

from helpers import TOLERANCE, random_skew, relative_error
from poetx.ops.block_diagonal import block_outer_products
from poetx.ops.cayley import cayley, cayley_delta, exact_delta
from poetx.ops.reference import EXACT, block_diagonal
from poetx.ops.single_step import map_gradient, skew_gradient
from poetx.ops.single_step_update import fold_side

SIZES = [(12, 8, 4), (7, 13, 5), (10, 6, 16), (1, 9, 4)]


def dense_rotation(q, size, block_size):
    """Diag(G) as a [size, size] matrix."""
    return block_diagonal(cayley(q, size=size, block_size=block_size, order=EXACT), size)


@pytest.mark.parametrize(("m", "n", "b"), SIZES)
def test_gradient_at_the_identity_is_autograds(m, n, b):
    W = torch.randn(m, n, dtype=torch.float64, requires_grad=True)
    x, target = torch.randn(20, n, dtype=torch.float64), torch.randn(20, m, dtype=torch.float64)

    def loss(weight):
        return (x @ weight.T - target).tanh().square().sum()

    (dW,) = torch.autograd.grad(loss(W), W)
    for side, size in (("out", m), ("in", n)):
        block = min(b, size)
        q = torch.zeros(-(-size // block), block * (block - 1) // 2, dtype=torch.float64, requires_grad=True)
        rotation = dense_rotation(q, size, block)
        weight = rotation @ W.detach() if side == "out" else W.detach() @ rotation
        got = skew_gradient(W.detach(), dW, side, block)
        if q.numel():
            assert relative_error(got, torch.autograd.grad(loss(weight), q)[0]) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(("m", "n", "b"), SIZES)
def test_gradient_of_a_free_map_is_autograds(m, n, b):
    W = torch.randn(m, n, dtype=torch.float64)
    dW = torch.randn(m, n, dtype=torch.float64)  # of a loss that is linear in W: ⟨dW, W⟩
    for side, size in (("out", m), ("in", n)):
        block = min(b, size)
        blocks = torch.zeros(-(-size // block), block, block, dtype=torch.float64, requires_grad=True)
        E = block_diagonal(blocks, size)
        moved = E @ W if side == "out" else W @ E
        got = map_gradient(W, dW, side, block)
        assert relative_error(got, torch.autograd.grad((dW * moved).sum(), blocks)[0]) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(("m", "n", "b"), SIZES)
def test_a_fold_is_the_product_with_the_rotation(m, n, b):
    W = torch.randn(m, n, dtype=torch.float64)
    for side, size in (("out", m), ("in", n)):
        block = min(b, size)
        q = random_skew(size, block)
        rotation = dense_rotation(q, size, block)
        want = rotation @ W if side == "out" else W @ rotation
        E = cayley_delta(q, size=size, block_size=block)
        got = torch.full_like(W, torch.nan)
        scale = torch.full((E.shape[0],), 0.5, dtype=torch.float64)
        squares = fold_side(W, E, side, got, scale=scale)
        assert relative_error(got, 0.5 * want) < TOLERANCE[torch.float64]
        wanted = [W.square().sum().item(), 0.25 * want.square().sum().item()]
        assert squares.tolist() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("norm", [1e-3, 0.05, 0.3, 0.59])
def test_a_bounded_delta_is_the_exact_one(norm):
    """The product is cut where its next factor rounds to the identity: nothing that float64 holds is missing."""
    Q = torch.randn(2, 12, 12, dtype=torch.float64)
    Q = Q - Q.mT
    Q *= norm / torch.linalg.matrix_norm(Q, 2)[:, None, None]
    assert relative_error(exact_delta(Q, norm), exact_delta(Q)) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "block_size"), [(96, 32), (128, 64), (160, 80), (100, 32), (20, 64)])
def test_block_outer_products_are_the_blocks_of_the_whole_product(size, block_size, dtype):
    x, y = torch.randn(37, 2 * size, dtype=torch.float64).to(dtype).chunk(2, dim=1)  # rows with a gap between them
    got = block_outer_products(x, y, block_size)
    whole = torch.zeros(got.shape[0] * block_size, got.shape[0] * block_size, dtype=torch.float64)
    whole[:size, :size] = x.double().T @ y.double()
    want = torch.stack([whole[i : i + block_size, i : i + block_size] for i in range(0, size, block_size)])
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert relative_error(got, want) < TOLERANCE[got.dtype]
