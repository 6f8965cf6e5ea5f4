"""The layer's two modes against the reference and against what they claim to save."""

import pytest
import torch

from helpers import TOLERANCE, random_skew, relative_error
from poetx.ops import reference
from poetx.ops.block_diagonal import _SLICE_BYTES
from poetx.ops.cayley import cayley
from poetx.ops.linear import poet_linear
from poetx.ops.reference import EXACT
from poetx.ops.side import sides
from poetx.ops.stored import Stored

#: tokens, in, out, b_in, b_out: divisible, ragged, prime, larger than the layer, width one, one token; and so many
#: tokens that *mem* rotates the weight.
SHAPES = [
    (9, 8, 12, 4, 4),
    (5, 13, 10, 4, 6),
    (7, 11, 7, 5, 7),
    (6, 10, 6, 10, 6),
    (4, 1, 5, 1, 3),
    (1, 6, 1, 4, 1),
    (9, 8, 12, 12, 4),
    (30, 13, 10, 4, 6),
    (30, 8, 12, 12, 4),
    (40, 11, 7, 5, 7),
    (20, 6, 1, 4, 1),
    (50, 1, 5, 1, 3),
]


def problem(shape, *, dtype=torch.float64, bias=True, seed=0):
    tokens, n, m, block_in, block_out = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    rotation_dtype = torch.promote_types(dtype, torch.float32)
    inputs = {
        "x": draw(tokens, n).requires_grad_(),
        "q_in": random_skew(n, block_in, dtype=rotation_dtype, seed=1).requires_grad_(),
        "q_out": random_skew(m, block_out, dtype=rotation_dtype, seed=2).requires_grad_(),
        "bias": draw(m).requires_grad_() if bias else None,
    }
    frozen = {
        "weight": draw(m, n) / n**0.5,
        "perm_in": torch.randperm(n, generator=generator).int(),
        "perm_out": torch.randperm(m, generator=generator).int(),
        "block_size_in": block_in,
        "block_size_out": block_out,
    }
    return inputs, frozen


def run(inputs, frozen, *, order, mode, gathers=True):
    weight = frozen["weight"][frozen["perm_out"].long()][:, frozen["perm_in"].long()]
    both = sides(
        (inputs["q_in"], inputs["q_out"]),
        weight.shape[::-1],
        (frozen["block_size_in"], frozen["block_size_out"]),
        (frozen["perm_in"], frozen["perm_out"]) if gathers else (None, None),
    )
    return poet_linear(inputs["x"], Stored((weight,)), both, order=order, mode=mode, bias=inputs["bias"])


def gradients(y, inputs, seed=3):
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)
    wanted = {k: v for k, v in inputs.items() if v is not None and v.numel()}
    return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), g), strict=True))


@pytest.mark.parametrize("mode", ["fast", "mem"])
@pytest.mark.parametrize("order", [3, 7, EXACT])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_equal_the_reference(shape, bias, order, mode):
    inputs, frozen = problem(shape, bias=bias)
    expected = reference.poet_linear(**inputs, **frozen, order=order)
    y = run(inputs, frozen, order=order, mode=mode)
    assert relative_error(y, expected) < TOLERANCE[torch.float64]
    want = gradients(expected, inputs)
    for name, got in gradients(y, inputs).items():
        assert relative_error(got, want[name]) < TOLERANCE[torch.float64], name


@pytest.mark.parametrize("mode", ["fast", "mem"])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_of_neighbours_equal_the_reference_without_a_permutation(shape, mode):
    inputs, frozen = problem(shape, bias=True)
    m, n = frozen["weight"].shape
    frozen |= {"perm_in": torch.arange(n).int(), "perm_out": torch.arange(m).int()}
    expected = reference.poet_linear(**inputs, **frozen, order=3)
    y = run(inputs, frozen, order=3, mode=mode, gathers=False)
    assert relative_error(y, expected) < TOLERANCE[torch.float64]
    want = gradients(expected, inputs)
    for name, got in gradients(y, inputs).items():
        assert relative_error(got, want[name]) < TOLERANCE[torch.float64], name


@pytest.mark.parametrize("mode", ["fast", "mem"])
@pytest.mark.parametrize(("order", "tokens"), [(3, 3), (7, 3), (EXACT, 3), (3, 8)])
def test_gradcheck_ragged_with_bias(order, tokens, mode):
    inputs, frozen = problem((tokens, 7, 5, 3, 4))

    def function(x, q_in, q_out, bias):
        here = {"x": x, "q_in": q_in, "q_out": q_out, "bias": bias}
        return run(here, frozen, order=order, mode=mode)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("mode", ["fast", "mem"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [20, 64])
def test_lower_precision_stays_near_the_float64_reference(tokens, dtype, mode):
    inputs, frozen = problem((tokens, 24, 40, 8, 16), dtype=dtype)
    y = run(inputs, frozen, order=3, mode=mode)
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    expected = reference.poet_linear(**exact, **(frozen | {"weight": frozen["weight"].double()}), order=3)
    assert relative_error(y, expected) < TOLERANCE[dtype]
    want = gradients(expected, exact)
    for name, got in gradients(y, inputs).items():
        assert got.dtype == inputs[name].dtype
        assert relative_error(got, want[name]) < 2 * TOLERANCE[dtype], name


@pytest.mark.parametrize("mode", ["fast", "mem"])
def test_many_slices_equal_one(mode, monkeypatch):
    inputs, frozen = problem((200, 13, 10, 4, 6))
    y = run(inputs, frozen, order=3, mode=mode)
    whole = {"y": y} | gradients(y, inputs)
    monkeypatch.setitem(_SLICE_BYTES, "cpu", 1)  # 64 tokens a slice: 64 + 64 + 64 + 8
    y = run(inputs, frozen, order=3, mode=mode)
    for name, got in ({"y": y} | gradients(y, inputs)).items():
        assert relative_error(got, whole[name]) < TOLERANCE[torch.float64], name


@pytest.mark.parametrize("mode", ["fast", "mem"])
def test_strided_input_and_gradient(mode):
    tokens = 9
    inputs, frozen = problem((tokens, 8, 12, 4, 4))
    wide = torch.randn(tokens, 16, dtype=torch.float64)
    inputs["x"] = wide[:, ::2].requires_grad_()
    y = run(inputs, frozen, order=3, mode=mode)
    expected = reference.poet_linear(**inputs, **frozen, order=3)
    g = torch.randn(12, tokens, dtype=torch.float64).T
    for got, want in zip(
        torch.autograd.grad(y, [inputs["x"], inputs["q_in"]], g),
        torch.autograd.grad(expected, [inputs["x"], inputs["q_in"]], g),
        strict=True,
    ):
        assert relative_error(got, want) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("mode", ["fast", "mem"])
def test_no_gradient_for_an_input_that_needs_none(mode):
    inputs, frozen = problem((9, 8, 12, 4, 4))
    inputs["x"] = inputs["x"].detach()
    y = run(inputs, frozen, order=3, mode=mode)
    want = torch.autograd.grad(reference.poet_linear(**inputs, **frozen, order=3).sum(), inputs["q_in"])[0]
    assert relative_error(torch.autograd.grad(y.sum(), inputs["q_in"])[0], want) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("mode", ["fast", "mem"])
def test_no_tokens(mode):
    inputs, frozen = problem((0, 8, 12, 4, 4))
    y = run(inputs, frozen, order=3, mode=mode)
    assert y.shape == (0, 12)
    assert all(grad.eq(0).all() for grad in gradients(y, inputs).values())


def saved_tensors(inputs, frozen, mode):
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(inputs, frozen, order=3, mode=mode)
    return y, saved


def test_mem_saves_the_input_and_parameters_only():
    inputs, frozen = problem((50, 24, 40, 8, 8), dtype=torch.float32)
    _, saved = saved_tensors(inputs, frozen, "mem")
    known = {inputs[k].data_ptr() for k in ("x", "q_in", "q_out")} | {
        frozen[k].data_ptr() for k in ("perm_in", "perm_out")
    }
    fresh = [t for t in saved if t.data_ptr() not in known]
    assert [tuple(t.shape) for t in fresh] == [(40, 24)]  # W', made by this test from the native weight
    assert all(t.shape != (50, 40) for t in saved), "something of size tokens x out_features"
    assert all(t.ndim < 3 for t in saved), "something of size blocks x b x b"


def test_fast_saves_what_it_says():
    inputs, frozen = problem((50, 24, 40, 8, 8), dtype=torch.float32)
    _, saved = saved_tensors(inputs, frozen, "fast")
    shapes = sorted(tuple(t.shape) for t in saved if t.is_floating_point())
    q_in, q_out = tuple(inputs["q_in"].shape), tuple(inputs["q_out"].shape)
    assert shapes == sorted([(50, 24), (50, 40), (40, 24), (3, 8, 8), (5, 8, 8), q_in, q_out])


def test_autocast_does_not_reach_the_parametrization():
    q = random_skew(16, 8, dtype=torch.float32)
    expected = cayley(q, size=16, block_size=8, order=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cayley(q, size=16, block_size=8, order=3), expected)
