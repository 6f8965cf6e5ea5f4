"""SMMF and H-Fac against their formulas in float64, AdamW against torch's; state that is small and survives."""

import io

import pytest
import torch
from torch import nn

import poetx
from helpers import relative_error
from poetx import UserError
from poetx.optim import SMMF, AdamW, HFac, build_optimizer, moments
from poetx.optim import sliced as _base
from poetx.optim.smmf import pack_signs, square_shape

FAMILY = [
    (AdamW, {"state_dtype": "float32"}),
    (AdamW, {"state_dtype": "bfloat16"}),
    (AdamW, {"state_dtype": "int8"}),
    (SMMF, {}),
    (HFac, {}),
]
IDS = ["adamw", "adamw-bf16", "adamw-int8", "smmf", "hfac"]


def run(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = gradient.clone().to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


def start(*shape, dtype=torch.float64, steps=6):
    weight = torch.randn(*shape, dtype=torch.float64)
    return nn.Parameter(weight.to(dtype)), [torch.randn(*shape, dtype=torch.float64) * 2.0**-k for k in range(steps)]


def reference_smmf(theta, gradients, *, lr, beta, growth, decay, eps):
    shape, (n, m) = theta.shape, square_shape(theta.numel())
    assert n >= m
    theta = theta.reshape(n, m).clone()
    rM, cM, rV, cV = (torch.zeros(k, dtype=theta.dtype) for k in (n, m, n, m))
    sign = torch.ones(n, m, dtype=theta.dtype)
    for t, G in enumerate(gradients, 1):
        G = G.reshape(n, m)
        b1, b2 = beta * growth ** (t - 1), 1 - t**decay
        M = b1 * sign * torch.outer(rM, cM) + (1 - b1) * G
        V = b2 * torch.outer(rV, cV) + (1 - b2) * G**2
        sign = torch.where(M >= 0, 1.0, -1.0).to(theta.dtype)
        rM, cM, rV, cV = M.abs().sum(1), M.abs().sum(0), V.sum(1), V.sum(0)
        cM, cV = cM / cM.sum(), cV / cV.sum()
        theta -= lr * M / (V.sqrt() + eps)
    return theta.reshape(shape)


def reference_hfac(X, gradients, *, lr, betas, eps, clip, weight_decay):
    X = X.clone()
    m, n = X.shape
    u, r, v, s = (torch.zeros(k, dtype=X.dtype) for k in (m, m, n, n))
    one_m, one_n = torch.ones(m, dtype=X.dtype), torch.ones(n, dtype=X.dtype)
    for t, G in enumerate(gradients, 1):
        b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in betas)
        u, v = b1 * u + (1 - b1) * G @ one_n / n, b1 * v + (1 - b1) * G.T @ one_m / m
        r, s = b2 * r + (1 - b2) * (G**2 + eps) @ one_n, b2 * s + (1 - b2) * (G**2 + eps).T @ one_m
        V = torch.outer(r, s) / r.sum()
        phi = b1 * (torch.outer(u, one_n) - torch.outer(G @ one_n, one_n) / n) / torch.outer(r, one_n).div(n).sqrt()
        psi = b1 * (torch.outer(one_m, v) - torch.outer(one_m, one_m @ G) / m) / torch.outer(one_m, s).div(m).sqrt()
        U = G / V.sqrt()
        U = U / max(1.0, float(U.square().mean().sqrt()) / clip)
        X -= lr * ((phi + psi) / 2 + U + weight_decay * X)
    return X


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (7, 11, 3), (13,), (64,)])
@pytest.mark.parametrize("slices", [1 << 22, 30])
def test_smmf_follows_its_formulas(shape, slices, monkeypatch):
    monkeypatch.setattr(_base, "SLICE", slices)
    parameter, gradients = start(*shape)
    settings = {"lr": 0.03, "beta": 0.9, "growth": 0.99, "decay": -0.8, "eps": 1e-8}
    want = reference_smmf(parameter.detach(), gradients, **settings)
    assert relative_error(run(SMMF([parameter], **settings), parameter, gradients), want) < 1e-12


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (1, 9)])
@pytest.mark.parametrize("slices", [1 << 22, 30])
def test_hfac_follows_its_formulas(shape, slices, monkeypatch):
    monkeypatch.setattr(_base, "SLICE", slices)
    parameter, gradients = start(*shape)
    settings = {"lr": 0.03, "betas": (0.9, 0.99), "eps": 1e-12, "clip": 0.7, "weight_decay": 0.1}
    want = reference_hfac(parameter.detach(), gradients, **settings)
    assert relative_error(run(HFac([parameter], **settings), parameter, gradients), want) < 1e-12


def test_hfac_treats_a_vector_as_adafactor_does():
    parameter, gradients = start(9)
    want, v = parameter.detach().clone(), torch.zeros(9, dtype=torch.float64)
    for t, g in enumerate(gradients, 1):
        b2 = 0.99 * (1 - 0.99 ** (t - 1)) / (1 - 0.99**t)
        v = b2 * v + (1 - b2) * (g**2 + 1e-12)
        U = g / v.sqrt()
        want -= 0.03 * U / max(1.0, float(U.square().mean().sqrt()))
    got = run(HFac([parameter], lr=0.03, betas=(0.9, 0.99), eps=1e-12), parameter, gradients)
    assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("slices", [1 << 22, 512])
def test_adamw_with_float32_state_is_torchs(slices, monkeypatch):
    monkeypatch.setattr(_base, "SLICE", slices)
    parameter, gradients = start(70, 71, dtype=torch.float32)
    twin = nn.Parameter(parameter.detach().clone())
    settings = {"lr": 0.01, "betas": (0.9, 0.98), "weight_decay": 0.1}
    got = run(AdamW([parameter], state_dtype="float32", **settings), parameter, gradients)
    assert relative_error(got, run(torch.optim.AdamW([twin], **settings), twin, gradients)) < 1e-6


def reference_published_adam(Q, gradients, *, lr, betas, eps):
    """Adam as its paper's last line of section 2 has it: ε beside the second moment that is not yet corrected."""
    m = v = torch.zeros_like(Q)
    for t, g in enumerate(gradients, 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        Q = Q - lr * (1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t) * m / (v.sqrt() + eps)
    return Q


@pytest.mark.parametrize("size", [1.0, 5e-6])  # where ε is nothing, and where it rules
def test_uncorrected_eps_is_the_published_adam(size):
    parameter, gradients = start(30, 7)
    gradients = [gradient * size for gradient in gradients]
    settings = {"lr": 0.03, "betas": (0.9, 0.999), "eps": 1e-6}
    before = parameter.detach().clone()
    want = reference_published_adam(before, gradients, **settings) - before
    optimizer = build_optimizer([{"params": [parameter], "weight_decay": 0.0, "eps_mode": "uncorrected"}], **settings)
    assert relative_error(run(optimizer, parameter, gradients) - before, want) < 1e-12
    twin = nn.Parameter(before.clone())
    torchs = run(torch.optim.AdamW([twin], weight_decay=0.0, **settings), twin, gradients) - before
    assert (relative_error(torchs, want) < 1e-3) == (size == 1.0)


def test_uncorrected_eps_for_the_rotations_alone_or_for_all():
    model = nn.Sequential(nn.Linear(8, 8))
    poetx.convert_(model, poetx.PoetConfig(block_size=8))
    groups = poetx.param_groups(model, lr=1e-3, poet_lr=1e-3, eps=1e-6, eps_mode="uncorrected")
    assert [type(each) for each in build_optimizer(groups).optimizers] == [AdamW, torch.optim.AdamW]
    assert type(build_optimizer(groups, eps_mode="uncorrected")) is AdamW


@pytest.mark.parametrize(("state_dtype", "error"), [("bfloat16", 0.01), ("int8", 0.06)])
def test_narrow_state_moves_the_weights_as_float32_does(state_dtype, error):
    torch.manual_seed(3)
    gradients = [torch.randn(64, 130) * torch.logspace(-1, 0, 130) for _ in range(200)]
    moved = []
    for kind in ("float32", state_dtype):
        parameter = nn.Parameter(torch.zeros(64, 130))
        moved.append(run(AdamW([parameter], lr=1e-2, weight_decay=0.0, state_dtype=kind), parameter, gradients))
    assert relative_error(moved[1], moved[0]) < error


def test_eight_bit_second_moment_does_not_stick():
    # The mean of g² falls by 0.1 % of itself a step, a tenth of a code: rounding to nearest would keep it where it is.
    parameter = nn.Parameter(torch.zeros(4096))
    optimizer = AdamW([parameter], state_dtype="int8", lr=0.0)
    large = torch.ones(4096)
    large[0] = 100
    run(optimizer, parameter, [large] * 3)
    codes = optimizer.state[parameter]["exp_avg_sq"]
    small = torch.full((4096,), 1e-4)
    small[0] = 100  # keeps the scale of the first block where it is
    before = _value(optimizer.state[parameter])
    run(optimizer, parameter, [small] * 300)
    after = _value(optimizer.state[parameter])
    assert codes.dtype == torch.uint8
    assert float(after[1:256].mean() / before[1:256].mean()) == pytest.approx(0.999**300, rel=0.1)


def _value(state):
    return moments.load(state, "exp_avg_sq", slice(0, 4096), torch.float32)


@pytest.mark.parametrize(
    ("kind", "settings", "bytes_each"),
    [(*pair, size) for pair, size in zip(FAMILY, (8, 4, 2.04, 0.21, 0.07), strict=True)],
    ids=IDS,
)
def test_state_is_as_small_as_promised(kind, settings, bytes_each):
    parameter, gradients = start(256, 256, dtype=torch.bfloat16, steps=1)
    optimizer = kind([parameter], **settings)
    run(optimizer, parameter, gradients)
    state = [t for t in optimizer.state[parameter].values() if isinstance(t, torch.Tensor)]
    assert sum(t.untyped_storage().nbytes() for t in state) / 256**2 <= bytes_each


@pytest.mark.parametrize(("kind", "settings"), FAMILY, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_load_continue_is_bitwise_the_same(kind, settings, dtype):
    straight, gradients = start(80, 66, dtype=dtype)
    resumed = nn.Parameter(straight.detach().clone())
    run(kind([straight], **settings), straight, gradients)
    first = kind([resumed], **settings)
    run(first, resumed, gradients[:3])
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = kind([resumed], **settings)
    second.load_state_dict(torch.load(buffer))
    kinds = [{k: getattr(v, "dtype", type(v)) for k, v in o.state[resumed].items()} for o in (first, second)]
    assert kinds[0] == kinds[1]
    assert torch.equal(run(second, resumed, gradients[3:]), straight)


@pytest.mark.parametrize(("kind", "settings"), FAMILY, ids=IDS)
def test_the_state_of_another_optimizer_is_refused(kind, settings):
    parameter, gradients = start(8, 6, dtype=torch.float32, steps=2)
    others = [torch.optim.AdamW, torch.optim.RMSprop, SMMF, HFac, AdamW]
    for other in (other([parameter], lr=1e-3) for other in others if other is not kind):
        run(other, parameter, gradients)
        mine = kind([parameter], lr=1e-3, **settings)
        with pytest.raises(UserError, match=f"^{kind.kind.name}: this state was saved by .*(it holds|start)"):
            mine.load_state_dict(other.state_dict())
        run(mine, parameter, gradients)


@pytest.mark.parametrize(("kind", "settings"), FAMILY, ids=IDS)
def test_bfloat16_weights_move_by_less_than_they_can_show(kind, settings):
    # One step of 1e-4 is an eighth of half a unit in the last place of 0.3; rounding to nearest would stand still.
    parameter = nn.Parameter(torch.full((64, 128), 0.3, dtype=torch.bfloat16))
    optimizer = kind([parameter], lr=1e-4, weight_decay=0.0, **settings)
    run(optimizer, parameter, [torch.ones(64, 128)] * 100)
    assert float(parameter.detach().float().mean()) == pytest.approx(0.3 - 1e-2, abs=2.5e-3)


@pytest.mark.parametrize(("kind", "settings"), FAMILY, ids=IDS)
def test_strided_parameters_and_missing_gradients(kind, settings):
    storage = torch.randn(66, 80)
    strided, plain = nn.Parameter(storage.T), nn.Parameter(storage.T.clone(memory_format=torch.contiguous_format))
    idle = nn.Parameter(torch.ones(3))
    gradients = [torch.randn(80, 66) for _ in range(3)]
    run(kind([strided, idle], **settings), strided, gradients)
    run(kind([plain, idle], **settings), plain, gradients)
    assert torch.equal(strided, plain)
    assert torch.equal(idle, torch.ones(3))


def test_shapes_and_signs():
    assert [square_shape(n) for n in (1, 12, 13, 36, 128256 * 4096)] == [
        (1, 1),
        (4, 3),
        (13, 1),
        (6, 6),
        (24576, 21376),
    ]
    assert pack_signs(torch.tensor([[1.0, -1, 0, -2, 5, -1, -1, -1, 3]])).tolist() == [[0b10101, 1]]


def test_a_state_that_was_reshaped_the_other_way_starts_anew(caplog):
    parameter, gradients = start(12, 20, dtype=torch.float32)
    optimizer = SMMF([parameter])
    run(optimizer, parameter, gradients)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["beta"] = saved["param_groups"][0].pop("betas")[0]
    for name in ("momentum", "variance"):
        state = saved["state"][0]
        state[f"{name}_row"], state[f"{name}_column"] = state[f"{name}_column"], state[f"{name}_row"]
    twin = nn.Parameter(parameter.detach().clone())
    resumed, fresh = SMMF([parameter]), SMMF([twin])
    resumed.load_state_dict(saved)
    assert torch.equal(run(resumed, parameter, gradients[:2]), run(fresh, twin, gradients[:2]))
    assert caplog.text.count("reshaped the other way, as 15 × 16") == 1


SHAPES = [(), (1,), (13,), (0,), (0, 5), (5, 0), (1, 9), (9, 1), (2, 3, 5), (64, 65)]


@pytest.mark.parametrize(("kind", "settings"), FAMILY, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_finite_gradient_of_any_shape_makes_a_nan(kind, settings, dtype):
    sizes = [1e-38, 3e38, 0.0, 1e-20, 1.0, 1e20, 1e-38, 0.0]
    for first in range(len(sizes)):
        parameters = [nn.Parameter(torch.randn(shape, dtype=torch.float32).to(dtype)) for shape in SHAPES]
        optimizer = kind(parameters, lr=1e-3, **settings)
        for size in sizes[first:] + sizes[:first]:
            for p in parameters:
                p.grad = (torch.randn(p.shape).clamp(-1, 1) * size).to(dtype)
            optimizer.step()
        for p in parameters:
            assert p.isfinite().all(), (first, p.shape)
            assert p.abs().max() < 1e3 if p.numel() else True
            assert all(v.isfinite().all() for v in optimizer.state.get(p, {}).values() if torch.is_tensor(v)), p.shape


@pytest.mark.parametrize(("kind", "settings"), FAMILY, ids=IDS)
def test_an_infinite_gradient_is_not_hidden(kind, settings):
    parameter = nn.Parameter(torch.zeros(80, 66))
    gradient = torch.ones(80, 66)
    gradient[3, 5] = torch.inf
    assert run(kind([parameter], **settings), parameter, [gradient]).isnan().any()


@pytest.mark.parametrize(("kind", "settings"), FAMILY, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float16])
def test_dtypes_that_would_go_wrong_are_refused(kind, settings, dtype):
    with pytest.raises(UserError, match=rf"{kind.__name__}: a parameter of shape \(3,\) is {dtype}; must be float32"):
        kind([nn.Parameter(torch.ones(3, dtype=dtype))], **settings)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="use sparse=False"):
        AdamW(table.parameters()).step()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: AdamW(p, state_dtype="int4"), "state_dtype='int4'"),
        (lambda p: AdamW(p, eps_mode="correct"), "did you mean 'corrected'"),
        (lambda p: HFac(p, eps=0.0), "eps=0.0: must be positive"),
        (lambda p: SMMF(p, beta=1.0), "beta=1.0"),
        (lambda p: SMMF(p, decay=0.5), "decay=0.5"),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises(UserError, match=words):
        make([nn.Parameter(torch.ones(2))])
