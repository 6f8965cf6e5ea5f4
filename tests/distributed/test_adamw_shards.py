"""AdamW over shards gives the bits of one process: noise belongs to an element, wherever it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from poetx import UserError
from poetx.optim import AdamW, sliced
from ranks import run_on_two_ranks

#: Rows that do not part evenly, none on the last rank, a slice that ends within another rank's rows.
SHAPES = [(33, 300), (7,), (3, 5000), (1, 4097)]
FORMS: dict[str, tuple[torch.dtype, str]] = {
    "bfloat16": (torch.bfloat16, "same"),
    "float32, narrow state": (torch.float32, "bfloat16"),
    "bfloat16, wide state": (torch.bfloat16, "float32"),
}


def build(form: str) -> tuple[nn.ParameterList, dict[str, Any]]:
    torch.manual_seed(0)
    dtype, state_dtype = FORMS[form]
    values = (torch.randn(shape).to(dtype) for shape in SHAPES)
    return nn.ParameterList(nn.Parameter(value) for value in values), {"lr": 1e-2, "state_dtype": state_dtype}


def step(parameters: nn.ParameterList, optimizer: AdamW, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = gradient if type(p.data) is Tensor else like(gradient, p)
    optimizer.step()


def like(whole: Tensor, sharded: Any) -> Any:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, sharded.device_mesh, sharded.placements)


def results(parameters: nn.ParameterList, optimizer: AdamW) -> list[Tensor]:
    found = []
    for p in parameters:
        tensors = (p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])
        found += [(t.full_tensor() if hasattr(t, "full_tensor") else t).flatten() for t in tensors]
    return found


def on_a_rank(rank: int, directory: str) -> None:
    sliced.SLICE = 1000
    found: dict[str, Any] = {}
    for form in FORMS:
        parameters, settings = build(form)
        fully_shard(parameters)
        optimizer = AdamW(parameters.parameters(), **settings)
        for seed in range(2):
            step(parameters, optimizer, seed)
        saved = dcp.get_optimizer_state_dict(parameters, optimizer)
        whole = dcp.get_optimizer_state_dict(parameters, optimizer, options=dcp.StateDictOptions(full_state_dict=True))
        optimizer = AdamW(parameters.parameters(), **settings)
        dcp.set_optimizer_state_dict(parameters, optimizer, saved)
        step(parameters, optimizer, 2)
        found[form] = results(parameters, optimizer)
        if rank == 0:
            found[f"{form}, saved"] = whole["state"]
    with pytest.raises(UserError, match="256 neighbours share a scale"):
        AdamW(parameters.parameters(), state_dtype="int8")
    whole, settings = build("bfloat16")
    one = AdamW(whole.parameters(), **settings)
    step(whole, one, 0)
    with pytest.raises(UserError, match="the exp_avg of parameter 0 of .* is not sharded, unlike the parameter"):
        AdamW(fully_shard(build("bfloat16")[0]).parameters(), **settings).load_state_dict(one.state_dict())
    torch.save(found, f"{directory}/{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("adamw")
    run_on_two_ranks(on_a_rank, str(directory))
    return torch.load(Path(directory) / "0.pt")


@pytest.mark.parametrize("form", FORMS)
def test_shards_are_stepped_as_the_whole_is(form: str, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliced, "SLICE", 1000)
    parameters, settings = build(form)
    optimizer = AdamW(parameters.parameters(), **settings)
    for seed in range(3):
        if seed == 2:
            for index, p in enumerate(parameters):
                saved, own = found[f"{form}, saved"][str(index)], optimizer.state[p]
                assert torch.equal(saved["exp_avg"].flatten(), own["exp_avg"])
        step(parameters, optimizer, seed)
    for mine, theirs in zip(results(parameters, optimizer), found[form], strict=True):
        assert torch.equal(mine, theirs)
