"""torch.distributed.checkpoint of POETX: restored in fresh objects to the bit, or refused."""

import copy
import functools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as torch_state

from builders import descend, mlp
from poetx import POETX, PoetConfig, UserError, convert_
from poetx.optim import AdamW

SGD_WITH_MOMENTUM = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def start(form, update, dense=None, dtype="float32"):
    torch.manual_seed(0)
    model = mlp()
    if form == "converted":
        config = PoetConfig(method="single-step", block_size=4, update=update, init="normalized", rotation_dtype=dtype)
        convert_(model, config)
        return model, POETX(model, angle=0.02, dense_optimizer=dense)
    settings = {"block_size": 4, "update": update, "momentum_dtype": dtype}
    return model, POETX(model, angle=0.02, dense_optimizer=dense, **settings)


def steps(model, optimizer, numbers):
    losses = []
    for number in numbers:
        torch.manual_seed(100 + number)
        loss = model(torch.randn(16, next(model.parameters()).shape[1])).square().mean()
        descend(loss, optimizer)
        losses.append(loss.item())
    return losses


FORMS = [
    ("converted", "free", None, "float32", {}),
    ("converted", "rotation", functools.partial(AdamW, state_dtype="int8"), "bfloat16", {"cpu_offload": True}),
    ("converted", "rotation", None, "float32", {"full_state_dict": True}),
    ("ordinary", "rotation", None, "float32", {}),
    ("ordinary", "free", None, "bfloat16", {"flatten_optimizer_state_dict": True}),
]


@pytest.mark.parametrize("fresh_target", [True, False], ids=["through files", "in memory"])
@pytest.mark.parametrize(("form", "update", "dense", "dtype", "options"), FORMS)
def test_fresh_objects_go_on_to_the_bit(form, update, dense, dtype, options, fresh_target, tmp_path):
    options = torch_state.StateDictOptions(**options)
    model, optimizer = start(form, update, dense, dtype)
    steps(model, optimizer, range(3))
    saved = torch_state.get_state_dict(model, optimizer, options=options)
    if fresh_target:
        dcp.save(dict(zip(("model", "optimizer"), saved, strict=True)), checkpoint_id=tmp_path / "c", no_dist=True)
    else:
        saved = copy.deepcopy(saved)
    want = steps(model, optimizer, range(3, 7))

    model, optimizer = start(form, update, dense, dtype)
    if fresh_target:
        target = torch_state.get_state_dict(model, optimizer, options=options)
        found = dict(zip(("model", "optimizer"), target, strict=True))
        dcp.load(found, checkpoint_id=tmp_path / "c", no_dist=True)
        saved = found["model"], found["optimizer"]
    elif options.flatten_optimizer_state_dict:  # torch restores what is there already
        optimizer.state_dict()
    torch_state.set_state_dict(model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)
    assert steps(model, optimizer, range(3, 7)) == want
    assert all("rotations" not in group for group in optimizer.param_groups)


def test_what_torch_leaves_out_is_refused():
    model, optimizer = start("converted", "free")
    steps(model, optimizer, range(2))
    flat = torch_state.StateDictOptions(flatten_optimizer_state_dict=True)
    states = {
        "flat": (torch_state.get_optimizer_state_dict(model, optimizer, options=flat), flat),
        "of an older version": (torch_state.get_optimizer_state_dict(model, optimizer), None),
    }
    for group in states["of an older version"][0]["param_groups"]:  # under the weights' names, where torch drops it
        states["of an older version"][0]["state"].update(group.pop("rotations", {}))
    for saved, options in states.values():
        model, optimizer = start("converted", "free")
        optimizer.state_dict()  # torch asks for it, which makes the dense optimizer's state
        before = copy.deepcopy(optimizer.plain_state_dict()["state"])
        with pytest.raises(UserError, match=r"gave no state for \S+weight.*lose its momentum") as error:
            torch_state.set_optimizer_state_dict(model, optimizer, saved, options=options)
        assert "\n" not in str(error.value)
        torch.testing.assert_close(optimizer.plain_state_dict()["state"], before, rtol=0, atol=0)


def test_dense_state_that_torch_leaves_out_is_refused():
    flat = torch_state.StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = start("ordinary", "free", SGD_WITH_MOMENTUM)
    steps(model, optimizer, range(2))
    saved = torch_state.get_optimizer_state_dict(model, optimizer, options=flat)
    model, optimizer = start("ordinary", "free", SGD_WITH_MOMENTUM)
    with pytest.raises(UserError, match="gave no state for"):
        torch_state.set_optimizer_state_dict(model, optimizer, saved, options=flat)


@pytest.mark.parametrize("form", ["converted", "ordinary"])
def test_plain_states_of_both_kinds_load(form):
    """With the rotations under "state", as before, and in the group, of a model in a wrapper, too."""
    model, optimizer = start(form, "free")
    steps(model, optimizer, range(3))
    weights = copy.deepcopy(model.state_dict())
    states = [copy.deepcopy(state) for state in (optimizer.plain_state_dict(), optimizer.state_dict())]
    want = steps(model, optimizer, range(3, 6))
    for state in states:
        model, optimizer = start(form, "free")
        optimizer.close()
        wrapped = torch.nn.Sequential(model)
        settings = {"block_size": 4, "update": "free"} if form == "ordinary" else {}
        optimizer = POETX(wrapped, angle=0.02, **settings)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        assert steps(model, optimizer, range(3, 6)) == want


@pytest.mark.parametrize("form", ["converted", "ordinary"])
def test_a_state_taken_before_the_first_step_changes_nothing(form):
    want = steps(*start(form, "free"), range(4))
    model, optimizer = start(form, "free")
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert steps(model, optimizer, range(4)) == want
