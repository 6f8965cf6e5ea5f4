"""PoetLinear behaves as a torch user expects of a layer."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from helpers import TOLERANCE, random_skew, relative_error
from poetx import PoetConfig, PoetLinear, UserError, convert_
from poetx.ops.random import stream

INT8 = {"mode": "mem", "weight_format": "int8", "group_size": 2}
NEIGHBOURS = {"permutation": "contiguous"}
EACH = pytest.mark.parametrize(
    "settings", [{}, {"mode": "mem"}, INT8, NEIGHBOURS], ids=["fast", "mem", "int8", "neighbours"]
)


def make(mode="fast", *, m=12, n=10, dtype=torch.float32, bias=True, angle=0.2, **config):
    settings = {"block_size": 4, "init": "normalized"} | config
    layer = PoetLinear(n, m, bias, config=PoetConfig(mode=mode, **settings), name="layer", dtype=dtype)
    with torch.no_grad():
        for skew in layer.rotations:
            skew.normal_(std=angle / 4)
        if bias:
            layer.bias.normal_()
    return layer


@pytest.mark.parametrize("mode", ["fast", "mem"])
@pytest.mark.parametrize("order", [3, 7, "exact"])
def test_forward_equals_the_dense_weight(mode, order):
    layer = make(mode, dtype=torch.float64, neumann_order=order, block_size=5)
    x = torch.randn(2, 3, 10, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (2, 3, 12)
    want = nn.functional.linear(x, layer.dense_weight(), layer.bias)
    assert relative_error(y, want) < TOLERANCE[torch.float64]
    assert relative_error(layer.weight, layer.dense_weight()) == 0


@pytest.mark.parametrize("order", [3, "exact"])
def test_the_weight_centric_way_gives_the_same_output_and_gradients(order):
    x = torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True)
    results = []
    for mode in ("fast", "weight"):
        config = PoetConfig(mode=mode, block_size=4, neumann_order=order, init="normalized")
        layer = PoetLinear(11, 14, config=config, name="a", dtype=torch.float64)
        with torch.no_grad():
            for side, skew in enumerate(layer.rotations):
                skew.copy_(random_skew((11, 14)[side], 4, seed=side))
            layer.bias.fill_(0.3)
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, *layer.rotations, layer.bias))])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < TOLERANCE[torch.float64]


def test_dense_weight_is_differentiable_like_forward():
    layer = make(dtype=torch.float64)
    x, g = torch.randn(7, 10, dtype=torch.float64), torch.randn(7, 12, dtype=torch.float64)
    want = torch.autograd.grad(layer(x), layer.rotations, g)
    got = torch.autograd.grad(nn.functional.linear(x, layer.weight, layer.bias), layer.rotations, g)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("order", [3, "exact"])
def test_merge_preserves_the_function(order):
    layer = make(dtype=torch.float64, neumann_order=order, angle=0.1)
    x = torch.randn(9, 10, dtype=torch.float64)
    before, permutation = layer(x), layer.perm_in.clone()
    layer.merge_()
    error = relative_error(layer(x), before)
    assert error < TOLERANCE[torch.float64] if order == "exact" else 1e-12 < error < 1e-3
    assert not torch.equal(layer.perm_in, permutation)
    assert sorted(layer.perm_in.tolist()) == list(range(10))
    assert all(skew.eq(0).all() for skew in layer.rotations)
    assert layer.merge_count.item() == 1


def test_merge_is_the_same_everywhere_and_ignores_the_global_generator():
    layer = make(dtype=torch.bfloat16)
    twin = copy.deepcopy(layer)
    layer.merge_()
    torch.manual_seed(123)
    torch.randn(5)
    twin.merge_()
    for a, b in zip(layer.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    state = torch.get_rng_state()
    layer.merge_()
    assert torch.equal(state, torch.get_rng_state())


def test_layers_of_different_name_or_seed_draw_different_permutations():
    config = PoetConfig(block_size=4, init="normalized")
    layers = [
        PoetLinear(64, 64, config=config, name="a"),
        PoetLinear(64, 64, config=config, name="b"),
        PoetLinear(64, 64, config=PoetConfig(block_size=4, init="normalized", seed=1), name="a"),
    ]
    assert len({tuple(layer.perm_in.tolist()) for layer in layers}) == 3
    assert not torch.equal(layers[0].perm_in, layers[0].perm_out)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
def test_a_hundred_merges_keep_the_spectrum(dtype, limit):
    layer = make(m=96, n=64, dtype=dtype, block_size=32, bias=False, angle=0)
    start = torch.linalg.svdvals(layer.dense_weight().detach().double())
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        with torch.no_grad():
            for skew in layer.rotations:
                skew.normal_(std=0.3 / (2 * 31**0.5), generator=generator)
        layer.merge_()
    end = torch.linalg.svdvals(layer.dense_weight().detach().double())
    assert ((end - start).abs() / start).median() < limit
    assert abs(end.norm() / start.norm() - 1) < limit


def test_state_dict_round_trip_and_continue():
    layer = make()
    layer.merge_()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = PoetLinear(10, 12, config=layer.config, name="layer")
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(3, 10)
    assert torch.equal(layer(x), other(x))
    layer.merge_()
    other.merge_()
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("settings", [{}, INT8], ids=str)
def test_a_state_assigned_to_a_meta_model_brings_its_device(settings):
    layer = make(**settings)
    other = PoetLinear(10, 12, config=layer.config, name="layer", device="meta")
    other.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()}, assign=True)
    for each in (layer, other):
        each.merge_()
    x = torch.randn(3, 10)
    assert torch.equal(layer(x), other(x))
    assert other.to("cpu", torch.bfloat16).weight.dtype == torch.bfloat16


def test_a_state_assigned_brings_its_dtype_as_in_nn_linear():
    layer, other = make(dtype=torch.bfloat16), make()
    other.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 10).bfloat16()
    assert torch.equal(layer(x), other(x))
    assert other.weight_dtype == other.weight.dtype == torch.bfloat16


def test_deepcopy_and_pickle():
    layer, x = make(), torch.randn(3, 10)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        twin.merge_()
        assert layer.merge_count.item() == 0


def test_rotations_stay_float32_and_the_same_objects_under_casts():
    layer = make()
    skews, values = layer.rotations, [skew.detach().clone() for skew in layer.rotations]
    layer.to(torch.bfloat16)
    assert layer.base_weight.dtype == layer.bias.dtype == torch.bfloat16
    for skew, before, value in zip(layer.rotations, skews, values, strict=True):
        assert skew is before
        assert skew.dtype == torch.float32
        assert torch.equal(skew, value), "rounded on the way"
    assert layer(torch.randn(2, 10).bfloat16()).dtype == torch.bfloat16
    assert layer.double().skew_in.dtype == torch.float64
    assert layer.float().skew_in.dtype == torch.float32
    assert layer.perm_in.dtype == torch.int32


def test_bfloat16_rotations_when_asked_for():
    layer = make(rotation_dtype="bfloat16", dtype=torch.bfloat16)
    assert layer.skew_in.dtype == torch.bfloat16
    layer(torch.randn(2, 10).bfloat16()).sum().backward()
    assert layer.skew_in.grad.dtype == torch.bfloat16


def test_a_layer_of_float16_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"^layer: float16 is not supported.*bfloat16"):
        make(dtype=torch.float16)


def test_input_of_another_dtype_is_refused():
    with pytest.raises(RuntimeError, match=r"layer: input is torch\.float64, weight is torch\.float32"):
        make()(torch.randn(2, 10, dtype=torch.float64))


@EACH
def test_autocast_runs_in_bfloat16_and_gives_float32_gradients(settings):
    layer, x = make(**settings), torch.randn(5, 10, requires_grad=True)
    want = torch.autograd.grad(layer(x).sum(), [x, layer.bias, *layer.rotations])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    for a, b in zip(torch.autograd.grad(y.float().sum(), [x, layer.bias, *layer.rotations]), want, strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("tokens", [3, 50])
@EACH
def test_second_derivatives_are_refused_in_one_line(settings, tokens):
    layer, x = make(**settings), torch.randn(tokens, 10, requires_grad=True)
    with pytest.raises(UserError, match=r"^a converted layer has no second derivatives.*dense_weight.*$"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    y = x @ layer.dense_weight().T + layer.bias
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert layer.skew_in.grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
@EACH
def test_anomaly_mode_and_both_kinds_of_checkpointing_change_no_gradient(settings, reentrant):
    layer, x = make(**settings), torch.randn(5, 10, requires_grad=True)
    leaves = [x, layer.bias, *layer.rotations]
    want = torch.autograd.grad(layer(x).square().sum(), leaves)
    with torch.autograd.detect_anomaly(check_nan=True):
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    for leaf, gradient in zip(leaves, want, strict=True):
        assert torch.equal(leaf.grad, gradient)


@EACH
def test_meta_then_to_empty_then_reset_equals_built_on_the_device(settings):
    config = PoetConfig(block_size=4, init="normalized", **settings)
    built = PoetLinear(10, 12, config=config, name="layer")
    layer = PoetLinear(10, 12, config=config, name="layer", device="meta")
    layer.to_empty(device="cpu").reset_parameters()
    for a, b in zip(built.state_dict().values(), layer.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("m", "n"), [(12, 10), (10, 12), (8, 8)])
def test_initializations(m, n):
    normalized = make(m=m, n=n, init_scale=2.0, angle=0).dense_weight()
    torch.testing.assert_close(normalized.norm(dim=1), torch.full((m,), 2.0))
    uniform = make(m=m, n=n, init="uniform", angle=0).dense_weight()
    torch.testing.assert_close(torch.linalg.svdvals(uniform), torch.ones(min(m, n)))


@EACH
def test_compiles_to_one_graph_and_survives_merges_without_recompiling(settings):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    layer = make(**settings)
    model = nn.Sequential(layer, nn.SiLU(), nn.Linear(12, 3))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(6, 10, requires_grad=True)
    for _ in range(3):
        want = torch.autograd.grad(model(x).square().sum(), [x, *layer.rotations])
        got = torch.autograd.grad(compiled(x).square().sum(), [x, *layer.rotations])
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b) < TOLERANCE[torch.float32]
        layer.merge_()
        with torch.no_grad():
            layer.skew_in.normal_(std=0.05)
    assert counter.frame_count == 1


def test_mem_keeps_its_promise_under_the_compiler():
    """A compiler that saw inside would merge the recompute with the forward and keep its results."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    shapes = []

    def forward_compiler(graph, example_inputs):
        (output,) = [node for node in graph.graph.nodes if node.op == "output"]
        shapes.extend(tuple(arg.meta["val"].shape) for arg in output.args[0] if hasattr(arg, "meta"))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    layer = make("mem", m=24, n=16, bias=False, block_size=8)
    backend = aot_autograd(
        fw_compiler=forward_compiler,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    y = torch.compile(layer, backend=backend)(torch.randn(50, 16, requires_grad=True))
    y.sum().backward()
    assert shapes.count((50, 24)) == 1, f"the output, and nothing else of its size: {shapes}"
    assert all(len(shape) < 3 for shape in shapes), shapes


def test_extra_repr_names_the_sizes():
    assert "in_features=10, out_features=12, bias=True, block_size=(4, 4), mode='fast'" in repr(make())


@pytest.mark.parametrize(
    ("settings", "dtype", "kept"),
    [
        ({}, torch.bfloat16, True),
        ({}, torch.float32, False),
        ({"init": "normalized"}, torch.bfloat16, False),
        ({"init": "uniform", "weight_extra_bits": True}, torch.bfloat16, True),
        ({"weight_extra_bits": False}, torch.bfloat16, False),
        ({"mode": "mem", "weight_format": "int4"}, torch.float32, True),
        ({"mode": "mem", "weight_format": "nf4", "init": "normalized"}, torch.bfloat16, False),
        ({"mode": "mem", "weight_format": "fp8", "weight_extra_bits": False}, torch.bfloat16, False),
        ({"method": "single-step"}, torch.bfloat16, False),
    ],
    ids=str,
)
def test_converted_layers_keep_extra_bits_of_a_weight_that_was_there(settings, dtype, kept):
    model = nn.Sequential(nn.Linear(16, 12, dtype=dtype), nn.Linear(12, 12, dtype=dtype))
    config = PoetConfig(block_size=4, exclude_modules=("1",), **settings)
    assert PoetConfig.from_json(config.to_json()) == config
    convert_(model, config)
    assert any("residual" in name for name in model.state_dict()) == kept


@pytest.mark.parametrize("shape", ["flat", "power"])
def test_merges_keep_a_spectrum_with_small_values_by_default(shape):
    """Rounding noise of 30 merges alone moves singular values by percents, small ones most."""
    left, right = (torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0] for _ in range(2))
    values = torch.ones(64, dtype=torch.float64) if shape == "flat" else 1 / torch.arange(1, 65, dtype=torch.float64)
    linear = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    linear.weight.data = (left * values @ right).bfloat16()
    start, change = torch.linalg.svdvals(linear.weight.detach().double()), {}
    for extra_bits in (None, False):
        config = PoetConfig(block_size=16, weight_extra_bits=extra_bits)
        layer = PoetLinear.from_linear(linear, config=config, name="layer")
        for _ in range(30):
            with torch.no_grad():
                for skew in layer.rotations:
                    skew.normal_(std=0.3 / 8)
            layer.merge_()
        end = torch.linalg.svdvals(layer.frozen_weight.precise().detach().double())
        change[extra_bits] = float(((end - start).abs() / start).median())
    assert 10 * change[None] < 2e-3 < change[False], change


def test_merge_corrects_the_norm_and_reports_what_it_found():
    layer = make(dtype=torch.float32)
    with torch.no_grad():
        layer.base_weight.mul_(1.0005)
    stats = layer.merge_()
    assert float(stats.norm_ratio) == pytest.approx(1.0005, rel=1e-5)
    assert float(stats.angle) > 0
    assert float(layer.base_weight.norm() / layer.base_norm) == pytest.approx(1.0, rel=1e-6)
    assert float(layer.merge_().norm_ratio) == pytest.approx(1.0, rel=1e-5)


def entries(weight):
    return weight.detach().flatten().sort().values


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_a_cast_to_bfloat16_keeps_the_extra_bits_that_the_config_wants(wide):
    torch.manual_seed(0)
    linear = nn.Linear(10, 12, dtype=wide)
    for extra_bits, init in ((None, "keep"), (True, "normalized"), (None, "normalized"), (False, "keep")):
        config = PoetConfig(block_size=4, init=init, weight_extra_bits=extra_bits)
        layer = PoetLinear.from_linear(copy.deepcopy(linear), config=config, name="a")
        before = entries(layer.dense_weight())
        layer.to(torch.bfloat16)
        assert (layer.residual is not None) == config.keeps_extra_bits == ("residual" in layer.state_dict())
        error = relative_error(entries(layer.frozen_weight.precise()), before)
        assert error < 2e-5 if config.keeps_extra_bits else error > 2e-4
        layer.float().bfloat16()
        layer.merge_()  # permutes only, for the rotations are zero
        assert relative_error(entries(layer.frozen_weight.fetch()), before) < 4e-3


def test_a_pending_gradient_survives_a_cast():
    layer = make()
    layer(torch.randn(2, 10)).sum().backward()
    layer.bfloat16()
    assert layer.skew_in.grad.dtype == layer.skew_in.dtype == torch.float32
    assert layer.base_norm.dtype == torch.float64
    layer(torch.randn(2, 10).bfloat16()).sum().backward()
    torch.optim.AdamW(layer.rotations).step()


def test_default_device_does_not_leak_in():
    layer = make()
    with torch.device("meta"):
        layer.merge_()
    assert layer.base_weight.device.type == layer.perm_in.device.type == "cpu"
    assert layer.merge_count.item() == 1


def test_rounding_noise_differs_from_merge_to_merge():
    config = PoetConfig(block_size=4, init="normalized")
    noise = [stream(config.seed, "layer", count, "rounding").initial_seed() for count in range(3)]
    assert len(set(noise)) == 3
    layer = make(dtype=torch.bfloat16, m=64, n=64, angle=0)
    moves = []
    for _ in range(2):  # the same turn from the same weight, merged as first and as second
        twin = copy.deepcopy(layer)
        twin.merge_count.fill_(len(moves))
        with torch.no_grad():
            twin.skew_in[0, 0] = 0.1
        twin.merge_()
        moves.append(twin.dense_weight().detach())
    assert not torch.equal(*moves)


def test_float64_input_is_left_alone_by_autocast():
    layer = make(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 10, dtype=torch.float64)).dtype == torch.float64
