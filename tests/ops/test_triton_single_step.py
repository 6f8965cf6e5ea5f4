"""The kernels of the single step against their plain twins, in the interpreter, compiled, and on a GPU."""

from __future__ import annotations

import re

import pytest
import torch

from helpers import relative_error
from poetx.ops.dispatch import use_kernels
from poetx.ops.fold import full_precision_products
from poetx.ops.single_step import _add_to_both_
from poetx.ops.single_step_update import decayed, fold_, norm_and_scale

pytest.importorskip("triton", reason="the kernels need triton, which exists for Linux only")
from kernel_helpers import compiled_for, interpreted, nan_filled, on_each_generation
from poetx.ops.triton import single_step as kernels

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


def turns(W, side, b, *, norm=None, scale=None, exact=None, steps=0, seed=7):
    """The matrices of a stack, as the kernels take them."""
    ones = torch.ones(len(W), dtype=torch.float64, device=W.device)
    norm, scale = ones.clone() if norm is None else norm, ones.clone() if scale is None else scale
    stack = W if side == "out" else W.mT
    each = zip(stack, norm, scale, exact or [None] * len(W), strict=True)
    return kernels.Turns([kernels.Turn(*one, steps, seed + number) for number, one in enumerate(each)], b)


def folded(W, E, touched, scale, side, *, factor=1.0, seed=7):
    """By the kernels, in a copy of W; and the sums of squares of each matrix before and after."""
    out = W.clone(memory_format=torch.preserve_format)
    made = turns(out, side, E.shape[-1], scale=scale.clone(), seed=seed)
    squares = made.fold_(E, factor, side, touched)
    counts = [made.programs // len(W)] * len(W)
    return out, torch.stack([part.sum(1, dtype=torch.float64) for part in squares.split(counts, 1)], 1)


def twin(W, E, touched, scale, side):
    out = torch.empty_strided(W.shape, W.stride(), dtype=W.dtype, device=W.device).fill_(float("nan"))
    with full_precision_products():
        return out, fold_(W, E, side, out, touched=touched, scale=scale, seed=7).sum(2)


@on_each
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize(("m", "n", "b", "transposed"), SIZES)
def test_a_fold_is_its_twins(m, n, b, transposed, side, dtype, narrow, device):
    W, E, *rest = stack(m, n, b, side, dtype=dtype, device=device, transposed=transposed)
    E = E.bfloat16() if narrow else E
    with nan_filled(), kernels_on(device):
        got, squares = folded(W, E, *rest, side, factor=-0.5)
    want, wanted = twin(W.double(), E.double() * -0.5, *rest, side)
    torch.testing.assert_close(squares, wanted, rtol=1e-6, atol=0)
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["in", "out"])
def test_matrices_of_several_shapes_go_through_one_launch_as_through_their_own(side, dtype, device):
    """Wide, tall, ragged, a view with strides of its own: every element of each is written, and no other."""
    b, shapes = 24, [(48, 272), (20, 24), (100, 16), (24, 1)]
    whole = [draw(m, 2 * n, dtype=dtype, device=device, seed=m) for m, n in shapes]
    Ws = [W[:, ::2] if W.shape[0] == 100 else W[:, : W.shape[1] // 2] for W in whole]
    before, alone = [W.clone() for W in whole], []
    counts = [-(-(W.shape[0] if side == "out" else W.shape[1]) // b) for W in Ws]
    E = draw(sum(counts), b, b, device=device, seed=1).mul_(0.01).bfloat16()
    touched = torch.ones(len(E), dtype=torch.bool, device=device)
    norms = torch.ones(2, len(Ws), dtype=torch.float64, device=device)
    with nan_filled(), kernels_on(device):
        for W, part in zip(Ws, E.split(counts), strict=True):
            alone.append(folded(W[None], part, touched[: len(part)], norms[0, :1], side)[0][0])
        views = [W if side == "out" else W.T for W in Ws]
        each = zip(views, *norms, strict=True)
        together = kernels.Turns([kernels.Turn(*one, None, 0, 7) for one in each], b)
        together.hold_(together.fold_(E, 1.0, side, touched), touched, growth=0.0, same=0.01)
    for W, own, wide, was in zip(Ws, alone, whole, before, strict=True):
        assert torch.equal(W, own)
        W.copy_(was[:, ::2] if W.stride(1) == 2 else was[:, : W.shape[1]])
        assert torch.equal(wide, was)
    wanted = [torch.linalg.vector_norm(W, dtype=torch.float64) for W in Ws]
    torch.testing.assert_close(norms[0], torch.stack(wanted), rtol=1e-6, atol=0)


@on_each
def test_noise_is_of_the_seed_and_the_place_alone(device):
    """Of all rows in one block and in several, and of a wider weight, whose programs are more."""
    W = torch.ones(1, 32, 136, dtype=torch.bfloat16, device=device)
    found = []
    with kernels_on(device):
        for seed, b, columns in ((1, 32, 136), (1, 16, 136), (2, 16, 136)):
            E = torch.eye(b, device=device).expand(32 // b, b, b) * 2.0**-8
            touched, scale = torch.ones(len(E), dtype=torch.bool, device=device), torch.ones(1, device=device).double()
            found.append(folded(W[:, :, :columns], E, touched, scale, "out", seed=seed)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    assert 0.4 < (found[0] > 1.002).float().mean() < 0.6  # half a unit is lost or a whole one gained
    assert found[0].float().std(2).min() > 0


def test_parts_of_e_lose_nothing_of_float32():
    """Of a weight of ones the squares of E's sums are right to float32's rounding, though operands are narrow."""
    W = torch.ones(1, 32, 8, dtype=torch.bfloat16)
    E = draw(1, 32, 32)
    with interpreted():
        _, squares = folded(W, E, torch.ones(1, dtype=torch.bool), torch.ones(1).double(), "out")
    assert squares[1].item() == pytest.approx(8 * (1 + E.double().sum(2)).square().sum().item(), rel=2e-7)


@on_each
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("growth", "written"), [(0.0, 1.0), (0.02, 1.0), (0.02, 2.0)])
def test_the_norm_is_its_twins(growth, written, exact, device):
    W, E, touched, scale = stack(20, 16, 16, "out", dtype=torch.float32, device=device)
    read = torch.linalg.vector_norm(W, dim=(1, 2), dtype=torch.float64)
    norm = written * scale * read / (1 + growth * 4) ** 0.5
    given = [read[0] * 1.5, None] if exact else None
    got = torch.stack([norm, scale])
    with kernels_on(device):
        made = turns(W, "out", 16, norm=got[0], scale=got[1], exact=given, steps=4)
        squares = made.fold_(E, 1.0, "out", touched)
        made.hold_(squares, touched, growth=growth, same=0.01)
    sums = torch.stack([part.double() for part in squares.split([made.programs // 2] * 2, 1)], 1)
    found = torch.stack([read[0] * 1.5, sums[0, 1].sum().sqrt()]) if exact else None
    want = norm_and_scale(sums, touched, norm, scale, step=5, growth=growth, found=found)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    with kernels_on(device):
        made.hold_(torch.zeros_like(squares), touched, growth=growth, same=0.01)
    assert got[1].tolist() == [1, 1]


@on_each
@pytest.mark.parametrize("upcoming", [None, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_momenta_decay_as_their_twins(dtype, upcoming, device):
    """Two of one launch, the second into other memory."""
    sizes = (1100, 700)
    copied = slice(0, 0) if upcoming is None else (slice(0, 1100), slice(1100, 1800))[upcoming]
    momenta = [draw(3000, dtype=dtype, device=device, seed=seed) for seed in (1, 2, 1)]
    small, other = draw(40, dtype=dtype, device=device), torch.full((50,), float("nan"), dtype=dtype, device=device)
    peaks = [torch.ones(3, device=device) for _ in range(4)]
    with kernels_on(device):
        decays = [kernels.Decay(m[:1800], m, copied, p, 3) for m, p in zip(momenta, peaks, strict=False)]
        decays.append(kernels.Decay(small, other, slice(10, 20), peaks[3], 4))
        kernels.Decays(decays).decay_(0.95)
    got = momenta[0]
    want = decayed(draw(3000, dtype=dtype, seed=1)[:1800].double(), sizes, upcoming, 0.95, (3, 4)).to(device)
    close = {"rtol": 1e-6 if dtype == torch.float32 else 2**-7, "atol": 0}
    torch.testing.assert_close(got[: len(want)].double(), want, **close)
    assert torch.equal(got, momenta[2])
    assert torch.equal(got[len(want) :], draw(3000, dtype=dtype, device=device, seed=1)[len(want) :])
    if upcoming is not None:
        assert torch.equal(got[1800 : len(want)], got[copied])
    torch.testing.assert_close(other[:40].double(), small.double() * 0.95, **close)
    assert torch.equal(other[40:], other[10:20])
    assert all(p.eq(0).all() for p in peaks)


@on_each
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [None, "in", "out"])
def test_gradients_are_added_to_both_sides_and_no_block_that_is_not_finite(bad, dtype, packed, device):
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
@pytest.mark.parametrize(
    ("dtype", "b"), [*((torch.bfloat16, b) for b in (16, 48, 256, 1024)), *((torch.float32, b) for b in (48, 256))]
)
def test_folds_of_all_sizes_compile(dtype, b, capability):
    """Either side: what is not of neighbours is read in 16 bytes all the same."""
    for side, narrow in (("out", True), ("in", dtype == torch.bfloat16)):
        W = torch.zeros(1, 1024, 1024, dtype=dtype)
        E = torch.zeros(-(-1024 // b), b, b, dtype=torch.bfloat16 if narrow else torch.float32)
        touched = torch.ones(len(E), dtype=torch.bool)
        with use_kernels("auto"), compiled_for(capability) as compiled:
            turns(W, side, b).fold_(E, 1.0, side, touched)
        text = compiled[0].asm["ptx"]
        copies = re.findall(r"cp\.async\.c\w\.shared\.global[^;]*, (?:0x)?(\w+), ", text)
        wide = sum(int(size, 16) == 16 for size in copies)
        assert wide >= len(copies) - 2, copies  # the rest is what one program says to itself
        assert wide or b < 64


def test_a_matrix_of_one_column_is_not_written_sixteen_bytes_at_a_time():
    """Of a column of a wider tensor that would be its neighbours', of one by itself it would not be aligned."""
    for W in (torch.zeros(1, 256, 1, dtype=torch.bfloat16), torch.zeros(1, 256, 64, dtype=torch.bfloat16)[:, :, :1]):
        touched = torch.ones(16, dtype=torch.bool)
        with use_kernels("auto"), compiled_for(90) as compiled:
            made = turns(W, "out", 16)
            made.fold_(torch.zeros(16, 16, 16), 1.0, "out", touched)
        assert not made.sixteenths
        assert not re.search(r"st\.global\S*\.v\d", compiled[0].asm["ptx"])
    wide = turns(torch.zeros(1, 256, 64, dtype=torch.bfloat16), "out", 16)
    assert wide.sixteenths
    assert turns(torch.zeros(1, 256, 64, dtype=torch.bfloat16), "in", 16).sixteenths


@on_each_generation
def test_they_compile(capability):
    W, E, touched, _ = stack(256, 128, 256, "out", dtype=torch.bfloat16, device="cpu")
    with use_kernels("auto"), compiled_for(capability) as compiled, pytest.MonkeyPatch.context() as patch:
        patch.setattr("poetx.ops.single_step.use_triton", lambda tensor, *args, **settings: True)
        made = turns(W, "out", 256, seed=1 << 40)
        made.hold_(made.fold_(E, 1.0, "out", touched), touched, growth=0.0, same=0.01)
        flat, peak = torch.zeros(4096, dtype=torch.bfloat16), torch.zeros(1)
        kernels.Decays([kernels.Decay(flat, flat, slice(0, 0), peak, 1 << 40)]).decay_(0.9)
        sides, peaks = [torch.zeros(1, 120, dtype=torch.bfloat16)] * 2, [torch.zeros(1)] * 2
        _add_to_both_(sides, peaks, [torch.zeros(1, 16, 16)] * 2, (16, 16), torch.tensor([1 << 40, 0]))
    names = ["fold_kernel", "norm_kernel", "decay_kernel", "add_kernel"]
    assert [kernel.metadata.name for kernel in compiled] == names
