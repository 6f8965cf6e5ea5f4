"""What is taken back, and what an exception leaves: each matrix as before or stepped, never between."""

import contextlib
import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from benchmarks.stream_stress import LateQueue, LateReturn, in_host_memory
from torch import nn

from builders import descend, mlp
from poetx import POETX, PoetConfig, UserError, convert_
from poetx.optim import SMMF

OWN = ("/poetx/optim/single_step/", "/poetx/ops/transaction", "/poetx/ops/host")  # the optimizer's files
FORMS = {
    "layers": {"converted": True},
    "layers, bfloat16 momentum": {"converted": True, "momentum_dtype": "bfloat16"},
    "layers, rotations, no look-ahead": {"converted": True, "nesterov": False, "update": "rotation"},
    "layers in host memory": {"converted": True, "hosted": True},
    "drop-in": {},
    "released, rotations": {"release_gradients": True, "update": "rotation"},
    "released, bfloat16 weights": {"release_gradients": True, "dtype": torch.bfloat16},
}


def start(*, converted=False, hosted=False, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = mlp().to(dtype)
    if converted:
        narrow, update = settings.pop("momentum_dtype", "float32"), settings.pop("update", "free")
        convert_(model, PoetConfig(method="single-step", block_size=4, rotation_dtype=narrow, update=update))
        if hosted:
            in_host_memory(model, LateQueue())
    else:
        settings["block_size"] = 4
    return model, POETX(model, **settings)


def backward(model, seed):
    x = torch.randn(5, 11, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)
    model(x).exp().mean().backward()


def train(model, optimizer, seeds):
    for seed in seeds:
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()


def kept(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.plain_state_dict()["state"]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_step_that_is_discarded_leaves_nothing(form, steps):
    runs = []
    for skip in (False, True):
        model, optimizer = start(**FORMS[form])
        train(model, optimizer, range(steps))
        if skip:
            before = kept(model, optimizer)
            optimizer.snapshot()
            for part in range(3):
                backward(model, 100 + part)
            optimizer.discard()
            torch.testing.assert_close(kept(model, optimizer), before, rtol=0, atol=0)
            optimizer.step()  # nothing came since
            torch.testing.assert_close(kept(model, optimizer), before, rtol=0, atol=0)
        train(model, optimizer, range(50, 54))
        runs.append(kept(model, optimizer))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("there", ["rotation", "free"])
def test_the_state_of_another_update_is_refused_by_its_name(there, block_size):
    here = "free" if there == "rotation" else "rotation"
    saved = POETX(mlp(), block_size=block_size, update=there).state_dict()
    optimizer = POETX(mlp(), block_size=block_size, update=here)
    before = optimizer.plain_state_dict()["state"]
    with pytest.raises(UserError, match=f"saved with update='{there}', and this one has update='{here}'"):
        optimizer.load_state_dict(saved)
    torch.testing.assert_close(optimizer.plain_state_dict()["state"], before, rtol=0, atol=0)


@pytest.mark.parametrize("build", ["model", "groups"])
def test_the_state_of_other_optimizers_is_refused_when_it_is_loaded(build):
    def poetx(dense=None):
        model = mlp() if build == "model" else [{"params": [p], "rotate": p.ndim == 2} for p in mlp().parameters()]
        return POETX(model, block_size=4, dense_optimizer=dense)

    dense = {"SGD": lambda groups: torch.optim.SGD(groups, lr=0.1), "SMMF": SMMF, "AdamW of torch": None}
    for here, one in dense.items():
        optimizer = poetx(one)
        for there, other in dense.items():
            if there == here:
                optimizer.load_state_dict(poetx(other).state_dict())
                continue
            with pytest.raises(UserError, match=f"^POETX: this state was saved by {there}.* here {here} steps"):
                optimizer.load_state_dict(poetx(other).state_dict())
        plain = torch.optim.AdamW([{"params": group["params"]} for group in optimizer.param_groups])
        with pytest.raises(UserError, match="saved by another optimizer, or with other matrices"):
            optimizer.load_state_dict(plain.state_dict())


def test_without_a_snapshot_nothing_is_taken_back_in_silence():
    model, optimizer = start(converted=True)
    optimizer.discard()
    backward(model, 0)
    with pytest.raises(UserError, match=r"call snapshot\(\) before the first backward"):
        optimizer.discard()
    optimizer.snapshot()
    optimizer.step()
    optimizer.zero_grad()
    backward(model, 1)  # the snapshot was of the step before
    with pytest.raises(UserError, match="snapshot"):
        optimizer.discard()


def interrupted(step, line):
    """Call ``step`` with a KeyboardInterrupt at the so many-th line of the optimizer's own files; whether it came."""
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        if not any(part in frame.f_code.co_filename for part in OWN):
            return None
        if event == "line":
            seen += 1
            if seen == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        step()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("form", FORMS)
def test_an_interrupt_anywhere_leaves_each_matrix_as_before_or_stepped(form):
    def matrices(model, optimizer):
        optimizer.plain_state_dict()  # waits, should the wait at the step's end have been interrupted
        states = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
        weights = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
        return [(w, copy.deepcopy(s)) for w, s in zip(weights, states, strict=True)]

    model, optimizer = start(**FORMS[form])
    train(model, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def again():
        optimizer.close()
        model.load_state_dict(saved[0])
        fresh = POETX(
            model, **{k: v for k, v in FORMS[form].items() if k not in ("converted", "hosted", "dtype")} | own
        )
        fresh.load_state_dict(saved[1])
        backward(model, 9)
        return fresh

    own = {} if FORMS[form].get("converted") else {"block_size": 4}
    optimizer = again()
    before = matrices(model, optimizer)
    optimizer.step()
    after = matrices(model, optimizer)
    counts, line = set(), 0
    while True:
        line += 1 + line // 9
        optimizer.zero_grad()
        optimizer = again()
        if not interrupted(optimizer.step, line):
            break
        now = matrices(model, optimizer)
        done = [int(state["step"]) - 3 for _, state in now]
        counts.add(sum(done))
        for found, old, new, stepped in zip(now, before, after, done, strict=True):
            torch.testing.assert_close(found, new if stepped else old, rtol=0, atol=0)
        if optimizer._matrices[0].layer is not None or optimizer._matrices[0].handle is not None:
            optimizer.step()  # goes on where it was: those that are through have no gradient left
            torch.testing.assert_close(matrices(model, optimizer), after, rtol=0, atol=0)
    assert len(counts) > 2


def test_a_state_is_read_when_it_is_there_though_nobody_waited(monkeypatch):
    found = []
    for interrupts in (True, False):
        model, optimizer = start(converted=True, hosted=True)
        train(model, optimizer, range(2))
        backward(model, 9)
        queue = optimizer.matrices[0].layer.host
        plain, calls = type(queue).settle, []

        def settle(queue, plain=plain, calls=calls, interrupts=interrupts):
            calls.append(1)
            if interrupts and len(calls) == 1:
                raise KeyboardInterrupt
            plain(queue)

        with monkeypatch.context() as patch:
            patch.setattr(type(queue), "settle", settle)
            patch.setattr(LateReturn, "late", SimpleNamespace(choice=lambda delays: 0.2, random=lambda: 1.0))
            with pytest.raises(KeyboardInterrupt) if interrupts else contextlib.nullcontext():
                optimizer.step()
            found.append(kept(model, optimizer)[1])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_state_of_the_version_before_is_taken():
    """Partitions in front, the look-ahead named after its side, numbers without tensors."""
    runs = []
    for older in (False, True):
        model, optimizer = start(converted=True)
        train(model, optimizer, range(3))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        if older:
            for state in saved[1]["state"].values():
                if "momentum_in" in state:
                    momentum = state["momentum_out"]  # after three steps its turn
                    state["before_out_0"] = state.pop("before")[: momentum.numel()].view_as(momentum)
                    state["step"] = int(state["step"])
                    state["momentum_in"], state["momentum_out"] = state["momentum_in"][None], momentum[None]
            del saved[1]["param_groups"][0]["momentum"]
        model, optimizer = start(converted=True)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        train(model, optimizer, range(3, 7))
        runs.append(model.state_dict())
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_gradients_that_are_only_returned_feed_no_momentum():
    model, optimizer = start(converted=True)
    x = torch.randn(5, 11, requires_grad=True)
    parameters = [x, *(p for p in model.parameters() if p.requires_grad)]
    returned = torch.autograd.grad(model(x).exp().mean(), parameters)
    anchors = [m.momentum.anchor for m in model.modules() if hasattr(m, "momentum")]
    torch.autograd.grad(model(x).exp().mean(), [x, *anchors], allow_unused=True)
    assert not any(state["momentum_in"].any() for state in optimizer.state.values())
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    model(x).exp().mean().backward()
    for p, gradient in zip(parameters, returned, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    assert all(optimizer.state[p]["momentum_in"].any() for p in optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("how", ["method", "attribute"])
def test_a_part_that_is_frozen_after_conversion_stays(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8)), nn.Linear(8, 8))
    convert_(model, PoetConfig(method="single-step", block_size=4))
    optimizer = POETX(model)

    def freeze(frozen):
        if how == "method":
            model[0].requires_grad_(not frozen)
        for p in model[0].parameters() if how == "attribute" else ():
            p.requires_grad = not frozen

    def moved():
        before = [p.detach().clone() for p in model.parameters()]
        descend(model(torch.randn(5, 8)).exp().mean(), optimizer)
        return [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]

    freeze(True)
    assert moved() == [False, False, False, True, True]
    freeze(False)
    assert moved() == [True] * 5
    freeze(True)
    assert copy.deepcopy(model)[0][0].frozen
    assert not model[0][0].weight.requires_grad


@pytest.mark.parametrize("form", [{"converted": True}, {}, {"nesterov": False}, {"update": "rotation"}], ids=str)
def test_a_narrow_momentum_does_not_depend_on_the_global_generator(form):
    runs = []
    for seed in (0, 1):
        model, optimizer = start(**form, momentum_dtype="bfloat16")
        torch.manual_seed(seed)
        for step in range(4):
            backward(model, 2 * step)
            backward(model, 2 * step + 1)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(kept(model, optimizer))
    torch.testing.assert_close(*runs, rtol=0, atol=0)
