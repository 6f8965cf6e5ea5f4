"""PoetLinear over a quantized base: the same layer, in a fraction of the memory."""

import copy
import io

import pytest
import torch
from torch import nn

from helpers import TOLERANCE, relative_error
from poetx import PoetConfig, PoetLinear, UserError, convert_, to_dense_
from poetx.config import WEIGHT_FORMATS
from poetx.layers.base import fresh_weight
from poetx.memory.tracker import StorageTracker, followed


def make(weight_format="int8", *, m=24, n=20, dtype=torch.float32, bias=True, angle=0.2, **config):
    settings = {"block_size": 8, "init": "normalized", "mode": "mem", "group_size": 8} | config
    layer = PoetLinear(
        n, m, bias, config=PoetConfig(weight_format=weight_format, **settings), name="layer", dtype=dtype
    )
    with torch.no_grad():
        for skew in layer.rotations:
            skew.normal_(std=angle / 4, generator=torch.Generator().manual_seed(0))
        if bias:
            layer.bias.normal_()
    return layer


def twin_in_mem(layer, dtype):
    """The same layer with the dequantized weight stored as it is."""
    config = PoetConfig(block_size=8, mode="mem", init="normalized")
    twin = PoetLinear(layer.in_features, layer.out_features, config=config, name="layer", dtype=dtype)
    state = {k: v for k, v in layer.state_dict().items() if not k.startswith("packed_weight")}
    twin.load_state_dict(state | {"base_weight": layer.packed_weight.fetch().to(dtype)})
    return twin


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_forward_and_backward_are_those_of_the_dequantized_weight(weight_format, dtype):
    layer = make(weight_format, dtype=dtype)
    twin = twin_in_mem(layer, dtype)
    x = torch.randn(2, 5, 20, dtype=dtype, requires_grad=True)
    g = torch.randn(2, 5, 24, dtype=dtype)
    results = []
    for module in (layer, twin):
        y = module(x)
        results.append([y, *torch.autograd.grad(y, [x, module.bias, *module.rotations], g)])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    if dtype == torch.float64:
        want = nn.functional.linear(x, layer.dense_weight(), layer.bias)
        assert relative_error(results[0][0], want) < TOLERANCE[dtype]


def test_nothing_of_the_weights_size_in_high_precision_is_saved():
    layer = make(m=64, n=48)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(50, 48, requires_grad=True))
    assert all(t.numel() < 64 * 48 for t in saved if t.is_floating_point() and t.shape[0] != 50)
    assert all(t.shape != (50, 64) for t in saved)
    stored = [layer.packed_weight.codes.data_ptr(), layer.packed_weight.scale.data_ptr()]
    assert {t.data_ptr() for t in saved} >= set(stored)


@pytest.mark.parametrize("residual", [False, True])
def test_at_most_one_layers_weight_is_alive_in_high_precision(residual):
    """Followed storage by storage through forward, backward, step and merge of three layers."""
    from poetx import merge_
    from poetx.ops.library import transparent_operators

    size = 256
    settings = {"block_size": 16, "group_size": 64, "weight_extra_bits": residual}
    model = nn.Sequential(*(make(m=size, n=size, bias=False, **settings) for _ in range(3)))
    alive = {}

    class Watch(StorageTracker):
        def _add(self, storage, is_meta=False):
            record = super()._add(storage, is_meta)
            if record is not None and storage.nbytes() >= 2 * size * size:  # codes are half as large
                record.category = record.category or "weight"
                now = sum(r.size for r in self._alive.values() if r.category == "weight")
                alive[self.phase] = max(alive.get(self.phase, 0), now)
            return record

    tracker = Watch()
    with transparent_operators(), tracker, followed(tracker, model):
        x = torch.randn(8, size, requires_grad=True)
        tracker.enter_phase("forward")
        y = model(x)
        between = [r for r in tracker._alive.values() if r.category == "weight"]
        tracker.enter_phase("backward")
        y.sum().backward()
        tracker.enter_phase("merge")
        merge_(model)
    assert between == []
    one = 4 * size * size
    assert one <= alive["forward"] <= 2 * one  # the weight, and one slice of it before it is rounded
    assert one <= alive["backward"] <= 2 * one
    assert alive["merge"] <= 6 * one  # the fold's copies: of this layer, not of three


def test_storage_is_integers_and_scales():
    layer = make("int4", m=64, n=64, group_size=64)
    state = layer.state_dict()
    assert {k: v.dtype for k, v in state.items() if "packed" in k} == {
        "packed_weight.codes": torch.uint8,
        "packed_weight.scale": torch.bfloat16,
        "packed_weight.offset": torch.bfloat16,
        "packed_weight.weight_format": torch.uint8,  # the name
        "packed_weight.group_size": torch.int64,
    }
    assert state["packed_weight.codes"].shape == (64, 32)
    assert "base_weight" not in state
    assert all(p.numel() < 64 * 64 for p in layer.parameters())


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("weight_format", ["int8", "nf4", "bipolar-int3"])
def test_save_load_continue_deepcopy_and_casts(weight_format, residual, tmp_path):
    from safetensors.torch import load_file, save_file

    layer = make(weight_format, weight_extra_bits=residual)
    layer.merge_()
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = make(weight_format, weight_extra_bits=residual)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    x = torch.randn(3, 20)
    for twin in (other, copy.deepcopy(layer)):
        assert torch.equal(twin(x), layer(x))
        reference = copy.deepcopy(layer)
        for each in (reference, twin):
            with torch.no_grad():
                each.skew_in.fill_(0.01)
            each.merge_()
        for a, b in zip(reference.state_dict().values(), twin.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    before = {k: v.clone() for k, v in layer.state_dict().items() if "packed" in k}
    layer.to(torch.bfloat16)
    assert layer(x.bfloat16()).dtype == layer.weight.dtype == layer.weight_dtype == torch.bfloat16
    layer.double().float()
    for key, value in before.items():
        assert layer.state_dict()[key].dtype == value.dtype
        assert torch.equal(layer.state_dict()[key], value)


def test_a_state_of_another_format_is_refused_and_one_that_does_not_say_is_taken():
    layer = make("nf4", weight_extra_bits=True)
    state = layer.state_dict()
    with pytest.raises(UserError, match=r"^packed_weight: the state is of weight_format='nf4', .*'bipolar-int4'; .*$"):
        make("bipolar-int4", weight_extra_bits=True).load_state_dict(state)
    for old in (state, {k: v for k, v in state.items() if not k.endswith("weight_format")}):
        other = make("nf4", weight_extra_bits=True)
        assert str(other.load_state_dict(old)) == "<All keys matched successfully>"
        assert torch.equal(other.packed_weight.codes, layer.packed_weight.codes)
    assert "packed_weight.weight_format" in state, "the caller's own was changed"


def test_three_hundred_merges_hold_the_norm():
    """Stored ‖W‖ over ‖W0‖ after each merge, int8: within 0.5 % of 1 in the mean over them."""
    layer = make(m=64, n=64, bias=False, angle=0, block_size=16, group_size=64)
    generator, ratios = torch.Generator().manual_seed(1), []
    for _ in range(300):
        with torch.no_grad():
            for skew in layer.rotations:
                skew.normal_(std=0.1 / (2 * 15**0.5), generator=generator)
        layer.merge_()
        ratios.append(float(layer.packed_weight.fetch().norm() / layer.base_norm))
    assert abs(sum(ratios) / len(ratios) - 1) < 5e-3
    assert max(abs(r - 1) for r in ratios) < 5e-3


@pytest.mark.parametrize("weight_format", ["int8", "int4", "nf4", "bipolar-int3"])
def test_the_residual_changes_what_merges_keep_and_not_what_forward_sees(weight_format):
    plain, residual = (make(weight_format, bias=False, weight_extra_bits=kept) for kept in (False, True))
    x = torch.randn(3, 20)
    assert torch.equal(plain(x), residual(x))
    assert torch.equal(plain.dense_weight(), residual.dense_weight())
    native = fresh_weight(plain.config, 24, 20, "layer")[plain.perm_out.long()][:, plain.perm_in.long()]
    lost = relative_error(residual.packed_weight.fetch(), native)
    assert relative_error(residual.packed_weight.precise(), native) < 0.1 * lost

    state = residual.state_dict()
    extra = {key: value.dtype for key, value in state.items() if key not in plain.state_dict()}
    own = {"codes": torch.uint8, "scale": torch.bfloat16, "weight_format": torch.uint8, "group_size": torch.int64}
    assert extra == {f"packed_weight.residual.{key}": dtype for key, dtype in own.items()}
    assert state["packed_weight.residual.codes"].shape == (24, 10)


@pytest.mark.parametrize(("weight_format", "gain"), [("int8", 5), ("int4", 4)])
def test_thirty_merges_lose_far_less_with_a_residual(weight_format, gain):
    """Against a float32 layer that folds the same rotations: the error of what forward multiplies by."""
    settings = {"m": 64, "n": 64, "bias": False, "angle": 0, "block_size": 16, "group_size": 64}
    config = PoetConfig(block_size=16, mode="mem", init="normalized")
    exact = PoetLinear(64, 64, bias=False, config=config, name="layer")
    layers = [exact, *(make(weight_format, **settings, weight_extra_bits=kept) for kept in (False, True))]
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        drawn = [torch.randn(skew.shape, generator=generator) * 0.1 / (2 * 15**0.5) for skew in exact.rotations]
        for layer in layers:
            with torch.no_grad():
                for skew, value in zip(layer.rotations, drawn, strict=True):
                    skew.copy_(value)
            layer.merge_()
    plain, residual = (relative_error(layer.dense_weight(), exact.dense_weight()) for layer in layers[1:])
    assert gain * residual < plain


#: Largest relative error of a small MLP's output after conversion to a format of groups of 64.
LOGITS = {"int8": 0.02, "fp8": 0.06, "bipolar-int8": 0.02, "int4": 0.25, "nf4": 0.25, "bipolar-int4": 0.3}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("weight_format", LOGITS)
def test_conversion_preserves_the_function_within_the_format_and_export_within_bfloat16(weight_format, residual):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64), nn.SiLU(), nn.Linear(64, 64)).bfloat16()
    x = torch.randn(32, 64).bfloat16()
    before = model(x)
    config = PoetConfig(
        block_size=16, mode="mem", weight_format=weight_format, group_size=64, weight_extra_bits=residual
    )
    report = convert_(model, config)
    assert [layer.name for layer in report.converted] == ["0", "2", "4"]
    assert 0 < relative_error(model(x), before) < LOGITS[weight_format]
    with torch.no_grad():
        model[2].skew_in.normal_(std=0.02)
    quantized = model(x)
    to_dense_(model)
    assert {type(m) for m in model if not isinstance(m, nn.SiLU)} == {nn.Linear}
    assert model[0].weight.dtype == torch.bfloat16
    assert relative_error(model(x), quantized) < TOLERANCE[torch.bfloat16]


def test_fast_is_refused_with_the_reason():
    with pytest.raises(UserError, match=r"mode='fast' with weight_format='int8'.*use mode='mem'"):
        PoetConfig(weight_format="int8")
    with pytest.raises(UserError, match="weight_format='int9'.*did you mean 'int8'"):
        PoetConfig(weight_format="int9", mode="mem")
    with pytest.raises(UserError, match="group_size=1"):
        PoetConfig(weight_format="int8", mode="mem", group_size=1)


def test_distributed_checkpoint_restores_a_quantized_model(tmp_path):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    def model(seed, group_size=8):
        torch.manual_seed(seed)
        made = nn.Sequential(nn.Linear(20, 24), nn.Linear(24, 20))
        config = PoetConfig(block_size=8, mode="mem", weight_format="nf4", group_size=group_size)
        convert_(made, config)
        return made

    first, second, other = model(0), model(1), model(1, group_size=10)
    checkpoint.save(get_model_state_dict(first), checkpoint_id=tmp_path, no_dist=True)
    for target in (second, other):
        state = get_model_state_dict(target)
        if target is other:
            state = {key: value for key, value in state.items() if "group_size" in key}
        checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
        if target is other:
            with pytest.raises(UserError, match="group_size=8, the layer of 10"):
                target.load_state_dict(state, strict=False)
        else:
            set_model_state_dict(target, state)
    x = torch.randn(3, 20)
    assert torch.equal(first(x), second(x))
