"""CNP: the factored forms against the series as written, orthogonality, gradients."""

import pytest
import torch

from helpers import TOLERANCE, random_skew, relative_error
from poetx.ops import reference
from poetx.ops.cayley import cayley, cayley_delta, pack_skew, unpack_skew
from poetx.ops.reference import EXACT

ORDERS = [3, 7, EXACT]
SIZES = [(8, 4), (13, 4), (7, 7), (5, 2), (3, 1), (48, 16)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("size", "block_size"), SIZES)
def test_blocks_and_gradient_equal_the_series(size, block_size, order):
    q = random_skew(size, block_size, angle=0.7).requires_grad_()
    G = cayley(q, size=size, block_size=block_size, order=order)
    expected = reference.cayley_neumann(reference.unpack_skew(q, block_size), order)
    assert relative_error(G, expected) < TOLERANCE[torch.float64]
    weight = torch.randn_like(G)
    if rest := size % block_size:  # what lies beyond the end of the last block is the identity's, not q's
        weight[-1, rest:], weight[-1, :, rest:] = 0, 0
    if block_size > 1:
        got, want = (torch.autograd.grad((g * weight).sum(), q)[0] for g in (G, expected))
        assert relative_error(got, want) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("order", ORDERS)
def test_gradcheck(order):
    q = random_skew(7, 4, angle=0.7).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: cayley(q, size=7, block_size=4, order=order), q)


@pytest.mark.parametrize(("order", "power"), [(3, 4), (7, 8)])
def test_singular_values_are_one_minus_theta_to_the_power(order, power):
    theta = 0.3
    q = torch.tensor([[theta]], dtype=torch.float64)  # one 2 x 2 block: eigenvalues ±i·theta
    values = torch.linalg.svdvals(cayley(q, size=2, block_size=2, order=order))
    torch.testing.assert_close(values, torch.full_like(values, 1 - theta**power), rtol=0, atol=1e-14)


def test_exact_is_orthogonal():
    G = cayley(random_skew(32, 16, angle=2.0), size=32, block_size=16, order=EXACT)
    torch.testing.assert_close(G @ G.mT, torch.eye(16, dtype=G.dtype).expand_as(G), rtol=0, atol=1e-13)


@pytest.mark.parametrize("order", ORDERS)
def test_delta_is_blocks_minus_identity(order):
    q = random_skew(13, 4)
    E = cayley_delta(q, size=13, block_size=4, order=order)
    expected = cayley(q, size=13, block_size=4, order=order) - torch.eye(4, dtype=q.dtype)
    assert relative_error(E, expected) < TOLERANCE[torch.float64]


def test_delta_keeps_the_small_diagonal_that_blocks_round_away():
    q = random_skew(16, 16, angle=1e-3).float()
    want = cayley_delta(q.double(), size=16, block_size=16).diagonal(dim1=1, dim2=2)
    E = cayley_delta(q, size=16, block_size=16).diagonal(dim1=1, dim2=2)
    assert relative_error(E, want) < TOLERANCE[torch.float32]
    rounded = cayley(q, size=16, block_size=16, order=EXACT).diagonal(dim1=1, dim2=2) - 1
    assert relative_error(rounded, want) > 1e-3


def test_entries_beyond_a_ragged_end_have_no_effect_and_no_gradient():
    clean = random_skew(6, 4)
    rows, cols = torch.triu_indices(4, 4, 1)
    beyond = (rows >= 2) | (cols >= 2)
    q = clean.clone()
    q[1, beyond] = 0.7
    q.requires_grad_()
    G = cayley(q, size=6, block_size=4, order=3)
    assert torch.equal(G, cayley(clean, size=6, block_size=4, order=3))
    # A loss that sees what the layer sees: blocks cut where the features end.
    seen = torch.zeros_like(G)
    seen[0], seen[1, :2, :2] = 1, 1
    (grad,) = torch.autograd.grad((G * seen * torch.randn_like(G)).sum(), q)
    assert grad[1, beyond].eq(0).all()
    assert grad[1, ~beyond].ne(0).all()
    assert grad[0].ne(0).all()


def test_pack_is_the_adjoint_of_unpack():
    q, M = torch.randn(3, 10, dtype=torch.float64), torch.randn(3, 5, 5, dtype=torch.float64)
    left = (unpack_skew(q, 15, 5) * M).sum()
    torch.testing.assert_close(left, (q * pack_skew(M, 15)).sum())


def test_low_precision_parameters_are_computed_in_float32():
    q = random_skew(8, 4, dtype=torch.bfloat16)
    G = cayley(q, size=8, block_size=4, order=3)
    assert G.dtype == torch.float32
    assert relative_error(G, cayley(q.double(), size=8, block_size=4, order=3)) < TOLERANCE[torch.float32]


def test_cached_index_survives_fake_and_inference_modes():
    from torch._subclasses import FakeTensorMode

    size, entries = 43, 903  # of no other test, so that the first call happens inside the modes
    for _ in range(2):  # and the second one after a real one
        with FakeTensorMode():
            unpack_skew(torch.zeros(1, entries), size, size)
        with torch.inference_mode():
            unpack_skew(torch.zeros(1, entries), size, size)
        q = torch.zeros(1, entries, requires_grad=True)
        unpack_skew(q, size, size).sum().backward()
        assert q.grad is not None
