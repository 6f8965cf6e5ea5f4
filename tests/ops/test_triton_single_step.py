"""The kernels of the single step against their plain twins, in the interpreter, compiled, and on a GPU."""

from __future__ import annotations

import pytest
import torch

from helpers import relative_error
from poetx.ops.dispatch import use_kernels
from poetx.ops.fold import full_precision_products
from poetx.ops.single_step import _add_to_both_
from poetx.ops.single_step_update import decayed, fold_, norm_and_scale

pytest.importorskip("triton", reason="the kernels need triton, which exists for Linux only")
from kernel_helpers import compiled_for, interpreted, nan_filled, on_each_generation

on_each = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
#: rows, columns, block size, stored transposed: a block that is no power of two, a ragged end, several programs a row
SIZES = [(32, 20, 16, False), (28, 24, 24, True)]


def kernels_on(device: str):
    return interpreted() if device == "cpu" else use_kernels("triton")


def draw(*size, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def stack(m, n, b, side, *, dtype, device, transposed=False):
    """Two matrices, small blocks of E of which one is not touched, and what the rounding before left."""
    W = draw(2, *((n, m) if transposed else (m, n)), dtype=dtype, device=device)
    W = W.mT if transposed else W
    size = m if side == "out" else n
    blocks = 2 * -(-size // b)
    E = draw(blocks, b, b, device=device, seed=1) * 0.01
    touched = torch.ones(blocks, dtype=torch.bool, device=device)
    touched[1] = False
    E[1] = 0
    return W, E, touched, torch.tensor([0.75, 1.25], dtype=torch.float64, device=device)


def folded(W, E, touched, scale, side, seed=7):
    out = torch.empty_strided(W.shape, W.stride(), dtype=W.dtype, device=W.device).fill_(float("nan"))
    with full_precision_products():
        return out, fold_(W, E, side, out, touched=touched, scale=scale, seed=seed)


@on_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize(("m", "n", "b", "transposed"), SIZES)
def test_a_fold_is_its_twins(m, n, b, transposed, side, dtype, device):
    arguments = stack(m, n, b, side, dtype=dtype, device=device, transposed=transposed)
    with nan_filled(), kernels_on(device):
        got, squares = folded(*arguments, side)
    W, E, *rest = arguments
    want, wanted = folded(W.double(), E.double(), *rest, side)
    torch.testing.assert_close(squares.sum(2, dtype=torch.float64), wanted.sum(2), rtol=1e-6, atol=0)
    if dtype == torch.float32:
        assert relative_error(got, want) < 1e-6
        return
    # one of two neighbours of a value that is right to float32's bits, and as likely as it is near
    torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=0)
    exact = want == want.bfloat16()
    assert torch.equal(got[exact].double(), want[exact])
    unit = torch.ldexp(torch.ones_like(want), torch.frexp(want)[1] - 8)
    bias = ((got.double() - want) / unit).mean()
    assert abs(bias) < 4 * 0.41 / got.numel() ** 0.5


@on_each
def test_noise_is_of_the_seed_and_the_place_alone(device):
    """Of all rows in one block and in several, and of a wider weight, whose programs are more."""
    W = torch.ones(1, 32, 136, dtype=torch.bfloat16, device=device)
    found = []
    with kernels_on(device):
        for seed, b, columns in ((1, 32, 136), (1, 16, 136), (2, 16, 136)):
            E = torch.eye(b, device=device).expand(32 // b, b, b) * 2.0**-8
            touched, scale = torch.ones(len(E), dtype=torch.bool, device=device), torch.ones(1, device=device).double()
            found.append(folded(W[:, :, :columns], E, touched, scale, "out", seed)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    assert 0.4 < (found[0] > 1.002).float().mean() < 0.6  # half a unit is lost or a whole one gained
    assert found[0].float().std(2).min() > 0


def test_parts_of_e_lose_nothing_of_float32():
    """Of a weight of ones E's sums are written, to float32's rounding, though operands are narrow."""
    W = torch.ones(1, 32, 8, dtype=torch.bfloat16)
    E = draw(1, 32, 32)
    out = torch.empty(1, 32, 8)
    with interpreted():
        fold_(W, E, "out", out, touched=torch.ones(1, dtype=torch.bool), scale=torch.ones(1).double(), seed=0)
    assert relative_error(out, (1 + E.double().sum(2))[:, :, None].expand(1, 32, 8)) < 2e-7


@on_each
@pytest.mark.parametrize(("growth", "written"), [(0.0, 1.0), (0.02, 1.0), (0.02, 2.0)])
def test_the_norm_is_its_twins(growth, written, device):
    W, E, touched, scale = stack(20, 16, 16, "out", dtype=torch.float32, device=device)
    norm = written * scale * torch.linalg.vector_norm(W, dim=(1, 2), dtype=torch.float64) / (1 + growth * 4) ** 0.5
    with kernels_on(device):
        _, squares = folded(W, E, touched, scale, "out")
        got = norm_and_scale(squares, touched, norm, scale, step=5, growth=growth)
    want = norm_and_scale(squares.double(), touched, norm, scale, step=5, growth=growth)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    zeros = torch.zeros_like(squares)
    with kernels_on(device):
        got = norm_and_scale(zeros, touched, norm * 0, scale, step=5, growth=growth)
    assert got[1].tolist() == [1, 1]


@on_each
@pytest.mark.parametrize("upcoming", [None, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_momenta_decay_as_their_twins(dtype, upcoming, device):
    sizes = (1100, 700)
    momenta = draw(sum(sizes), dtype=dtype, device=device)
    with nan_filled(), kernels_on(device):
        got = decayed(momenta, sizes, upcoming, 0.95, (3, 4))
        again = decayed(momenta, sizes, upcoming, 0.95, (3, 4))
    want = decayed(momenta.double(), sizes, upcoming, 0.95, (3, 4))
    assert torch.equal(got, again)
    close = {"rtol": 1e-6 if dtype == torch.float32 else 2**-7, "atol": 0}
    torch.testing.assert_close(got.double(), want, **close)
    if upcoming is not None:
        assert torch.equal(got[1800:], got[:1100] if upcoming == 0 else got[1100:1800])


@on_each
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [None, "in", "out"])
def test_gradients_are_added_to_both_sides_and_none_that_is_not_finite(bad, dtype, packed, device):
    sizes, blocks = (43, 36), (24, 36)
    Ms = [draw(-(-size // b), b, b, device=device, seed=b) for size, b in zip(sizes, blocks, strict=True)]
    Ms[0][-1, 19:], Ms[0][-1, :, 19:] = 0, 0  # as beyond a ragged end
    if bad is not None:
        Ms[bad == "out"][-1, 2, 3] = float("nan")

    def add(both, momentum_dtype):
        shapes = [(len(M), b * (b - 1) // 2) if packed else M.shape for M, b in zip(Ms, blocks, strict=True)]
        momenta = [draw(*shape, dtype=dtype, device=device, seed=9).to(momentum_dtype) for shape in shapes]
        peaks = [torch.full((len(M),), 0.5, device=device) for M in Ms]
        noise = torch.tensor([5, 0])
        both(momenta, peaks, [M.clone() for M in Ms], sizes, noise)
        return momenta, peaks, noise.tolist()

    with kernels_on(device):
        got, peaks, noise = add(_add_to_both_, dtype)
        again, *_ = add(_add_to_both_, dtype)
    with use_kernels("torch"):
        want, wanted, _ = add(_add_to_both_, torch.float32)
    torch.testing.assert_close(peaks, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(again, got, rtol=0, atol=0)
    for sum_, value in zip(got, want, strict=True):
        rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (2**-7, 2**-10)
        torch.testing.assert_close(sum_.float(), value, rtol=rtol, atol=atol)
    assert noise == ([5, 1] if dtype == torch.bfloat16 else [5, 0])


@on_each_generation
def test_they_compile(capability):
    W, E, touched, scale = stack(256, 128, 256, "out", dtype=torch.bfloat16, device="cpu")
    with use_kernels("auto"), compiled_for(capability) as compiled, pytest.MonkeyPatch.context() as patch:
        for module in ("single_step", "single_step_update"):
            patch.setattr(f"poetx.ops.{module}.use_triton", lambda tensor, *args, **settings: True)
        squares = fold_(W, E, "out", torch.empty_like(W), touched=touched, scale=scale, seed=1 << 40)
        norm_and_scale(squares, touched, scale, scale, step=2, growth=0.0)
        decayed(torch.zeros(4096, dtype=torch.bfloat16), (2048, 2048), 0, 0.9, (1 << 40, 1))
        sides, peaks = [torch.zeros(1, 120, dtype=torch.bfloat16)] * 2, [torch.zeros(1)] * 2
        _add_to_both_(sides, peaks, [torch.zeros(1, 16, 16)] * 2, (16, 16), torch.tensor([1 << 40, 0]))
    names = ["fold_kernel", "norm_kernel", "decay_kernel", "peaks_kernel", "add_kernel"]
    assert [kernel.metadata.name for kernel in compiled] == names
