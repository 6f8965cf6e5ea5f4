"""Merging through the optimizer: one door, one counter, every torch optimizer."""

import copy
import math
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from builders import descend, function, gpt2, llama, mlp, turn
from helpers import TOLERANCE, relative_error
from poetx import PoetConfig, UserError, convert_, merge_, merge_every, param_groups, poet_layers, spectrum, to_dense_
from poetx.optim import SMMF, AdamW, HFac, build_optimizer

OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups),
    "adamw-foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
    "adamw-fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "sgd-momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "sgd-dampened": lambda groups: torch.optim.SGD(groups, momentum=0.9, dampening=0.5),
    "adafactor": lambda groups: torch.optim.Adafactor(groups),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, initial_accumulator_value=0.1),
    "nadam": lambda groups: torch.optim.NAdam(groups),  # whose state does not start at zero
    "int8": lambda groups: AdamW(groups, state_dtype="int8"),
    "smmf": lambda groups: SMMF(groups),
    "hfac": lambda groups: HFac(groups),
    "in-group": lambda groups: CountsInGroup(groups),
    "combined": lambda groups: build_optimizer(groups, "sgd", dense_optimizer="hfac", momentum=0.9),
}
#: Those whose state stays, as zeros.
KEPT = set(OPTIMIZERS) - {"sgd-dampened", "nadam", "in-group"}


class CountsInGroup(torch.optim.Optimizer):
    """Adam without its second moment, with the step count, and a size that it adapts, in the group."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr, "size": 1.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["size"] *= 0.9
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    m.lerp_(p.grad, 0.1)
                    p -= group["lr"] * group["size"] * m / (1 - 0.9 ** group["count"])


def converted(**config):
    model = mlp()
    convert_(model, PoetConfig(**({"block_size": 4} | config)))
    return model


def optimizer_for(model, name="adamw"):
    return OPTIMIZERS[name](param_groups(model, lr=1e-3, poet_lr=1e-2))


def step(model, optimizer, seed=0):
    x = torch.randn(8, 11, generator=torch.Generator().manual_seed(seed)).to(model[0].base_weight.dtype)
    loss = model(x).square().mean()
    descend(loss, optimizer)
    return loss.item()


@pytest.mark.parametrize("build", [llama, gpt2, mlp])
def test_merge_preserves_the_function_in_float64(build):
    model = build().double()
    convert_(model, PoetConfig(block_size=16, neumann_order="exact"))
    turn(model)
    before = function(model, torch.float64)
    merge_(model)
    assert relative_error(function(model, torch.float64), before) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_merge_resets_what_was_folded_and_nothing_else(name):
    model = converted()
    optimizer = optimizer_for(model, name)
    handle = merge_every(optimizer, model, steps=3)
    skew, bias = model[0].skew_in, model[0].bias
    for k in range(3):
        assert handle.steps_since_merge == k
        step(model, optimizer, seed=k)
    assert (handle.merges, handle.steps_since_merge) == (1, 0)
    assert skew.eq(0).all()
    assert (skew in optimizer.state) == (name in KEPT)
    assert bias in optimizer.state
    step(model, optimizer)
    if "step" in optimizer.state[bias]:
        assert float(optimizer.state[skew].get("step", 1)) == 1  # SGD, one of two, counts none
        assert float(optimizer.state[bias]["step"]) == 4
    assert skew.ne(0).any()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_first_step_after_a_merge_is_the_first_step_of_a_new_optimizer(name, direct):
    model = converted(neumann_order="exact")
    optimizer = optimizer_for(model, name)
    handle = merge_every(optimizer, model, steps=100 if direct else 3)
    for k in range(3):
        step(model, optimizer, seed=k)
    if direct:
        merge_(model, optimizer)
    twin = copy.deepcopy(model)
    fresh = optimizer_for(twin, name)
    for k in range(2):
        step(model, optimizer, seed=9 + k)
        step(twin, fresh, seed=9 + k)
        if k == 0:  # the second inputs differ, because biases go on
            for (_, a), (_, b) in zip(poet_layers(model), poet_layers(twin), strict=True):
                assert torch.equal(a.skew_in, b.skew_in)
                assert torch.equal(a.skew_out, b.skew_out)
    assert handle.merges == (0 if direct else 1)


def test_a_count_in_the_group_of_rotations_and_others_is_refused_at_the_first_step():
    model = converted()
    optimizer = CountsInGroup(p for p in model.parameters() if p.requires_grad)
    merge_every(optimizer, model, steps=50)
    with pytest.raises(UserError, match="CountsInGroup keeps 'count' in the parameter group"):
        step(model, optimizer)


class CountsInState(torch.optim.SGD):
    """Counts the steps of all its parameters in one entry of its state."""

    def step(self, closure=None):
        self.state["steps"] = self.state.get("steps", 0) + 1
        return super().step(closure)


class Wrapper(torch.optim.Optimizer):
    """An optimizer by its name only, as wrappers of other libraries are: torch's own ``__init__`` never ran."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups, self.state = optimizer.param_groups, optimizer.state
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}


def test_state_of_all_parameters_together_and_wrappers_are_refused():
    """Curvature of the frames before a merge stood with the first parameter, be it a rotation or not."""
    model = converted()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameters in (trained, trained[::-1]):
        optimizer = torch.optim.LBFGS(parameters)
        with pytest.raises(UserError, match="LBFGS keeps curvature of all parameters together"):
            merge_every(optimizer, model)
        with pytest.raises(UserError, match="LBFGS keeps"):
            merge_(model, optimizer)
    optimizer = CountsInState(param_groups(model, lr=1e-3, poet_lr=1e-3))
    merge_every(optimizer, model)
    with pytest.raises(UserError, match="CountsInState keeps 'steps' of all parameters together"):
        step(model, optimizer)
    inner = optimizer_for(model)
    for refused in (lambda: merge_every(Wrapper(inner), model), lambda: merge_(model, Wrapper(inner))):
        with pytest.raises(UserError, match="Wrapper only wraps an optimizer.* give the AdamW inside"):
            refused()
    assert all("merges" not in group for group in inner.param_groups)
    assert all(layer.merge_count == 0 for _, layer in poet_layers(model))
    merge_every(inner, model)


def test_stale_gradients_are_dropped():
    model = converted()
    optimizer = optimizer_for(model)
    model(torch.randn(3, 11)).sum().backward()
    merge_(model, optimizer)
    assert model[0].skew_in.grad is None
    assert model[0].bias.grad is not None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stop_and_resume_across_a_merge_is_bitwise_the_same(name):
    def start():
        torch.manual_seed(0)
        model = converted(init="normalized")
        optimizer = optimizer_for(model, name)
        return model, optimizer, merge_every(optimizer, model, steps=4)

    model, optimizer, _ = start()
    want = [step(model, optimizer, seed=k) for k in range(11)]

    for stop in (4, 7):  # right after a merge, and three steps after it
        model, optimizer, _ = start()
        got = [step(model, optimizer, seed=k) for k in range(stop)]
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        model, optimizer, handle = start()
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        assert handle.steps_since_merge == stop % 4
        assert handle.merges == stop // 4
        got += [step(model, optimizer, seed=k) for k in range(stop, 11)]
        assert got == want, stop
        for (_, a), (_, b) in zip(saved[0].items(), model.state_dict().items(), strict=True):
            assert a.shape == b.shape


def test_a_state_with_the_counters_where_they_once_were_goes_on_bitwise():
    def start():
        torch.manual_seed(0)
        model = converted(init="normalized")
        return model, (optimizer := optimizer_for(model)), merge_every(optimizer, model, steps=4)

    model, optimizer, _ = start()
    want = [step(model, optimizer, seed=k) for k in range(11)]
    for stop in (3, 4, 6):
        model, optimizer, handle = start()
        got = [step(model, optimizer, seed=k) for k in range(stop)]
        weights, old = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        old["poetx"] = {"steps_since_merge": handle.steps_since_merge, "merges": handle.merges}
        for group in old["param_groups"]:
            for key in old["poetx"]:
                group.pop(key, None)
        old["state"] = {k: v for k, v in old["state"].items() if float(v["step"])}  # entries were dropped at a merge
        model, optimizer, handle = start()
        model.load_state_dict(weights)
        optimizer.load_state_dict(old)
        assert (handle.steps_since_merge, handle.merges) == (stop % 4, stop // 4)
        assert got + [step(model, optimizer, seed=k) for k in range(stop, 11)] == want


@pytest.mark.parametrize(
    ("name", "every", "flat"),
    [
        *((name, 4, False) for name in sorted(KEPT - {"adagrad", "adamw-foreach"})),
        ("adamw", 4, True),
        ("adamw", 1, False),
    ],
)
def test_distributed_checkpoints_go_on_bitwise_in_objects_that_never_stepped(name, every, flat, tmp_path):
    def start():
        torch.manual_seed(0)
        model = converted(init="normalized")
        optimizer = optimizer_for(model, name)
        return model, optimizer, merge_every(optimizer, model, steps=every)

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer, _ = start()
    want = [step(model, optimizer, seed=k) for k in range(9)]
    for stop in (3, 4):  # 4: right after a merge
        model, optimizer, _ = start()
        for k in range(stop):
            step(model, optimizer, seed=k)
        weights, states = get_state_dict(model, optimizer, options=options)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=tmp_path / str(stop), no_dist=True)
        model, optimizer, handle = start()
        weights, states = get_state_dict(model, optimizer, options=options)
        target = {"model": weights, "optimizer": states}
        dcp.load(target, checkpoint_id=tmp_path / str(stop), no_dist=True)
        set_state_dict(
            model, optimizer, model_state_dict=target["model"], optim_state_dict=target["optimizer"], options=options
        )
        assert (handle.steps_since_merge, handle.merges) == (stop % every, stop // every)
        assert [step(model, optimizer, seed=k) for k in range(stop, 9)] == want[stop:]


def test_optimizer_state_without_the_counter_is_refused():
    model = converted()
    optimizer = optimizer_for(model)
    state = optimizer.state_dict()
    merge_every(optimizer, model, steps=3)
    with pytest.raises(UserError, match=r"saved without poetx\.merge_every"):
        optimizer.load_state_dict(state)


def test_removed_handle_merges_no_more():
    model = converted()
    optimizer = optimizer_for(model)
    handle = merge_every(optimizer, model, steps=1)
    other = build_optimizer(param_groups(model, lr=1e-3, poet_lr=1e-3), dense_optimizer="smmf")
    merge_every(other, model)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):  # torch would leave the handle out of the copy
        for merging in (optimizer, other):
            with pytest.raises(UserError, match="cannot be copied or pickled"):
                copied(merging)
    handle.remove()
    copy.copy(copy.deepcopy(optimizer))
    step(model, optimizer)
    assert model[0].merge_count.item() == 0
    assert all("merges" not in group for group in optimizer.param_groups)
    merge_every(optimizer, model, steps=1)


def test_refusals():
    model = converted()
    optimizer = optimizer_for(model)
    for steps in (0, -1, 2.5, True):
        with pytest.raises(UserError, match="must be a whole number"):
            merge_every(optimizer, model, steps=steps)
    for angle in (0, -0.3, math.nan, math.inf, True, "0.2", [0.2], 100, 10**400):
        with pytest.raises(UserError, match="must be above 0 and below 100, radians"):
            merge_every(optimizer, model, angle=angle)
    with pytest.raises(UserError, match=r"^angle=1\.5: the series that trains rotations ends below 1; 0\.3 is usual$"):
        merge_every(optimizer, model, angle=1.5)
    with pytest.raises(UserError, match=r"^angle=0\.2: has no effect with steps=1; leave it out"):
        merge_every(optimizer, model, steps=1, angle=0.2)
    with pytest.raises(UserError, match=r"0\.skew_in is not in this optimizer"):
        merge_every(torch.optim.SGD([model[0].bias], lr=1.0), model, steps=3)
    with pytest.raises(UserError, match="no PoetLinear"):
        merge_(mlp())
    with pytest.raises(UserError, match="no PoetLinear"):
        merge_every(optimizer, mlp(), steps=3)
    merge_every(optimizer, model, steps=3)
    with pytest.raises(UserError, match="already registered"):
        merge_every(optimizer, model, steps=3)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_param_groups_cover_every_parameter_once(weight_decay):
    model = llama(tie_word_embeddings=True)
    convert_(model, PoetConfig(block_size=16))
    groups = {g["name"]: g for g in param_groups(model, lr=1e-3, poet_lr=2e-3, weight_decay=weight_decay)}
    assert len(groups["rotations"]["params"]) == 2 * 14
    assert groups["rotations"]["lr"] == 2e-3
    assert groups["rotations"]["weight_decay"] == groups["no_decay"]["weight_decay"] == 0
    assert groups["decay"]["weight_decay"] == weight_decay
    assert [p.shape for p in groups["decay"]["params"]] == [(97, 48)]
    ids = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(ids) == sorted({id(p) for p in model.parameters() if p.requires_grad})


def test_param_groups_take_options_and_plain_models():
    model = converted()
    rotations = param_groups(model, lr=1e-3, poet_lr=1e-3, eps=1e-6, betas=(0.9, 0.99))[0]
    assert (rotations["eps"], rotations["betas"]) == (1e-6, (0.9, 0.99))
    assert [g["name"] for g in param_groups(mlp(), lr=1e-3, poet_lr=1e-3)] == ["decay", "no_decay"]
    model[0].requires_grad_(False)
    covered = [p for g in param_groups(model, lr=1e-3, poet_lr=1e-3) for p in g["params"]]
    assert all(p is not model[0].skew_in for p in covered)
    with pytest.raises(UserError, match="poet_lr=0: must be positive"):
        param_groups(model, lr=1e-3, poet_lr=0)
    with pytest.raises(UserError, match="no parameter that requires"):
        param_groups(mlp().requires_grad_(False), lr=1e-3, poet_lr=1e-3)


@pytest.mark.parametrize("settings", [{}, {"mode": "mem", "weight_format": "int8", "group_size": 16}])
def test_what_is_frozen_stays_to_the_bit_across_merges(settings):
    model = llama().bfloat16()
    convert_(model, PoetConfig(block_size=16, weight_extra_bits=False, **settings))
    turn(model)
    part = model.model.layers[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    reports = [merge_(model) for _ in range(3)]
    assert all(report.angle_layer.startswith("model.layers.1.") for report in reports)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith("model.layers.0.") for name in changed)
    assert {f"model.layers.1.{name}" for name, _ in poet_layers(part)} <= {name.rpartition(".")[0] for name in changed}
    model.requires_grad_(False)
    assert merge_(model).angle_layer == ""


@pytest.mark.parametrize("name", ["adamw", "adamw-fused"])
def test_gradient_scaler_that_skips_a_step_does_not_count_it(name):
    model = converted()
    optimizer = optimizer_for(model, name)
    handle = merge_every(optimizer, model, steps=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for bad in (True, False):
        loss = model(torch.randn(4, 11)).sum()
        scaler.scale(loss * (math.inf if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert handle.steps_since_merge == 1


@pytest.mark.parametrize("config", [{}, {"mode": "mem", "weight_format": "int8", "group_size": 4}], ids=str)
def test_unfreezing_everything_does_not_train_the_frozen_weight(config):
    model = converted(**config)
    model.requires_grad_(True)
    covered = {id(p) for group in param_groups(model, lr=1e-3, poet_lr=1e-3) for p in group["params"]}
    assert covered == {id(p) for _, layer in poet_layers(model) for p in (*layer.rotations, layer.bias)}


def test_spectrum_of_a_zero_weight():
    model = mlp()
    convert_(model, PoetConfig(block_size=4))
    nn.init.zeros_(model[2].base_weight)  # a zero weight before it stays dense
    start = spectrum(model)
    assert start["2"].entropy == 0
    merge_(model)
    after = spectrum(model, start)["2"]
    assert (after.norm_ratio, after.drift_max) == (1.0, 0.0)


@pytest.mark.parametrize("settings", [{}, {"weight_extra_bits": True}, {"weight_extra_bits": False}], ids=str)
@pytest.mark.parametrize("write", [lambda w: w.mul_(0.97), lambda w: w.data.add_(0.05), lambda w: w[1:].zero_()])
def test_a_weight_that_was_written_stays_as_written(write, settings, caplog):
    dtype = torch.bfloat16 if settings else torch.float32
    model = mlp().to(dtype)
    convert_(model, PoetConfig(block_size=4, neumann_order="exact", **settings))
    turn(model)
    for name in "04":
        with torch.no_grad():
            write(model.get_submodule(name).base_weight)
    before = [layer.dense_weight().detach() for _, layer in poet_layers(model)]
    with caplog.at_level("WARNING", logger="poetx.merge"):
        report = merge_(model)
    assert report.norm_drift > 0.01
    (record,) = caplog.records
    assert "0 and 1 more layers: the weight was written since the last merge" in record.getMessage()
    for (_, layer), weight in zip(poet_layers(model), before, strict=True):
        assert relative_error(layer.dense_weight(), weight) < (5e-3 if settings else 1e-5)
    for _ in range(2):  # and the norm that it has is held from now on
        merge_(model)
    assert len(caplog.records) == 1
    for (_, layer), weight in zip(poet_layers(model), before, strict=True):
        assert float(layer.dense_weight().detach().norm() / weight.norm()) == pytest.approx(1, abs=1e-3)


def test_spectrum_reports_drift_against_a_reference():
    model = converted(init="normalized", neumann_order="exact").double()
    start = spectrum(model)
    turn(model, angle=1.0)
    merge_(model)
    after = spectrum(model, start)
    assert set(after) == {"0", "2", "4"}
    for layer in after.values():
        assert layer.drift_max < 1e-12
        assert abs(layer.norm_ratio - 1) < 1e-12
        assert 0 < layer.entropy <= 1
    with torch.no_grad():
        model[0].base_weight.mul_(1.5)
    moved = spectrum(model, start)["0"]
    assert moved.drift_median == pytest.approx(0.5)
    assert moved.norm_ratio == pytest.approx(1.5)
    with pytest.raises(UserError, match="no converted layer"):
        spectrum(mlp())
    with pytest.raises(UserError, match="no such layer"):
        spectrum(model, {})


def test_merge_reports_the_angle_and_warns_where_the_series_fails(caplog):
    model = converted()
    assert merge_(model).angle == 0
    with torch.no_grad():
        model[2].skew_in[0, 0] = 0.5  # one pair of eigenvalues ±0.5i
    with caplog.at_level("WARNING", logger="poetx.merge"):
        report = merge_(model)
    assert report.angle == pytest.approx(0.5, rel=1e-3)
    assert report.angle_layer == "2"
    assert report.series_error == pytest.approx(0.5**4, rel=1e-2)
    assert report.norm_drift < 1e-5
    assert "2: rotations reached an angle of 0.50" in caplog.text
    assert "use neumann_order=7" in caplog.text


@pytest.mark.parametrize(("rate", "merges"), [(0.1, list(range(1, 10))), (0.03, [4, 8]), (1e-4, [])])
def test_large_angles_are_merged_early(rate, merges):
    model = converted(init="normalized")
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-4, poet_lr=rate))
    handle = merge_every(optimizer, model, steps=100, angle=0.2)
    seen = []
    for number in range(1, 10):
        before = handle.merges
        step(model, optimizer, seed=number)
        if handle.merges > before:
            seen.append(number)
            assert 0.2 < handle.report.angle < 0.5
    assert seen == merges
    assert handle.steps_since_merge == 9 - sum(merges[-1:])


def test_an_angle_below_one_steps_turn_is_said_once(caplog):
    model = converted(init="normalized")
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-4, poet_lr=0.1))
    handle = merge_every(optimizer, model, steps=100, angle=0.05)
    for number in range(12):
        step(model, optimizer, seed=number)
    assert handle.merges == 12
    said = [r.getMessage() for r in caplog.records if "merges after every step" in r.getMessage()]
    assert said == [
        "merge_every: one step turns rotations by more than angle=0.05, so it merges after every step; give a larger "
        "angle (0.3 is usual) or a smaller rate of the rotations"
    ]


def test_frozen_rotations_are_not_looked_at():
    model = converted(init="normalized")
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-4, poet_lr=0.1))
    handle = merge_every(optimizer, model, steps=20, angle=0.01)
    for layer in dict(poet_layers(model)).values():
        layer.skew_in.requires_grad_(False)
        layer.skew_out.requires_grad_(False)
    for number in range(20):
        step(model, optimizer, seed=number)
    assert handle.merges == 1  # of the usual 20 steps


def trained(model, steps):
    """The model after two steps, with its optimizer, which merges every so many steps."""
    optimizer = torch.optim.SGD(param_groups(model, lr=1e-2, poet_lr=0.5), momentum=0.5)
    merge_every(optimizer, model, steps=steps)
    for _ in range(2):
        descend(model(torch.randn(4, 11)).square().sum(), optimizer)
    return optimizer


def converted_mlp():
    model = mlp()
    convert_(model, PoetConfig(block_size=4))
    return model


@pytest.mark.parametrize("names", [None, ["2"]])
def test_steps_of_layers_that_went_dense_are_refused(names):
    model = converted_mlp()
    optimizer = trained(model, 100)
    to_dense_(copy.deepcopy(model))
    descend(model(torch.ones(4, 11)).sum(), optimizer)
    to_dense_(model, names)
    model(torch.ones(4, 11)).sum().backward()
    with pytest.raises(UserError, match=r"made dense by to_dense_, and this optimizer holds their rotations"):
        optimizer.step()


def test_layers_that_came_later_are_found_at_the_next_merge():
    model = converted_mlp()
    optimizer = trained(model, 3)
    model[2] = copy.deepcopy(model[2])
    model(torch.ones(4, 11)).sum().backward()
    with pytest.raises(UserError, match=r"^2\.skew_in is not in this optimizer"):
        optimizer.step()


def test_rotations_of_another_model_in_the_same_optimizer_are_merged_or_refused():
    both = nn.ModuleList([converted_mlp(), converted_mlp()])
    groups = [group for model in both for group in param_groups(model, lr=1e-2, poet_lr=0.1)]
    optimizer = torch.optim.SGD(groups)
    with pytest.raises(UserError, match=r"rotations of another model.*nn\.ModuleList"):
        merge_every(optimizer, both[0], steps=1)
    merge_every(optimizer, both, steps=1)
    descend(sum(model(torch.ones(4, 11)).sum() for model in both), optimizer)
    assert [int(layer.merge_count) for _, layer in poet_layers(both)] == 6 * [1]


@pytest.mark.parametrize("how", ["AveragedModel", "state dict"])
@pytest.mark.parametrize("across", [True, False])
def test_an_average_across_a_merge_is_warned_of(how, across, caplog):
    model = converted_mlp()
    average = torch.optim.swa_utils.AveragedModel(model)
    trained(model, 2 if across else 100)
    if how == "AveragedModel":
        average.n_averaged += 1
        average.update_parameters(model)
        model = average
    else:
        start, end = average.module.state_dict(), model.state_dict()
        mean = {key: (value + end[key]) / 2 if value.is_floating_point() else end[key] for key, value in start.items()}
        model.load_state_dict(mean)
    for _ in range(2):
        model.eval()(torch.ones(4, 11))
    warnings = [record.getMessage() for record in caplog.records if "average of models" in record.getMessage()]
    assert len(warnings) == across, warnings


def spoken_of(caplog):
    return [record.getMessage() for record in caplog.records if "average of models" in record.getMessage()]


def mean_by_torch(model, step):
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(5):
        step()
        average.update_parameters(model)
    return average.eval()


def mean_that_is_put_in(model, step):
    mean = [p.detach().clone() for p in model.parameters()]
    for _ in range(5):
        step()
        for kept, p in zip(mean, model.parameters(), strict=True):
            kept.lerp_(p.detach(), 0.5)
    for kept, p in zip(mean, model.parameters(), strict=True):
        p.data.copy_(kept)
    return model.eval()


def mean_put_in_between_evaluations(model, step):
    """As Lightning's StochasticWeightAveraging does."""
    mean = [p.detach().clone() for p in model.parameters()]
    for _ in range(5):
        step()
        for kept, p in zip(mean, model.parameters(), strict=True):
            kept.lerp_(p.detach(), 0.5)
    model.eval()(torch.ones(4, 11))
    for kept, p in zip(mean, model.parameters(), strict=True):
        p.detach().copy_(kept)
    return model


def momentum_encoder(model, step):
    encoder = copy.deepcopy(model)
    for _ in range(5):
        step()
        for kept, p in zip(encoder.parameters(), model.parameters(), strict=True):
            kept.data.mul_(0.5).add_(p.data, alpha=0.5)
    return encoder  # in train(), as ever


MEANS = {
    "AveragedModel": mean_by_torch,
    "put in": mean_that_is_put_in,
    "put in later": mean_put_in_between_evaluations,
    "momentum encoder": momentum_encoder,
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("mean", MEANS)
def test_an_average_of_parameters_alone_is_warned_of(mean, across, packed, caplog):
    if packed and mean.startswith("put in"):
        pytest.skip("the model itself has no original, and codes no norm")
    model = mlp()
    convert_(model, PoetConfig(block_size=4, **({"mode": "mem", "weight_format": "int8"} if packed else {})))
    optimizer = torch.optim.SGD(param_groups(model, lr=1e-2, poet_lr=0.5))
    merge_every(optimizer, model, steps=2 if across else 100)
    model = MEANS[mean](model, lambda: descend(model(torch.randn(4, 11)).square().sum(), optimizer))
    with torch.no_grad():
        for _ in range(3):
            model(torch.ones(4, 11))
    assert len(spoken_of(caplog)) == across, caplog.text


def test_copies_that_are_no_average_are_not_spoken_of(caplog):
    model = converted_mlp()
    reference, target, other = (copy.deepcopy(model) for _ in range(3))
    for _ in range(2):
        trained(model, 2)
        trained(other, 100)  # goes its own way, and merges later
        target.load_state_dict(model.state_dict())
        for copied in (reference, target, other.eval(), model.eval()):
            with torch.no_grad():
                copied(torch.ones(4, 11))
        model.train(), other.train()
    assert not spoken_of(caplog)


@pytest.mark.parametrize("how", ["merge_", "load_dense_", "reset_parameters", "plain state"])
@pytest.mark.parametrize("name", ["adamw", "sgd-dampened", "int8", "combined"])
def test_an_optimizer_that_was_not_told_of_a_new_base_starts_its_rotations_anew(name, how, caplog):
    model = converted_mlp()
    optimizer = OPTIMIZERS[name](param_groups(model, lr=1e-2, poet_lr=0.1))
    for _ in range(2):
        descend(model(torch.randn(4, 11)).square().sum(), optimizer)
    if how == "merge_":
        merge_(model)
    elif how == "plain state":
        model.load_state_dict(to_dense_(copy.deepcopy(model)).state_dict())
    else:
        for layer in dict(poet_layers(model)).values():
            layer.reset_parameters() if how == "reset_parameters" else layer.load_dense_(layer.dense_weight())
    twin = copy.deepcopy(model)
    fresh = OPTIMIZERS[name](param_groups(twin, lr=1e-2, poet_lr=0.1))
    batch = torch.randn(4, 11)
    for each, stepped in ((model, optimizer), (twin, fresh)):
        descend(each(batch).square().sum(), stepped)
    for (_, layer), (_, new) in zip(poet_layers(model), poet_layers(twin), strict=True):
        assert torch.equal(layer.skew_in, new.skew_in)
        assert layer.skew_in.any()
    said = [record.getMessage() for record in caplog.records if "without the optimizer" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("0 and 2 more layers: merged, or given another weight")


def test_an_optimizer_that_was_told_or_is_new_loses_nothing(caplog):
    model = converted_mlp()
    trained(model, 100)
    merge_(model)
    optimizer = trained(model, 100)  # a new one
    merge_(model)
    merge_(model, optimizer)
    descend(model(torch.ones(4, 11)).sum(), optimizer)
    best, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    merge_(model)
    model.load_state_dict(best)
    optimizer.load_state_dict(states)
    momentum = optimizer.state[model[0].skew_in]["momentum_buffer"].clone()
    model(torch.ones(4, 11)).sum().backward()
    grad = model[0].skew_in.grad.clone()
    optimizer.step()
    assert momentum.any()
    assert torch.allclose(optimizer.state[model[0].skew_in]["momentum_buffer"], 0.5 * momentum + grad)
    assert "without the optimizer" not in caplog.text


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_rotations_that_decay_are_said(decay, caplog):
    model = converted_mlp()
    merge_every(torch.optim.AdamW(model.parameters(), weight_decay=decay), model)
    assert ("weight_decay=0.01 of the rotations pulls them back" in caplog.text) == bool(decay)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weight_decay": 0.1}, "AdamW's weight_decay=0.1 is without effect: every parameter group has its own (0)"),
        ({"lr": 3e-4}, "AdamW's lr=0.0003 is without effect: every parameter group has its own (0.001, 0.01)"),
        ({"lr": 1e-2, "weight_decay": 0.0, "betas": (0.8, 0.9), "eps": 1e-6}, ""),  # eps and betas reach all
        ({"lr": torch.tensor(3e-4), "foreach": False}, ""),
    ],
)
@pytest.mark.parametrize("warmup", [False, True])
def test_arguments_of_the_optimizer_that_no_group_takes_are_said(settings, said, warmup, caplog):
    model = converted_mlp()
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, poet_lr=1e-2), **settings)
    if warmup:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    merge_every(optimizer, model)
    assert ("without effect" in caplog.text) == bool(said)
    assert said in caplog.text


def test_counters_of_a_state_that_was_loaded_first_are_kept():
    model = converted_mlp()
    optimizer = torch.optim.SGD(param_groups(model, lr=1e-2, poet_lr=1e-2))
    merge_every(optimizer, model, steps=4)
    for _ in range(7):
        descend(model(torch.ones(4, 11)).sum(), optimizer)
    again = torch.optim.SGD(param_groups(model, lr=1e-2, poet_lr=1e-2))
    again.load_state_dict(optimizer.state_dict())
    handle = merge_every(again, model, steps=4)
    assert (handle.steps_since_merge, handle.merges) == (3, 1)


def test_what_keeps_its_state_elsewhere_is_refused():
    model = converted()

    class Zero(torch.optim.Optimizer):
        """As ZeroRedundancyOptimizer, which has each rank's part of the state in an optimizer of its own."""

        def __init__(self, groups):
            super().__init__(groups, {})
            self.optim = torch.optim.AdamW(self.param_groups)

    with pytest.raises(UserError, match=r"^Zero keeps its state in an AdamW of its own, .* could not reset"):
        merge_every(Zero(param_groups(model, lr=1e-3, poet_lr=1e-2)), model, steps=3)


def test_an_average_over_a_merge_is_said_when_it_is_exported_at_once(caplog):
    model = converted(init="normalized")
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, poet_lr=0.1))
    merge_every(optimizer, model, steps=2)
    average = torch.optim.swa_utils.AveragedModel(model)
    for number in range(6):
        step(model, optimizer, seed=number)
        average.update_parameters(model)
    caplog.clear()
    to_dense_(copy.deepcopy(average.module))
    assert any("it reaches across a merge and means nothing" in r.getMessage() for r in caplog.records)
    caplog.clear()
    to_dense_(copy.deepcopy(model))
    assert not caplog.records
    for p, q in zip(model.parameters(), average.module.parameters(), strict=True):
        p.data.copy_(q.data)
    to_dense_(model)
    assert any("it reaches across a merge and means nothing" in r.getMessage() for r in caplog.records)


def test_a_model_loaded_over_a_merge_without_its_optimizer_is_said(caplog):
    model = converted(init="normalized")
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, poet_lr=1e-2))
    merge_every(optimizer, model, steps=3)
    saved = []
    for number in range(5):
        step(model, optimizer, seed=number)
        saved.append((copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())))

    def said(*states):
        caplog.clear()
        model.load_state_dict(states[0])
        for state in states[1:]:
            optimizer.load_state_dict(state)
        step(model, optimizer)
        return [r.getMessage() for r in caplog.records if "other side of a merge" in r.getMessage()]

    assert not said(*saved[4])
    assert not said(*saved[1])
    assert not said(*saved[3])
    assert not said(saved[4][0])  # from the same side
    assert not said(*saved[3])
    assert len(said(saved[1][0])) == 1
    assert not said(*saved[4])
