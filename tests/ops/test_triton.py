"""The Triton kernels against their plain-torch twins: in the interpreter, compiled for a Hopper GPU, and on a GPU."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch

from helpers import TOLERANCE, random_skew, relative_error
from poetx import UserError
from poetx.ops import block_diagonal
from poetx.ops import cayley as cayley_twin
from poetx.ops.cayley import packed_size
from poetx.ops.dispatch import kernel_report, use_kernels
from poetx.ops.linear import poet_linear
from poetx.ops.reference import EXACT
from poetx.ops.side import Side, sides
from poetx.ops.stored import Stored

pytest.importorskip("triton", reason="the kernels need triton, which exists for Linux only")
from kernel_helpers import compiled_for, interpreted, nan_filled, on_each_generation
from poetx.ops.triton import cayley as cayley_kernels
from poetx.ops.triton import permute as permute_kernels
from poetx.ops.triton import tuning

DTYPES = [torch.float32, torch.bfloat16]
#: features, block size: several tiles to a row, blocks that are no power of two, each with a ragged last block
SIZES = [(41, 16), (75, 40)]

gpu = pytest.mark.gpu
on_each = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])


@contextlib.contextmanager
def kernels_on(device):
    """The real kernels on a GPU, their interpreted twins on the CPU; outputs are NaN until written."""
    with nan_filled(), interpreted() if device == "cpu" else use_kernels("triton"):
        yield


def draw(*size, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)


def exact(function, *args):
    """The twin in float64, on the CPU, from the same rounded inputs."""
    with use_kernels("torch"):
        return function(
            *(
                a.cpu().double()
                if isinstance(a, torch.Tensor) and a.is_floating_point()
                else a.cpu()
                if isinstance(a, torch.Tensor)
                else a
                for a in args
            )
        )


def strided(x):
    """The same values with neither dimension contiguous."""
    return x.new_zeros(x.shape[1] * 2, x.shape[0] + 1).T[: x.shape[0], ::2].copy_(x)


@on_each
@pytest.mark.parametrize(("order", "dtype"), [(3, torch.float32), (3, torch.bfloat16), (7, torch.float32)])
def test_blocks_of_two_sides(order, dtype, device):
    sizes, block_size = (75, 40), 40
    qs = [random_skew(size, block_size, dtype=torch.float32, seed=size).to(device) for size in sizes]
    qs[0][-1, -1] = 0.7  # beyond the ragged end: must have no effect
    squares = []
    with kernels_on(device):
        blocks = cayley_kernels.cayley(qs, sizes, block_size, order, dtype, squares)
        (alone,) = cayley_kernels.cayley(qs[:1], sizes[:1], block_size, order, dtype)
        settings = ([G.float() for G in blocks], qs, sizes, block_size, order, dtype == torch.bfloat16)
        kept, again = (cayley_kernels.cayley_backward(*settings, QS) for QS in (squares, []))
    assert all(map(torch.equal, kept, again))
    assert torch.equal(alone, blocks[0])
    for G, q, size in zip(blocks, qs, sizes, strict=True):
        assert G.dtype == dtype
        assert relative_error(G.cpu(), exact(cayley_twin.cayley_forward, q, size, block_size, order)) < TOLERANCE[dtype]


@on_each
@pytest.mark.parametrize(
    ("size", "block_size", "q_dtype", "order"),
    [(41, 16, torch.float32, 3), (75, 40, torch.float32, 3), (41, 16, torch.bfloat16, 3), (75, 40, torch.float32, 7)],
)
def test_gradient_of_the_packed_entries(size, block_size, q_dtype, order, device):
    q = random_skew(size, block_size, dtype=q_dtype).to(device).requires_grad_()
    Gamma = draw(*q.shape[:1], block_size, block_size, dtype=torch.float32, device=device)
    with kernels_on(device):
        G = cayley_twin.cayley(q, size=size, block_size=block_size, order=order)
        (dq,) = torch.autograd.grad(G, q, Gamma)
    q = q.detach()
    want = exact(cayley_twin.cayley_backward, Gamma, q, size, block_size, order)
    assert (
        relative_error(G.cpu(), exact(cayley_twin.cayley_forward, q, size, block_size, order))
        < TOLERANCE[torch.float32]
    )
    assert dq.dtype == q_dtype
    assert relative_error(dq.cpu(), want) < TOLERANCE[q_dtype]
    assert dq.cpu()[want == 0].eq(0).all()


@on_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "block_size"), SIZES)
@pytest.mark.parametrize("layout", ["rows", "strided"])
def test_rotations_and_their_gradients(layout, size, block_size, dtype, device):
    """Permutations by the kernel, products by PyTorch."""
    tokens = 70
    x, g = (draw(tokens, size, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    if layout == "strided":
        x, g = strided(x), strided(g)
    G = draw(-(-size // block_size), block_size, block_size, dtype=dtype, device=device, seed=3)
    bias = draw(size, dtype=dtype, device=device, seed=4)
    perm = torch.randperm(size, generator=torch.Generator().manual_seed(5)).int().to(device)
    calls = {
        "gather_rotate": (x, perm, G),
        "rotate_scatter": (x, G, perm, bias),
        "gather_rotate_backward": (x, perm, G, g.contiguous().clone(), True),
        "rotate_scatter_backward": (x, G, perm, g),
    }
    for name, args in calls.items():
        want = exact(getattr(block_diagonal, name), *args)
        with kernels_on(device):
            got = getattr(block_diagonal, name)(*args)
        for part, truth in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (got, want)), strict=True):
            assert part.shape == truth.shape
            assert relative_error(part.cpu(), truth) < TOLERANCE[dtype], name
            assert part.dtype == (torch.float32 if part.ndim == 3 else dtype)


@gpu
def test_every_plan_and_tile_gives_the_same_bits(monkeypatch):
    """So that timing may choose between them: a run stays reproducible to the bit whatever is chosen."""
    size, block_size, device = 2048 + 100, 256, "cuda"
    G = draw(-(-size // block_size), block_size, block_size, dtype=torch.float32, device=device, seed=3)
    q = random_skew(size, block_size, dtype=torch.float32).to(device)

    def compare(key, place, candidates):
        results = [candidate() for candidate in candidates]
        for other in results[1:]:
            for a, b in zip(*(r if isinstance(r, (tuple, list)) else (r,) for r in (results[0], other)), strict=True):
                assert torch.equal(a, b), key
        compared.append(len(results))
        return results[0]

    compared = []
    monkeypatch.setattr(cayley_kernels, "fastest", compare)
    with kernels_on(device):
        cayley_kernels.cayley([q], [size], block_size, 3, torch.bfloat16)
        cayley_kernels.cayley_backward([G], [q], [size], block_size, 7, True)
    assert max(compared) > 1


@on_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "block_size"), SIZES)
def test_whole_outer_products_are_zero_beyond_a_ragged_end(features, block_size, dtype, device):
    """The single step keeps blocks whole, so that what stands beyond the end would be written into its momentum."""
    x, y = (draw(37, features, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    want = exact(block_diagonal.block_outer_products, x, y, block_size)
    with kernels_on(device):
        got = block_diagonal.block_outer_products(x, y, block_size)
    rest = features % block_size
    assert got[-1, rest:].abs().max() == 0
    assert got[-1, :, rest:].abs().max() == 0
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-4)


@on_each
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32])
def test_permute(dtype, device):
    x = draw(9, 75, dtype=torch.float32, device=device).mul(100).to(dtype)
    perm = torch.randperm(75).int().to(device)
    with kernels_on(device):
        out = torch.empty_like(x)
        assert permute_kernels.permute(x, perm, out) is out
        assert torch.equal(out, x[:, perm.long()])
        assert torch.equal(permute_kernels.permute(strided(x), perm), x[:, perm.long()])
        assert torch.equal(permute_kernels.inverse(perm), perm.argsort().int())


@pytest.mark.gpu
def test_what_is_no_permutation_of_a_row_is_gathered_all_the_same():
    x = torch.randn(5, 40, device="cuda")
    some, wide = torch.tensor([3, 3, 39], device="cuda").int(), torch.randn(3, 20000, device="cuda")
    assert torch.equal(block_diagonal.gather(x, some), x[:, some.long()])
    perm = torch.randperm(20000, device="cuda").int()
    assert torch.equal(block_diagonal.gather(wide, perm), wide[:, perm.long()])


def layer(x, q_in, q_out, bias, weight, perm_in, perm_out, block_sizes, **settings):
    both = sides((q_in, q_out), weight.shape[::-1], block_sizes, (perm_in, perm_out))
    return poet_linear(x, Stored((weight,)), both, bias=bias, **settings)


def layer_problem(dtype, device, tokens=37, n=41, m=75, block_size=32):
    inputs = {
        "x": draw(tokens, n, dtype=dtype, seed=1),
        "q_in": random_skew(n, min(n, block_size), dtype=torch.float32, seed=2),
        "q_out": random_skew(m, min(m, block_size), dtype=torch.float32, seed=3),
        "bias": draw(m, dtype=dtype, seed=4),
    }
    frozen = {
        "weight": draw(m, n, dtype=dtype, seed=5) / n**0.5,
        "perm_in": torch.randperm(n).int(),
        "perm_out": torch.randperm(m).int(),
    }
    settings = {"block_sizes": (min(n, block_size), min(m, block_size))}
    inputs = {k: v.to(device).requires_grad_() for k, v in inputs.items()}
    return inputs, {k: v.to(device) for k, v in frozen.items()} | settings


@on_each
@pytest.mark.parametrize(("mode", "dtype"), [("fast", torch.float32), ("mem", torch.bfloat16)])
def test_layer_and_every_gradient(mode, dtype, device):
    inputs, frozen = layer_problem(dtype, device)
    results = []
    for kernels, kind in ((kernels_on(device), dtype), (use_kernels("torch"), torch.float64)):
        here = {k: v.detach().to(kind).requires_grad_() for k, v in inputs.items()} if kind != dtype else inputs
        with kernels:
            weight = frozen["weight"].to(kind)
            y = layer(**here, **(frozen | {"weight": weight}), order=3, mode=mode)
            g = draw(*y.shape, dtype=kind, device=device, seed=6)
            results.append({"y": y} | dict(zip(here, torch.autograd.grad(y, list(here.values()), g), strict=True)))
    for name, got in results[0].items():
        assert got.dtype == (dtype if name in ("y", "x", "bias") else torch.float32)
        assert relative_error(got, results[1][name]) < 2 * TOLERANCE[dtype], name


def test_no_tokens():
    inputs, frozen = layer_problem(torch.float32, "cpu", tokens=0)
    with kernels_on("cpu"):
        y = layer(**inputs, **frozen, order=3, mode="fast")
        grads = torch.autograd.grad(y.sum(), list(inputs.values()))
    assert y.shape == (0, 75)
    assert all(grad.eq(0).all() for grad in grads)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32])
def test_the_permutation_compiles(dtype):
    with compiled_for(90) as compiled:
        permute_kernels.permute(torch.zeros(256, 512, dtype=dtype), torch.arange(512).int())
    assert [kernel.metadata.name for kernel in compiled] == ["permute_kernel"]


@on_each
@pytest.mark.parametrize("dtype", DTYPES)
def test_sides_of_many_layers_in_one_batch_have_the_bits_that_they_have_alone(dtype, device):
    """Whole and ragged sides, of two block sizes and packed types."""
    kinds = [
        (48, 16, dtype),
        (40, 40, dtype),
        (32, 16, dtype),
        (41, 16, dtype),
        (80, 40, torch.float32),
        (16, 16, dtype),
    ]
    each, grads = [], []
    for seed, (size, block_size, kind) in enumerate(kinds):
        count = -(-size // block_size)
        q = (draw(count, packed_size(block_size), dtype=torch.float32, device=device, seed=seed) * 0.05).to(kind)
        each.append(Side(q, None, size, block_size))
        grads.append(draw(count, block_size, block_size, dtype=torch.float32, device=device, seed=seed + 10))
    with kernels_on(device):
        many = cayley_twin.many_blocks(each, 3, dtype)
        back = cayley_twin.many_blocks_backward(grads, each, 3, dtype)
        for side, G, dq, grad in zip(each, many, back, grads, strict=True):
            assert torch.equal(G, cayley_twin.side_blocks([side], 3, dtype)[0])
            assert torch.equal(dq, cayley_twin.side_blocks_backward([grad], [side], 3, dtype)[0])


@on_each_generation
@pytest.mark.parametrize(("order", "dtype"), [(3, torch.bfloat16), (7, torch.float32)])
def test_cayley_kernels_compile(order, dtype, capability):
    """What the interpreter does not see: types, layouts, registers, the width of loads. No GPU is needed to compile."""
    size, block_size = 512, 128
    q, G = torch.zeros(4, packed_size(block_size)), torch.zeros(4, block_size, block_size)
    with compiled_for(capability) as compiled:
        Q = cayley_kernels._unpack([q, q], [size, size], block_size)
        for tile in cayley_kernels._TILES[: 2 if dtype == torch.bfloat16 else 1]:
            settings = cayley_kernels._settings(block_size, tile, dtype == torch.bfloat16)
            cayley_kernels._cayley([q, q], order, dtype, Q, torch.empty_like(Q), torch.empty_like(Q), settings)
        narrow = dtype == torch.bfloat16
        cayley_kernels.cayley_backward([G, G], [q, q], [size, size], block_size, order, narrow)
    names = {"unpack_kernel", "square_kernel", "series_kernel", "factor_gradient_kernel", "pack_gradient_kernel"}
    names |= {"extend_kernel", "extend_gradient_kernel"} if order == 7 else set()
    assert {kernel.metadata.name for kernel in compiled} == names
    for kernel in compiled:
        name, ptx = kernel.metadata.name, kernel.asm["ptx"]
        copies = re.findall(r"cp\.async\.\w+\.shared\.global .*, 0x(\d+)", ptx)
        assert copies or name == "unpack_kernel", f"{name}: loads do not run ahead of products"
        # dF and E are read by columns, too, which Hopper's matrix units do not take of float32.
        if name != "unpack_kernel" and (order == 3 or "gradient" not in name or name == "pack_gradient_kernel"):
            assert set(copies) == {"10"}, f"{name}: loads of less than 16 bytes"
        if capability == 90 and dtype == torch.bfloat16 and name != "unpack_kernel":
            assert "wgmma" in ptx, f"{name} does not reach Hopper's matrix units"


def test_the_fastest_candidate_is_chosen_once(monkeypatch):
    calls, times = [], {"a": 3.0, "b": 1.0, "c": float("inf")}
    candidates = [lambda name=name: calls.append(name) or name for name in times]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(tuning, "_milliseconds", lambda candidate, device: times[candidate()])
    cuda = torch.device("cuda", 0)
    assert tuning.fastest("key", cuda, candidates) == "b"
    assert calls == ["a", "b", "c", "b"]
    assert tuning.fastest("key", cuda, candidates) == "b"
    assert calls[4:] == ["b"]
    assert tuning.fastest("other", torch.device("cpu"), candidates) == "a"


def test_forcing_raises_where_a_kernel_cannot_run():
    inputs, frozen = layer_problem(torch.float32, "cpu")
    with use_kernels("triton"), pytest.raises(UserError, match="device cpu; the kernels need CUDA"):
        layer(**inputs, **frozen, order=3, mode="fast")
    with pytest.raises(UserError, match="must be"), use_kernels("cuda"):
        pass
    with interpreted(), pytest.raises(UserError, match="exact"):
        layer(**inputs, **frozen, order=EXACT, mode="fast")
    doubles = {k: v.detach().double() for k, v in inputs.items()}
    frozen["weight"] = frozen["weight"].double()
    with interpreted(), pytest.raises(UserError, match="float64"):
        layer(**doubles, **frozen, order=3, mode="fast")


def test_report_says_what_runs_and_why():
    if not torch.cuda.is_available():
        assert {why for _, why in kernel_report()} == {
            "PyTorch (device cpu; the kernels need CUDA (or TRITON_INTERPRET=1, to try them out))"
        }
    with interpreted():
        report = dict(kernel_report())
    assert report["permute"].startswith("Triton ")
    assert report["fold"].startswith("PyTorch (float32")


def test_precision_follows_torch_and_the_dtype():
    assert tuning.float32_precision(narrow=True) == "tf32"
    assert tuning.float32_precision(narrow=False) == "tf32x3"
    torch.set_float32_matmul_precision("high")
    try:
        assert tuning.float32_precision(narrow=False) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
