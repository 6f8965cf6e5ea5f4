"""FSDP2 shards the parameters by rows; merges give the weights of one process, to the bit from the same state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import poetx
from helpers import relative_error
from poetx import PoetConfig, UserError, convert_, merge_, merge_every, param_groups
from poetx.layers.walk import poet_layers
from poetx.optim import build_optimizer
from ranks import run_on_ranks, run_on_two_ranks

#: Odd sizes: blocks and rows that do not divide by the ranks, and a side of one block.
FORMS: dict[str, dict[str, Any]] = {
    "fast": {"mode": "fast"},
    "fast, shared": {"permutation": "shared"},
    "mem": {"mode": "mem", "neumann_order": "exact"},
    "int8": {"mode": "mem", "weight_format": "int8", "group_size": 8, "permutation": "contiguous"},
}
NARROW: dict[str, dict[str, Any]] = {
    "bfloat16": {"weight_extra_bits": False},
    "bfloat16 with extra bits": {"weight_extra_bits": True},
    "nf4 with its residual": {"mode": "mem", "weight_format": "nf4", "weight_extra_bits": True, "group_size": 8},
}
TRAINED = {"rotation_dtype": "bfloat16", "weight_extra_bits": False}


def build(settings: dict[str, Any], dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(11, 20), nn.GELU(), nn.Linear(20, 11, bias=False)) for _ in range(2))
    model = nn.Sequential(*blocks, nn.Linear(11, 3)).to(dtype)
    convert_(model, PoetConfig(block_size=4, init="normalized", **settings))
    return model


def shard(model: Any) -> Any:
    for block in model[:-1]:
        fully_shard(block)
    return fully_shard(model)


def turn(model: nn.Module) -> None:
    """Rotations as if some steps had been taken, the same however the model is sharded."""
    for _, layer in poet_layers(model):
        generator = torch.Generator().manual_seed(len(layer.name))
        for skew in layer.rotations:
            values = 0.1 * torch.randn(skew.shape, generator=generator).to(skew.dtype)
            own: Any = skew.detach()
            if hasattr(own, "to_local"):
                mesh, own = own.device_mesh, own.to_local()
                values = (values.chunk(mesh.size()) + (values[:0],) * mesh.size())[mesh.get_local_rank()]
            own.copy_(values)


def train(model: nn.Module, part: slice) -> list[float]:
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, poet_lr=1e-2))
    handle = merge_every(optimizer, model, steps=2)
    generator, found = torch.Generator().manual_seed(7), []
    for _ in range(5):
        x = torch.randn(8, 11, generator=generator, dtype=torch.float64)
        model(x[part]).square().mean().backward()
        norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        found.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        optimizer.step()
        optimizer.zero_grad()
    assert handle.report is not None
    return [*found, handle.report.angle, handle.report.norm_drift]


def train_narrow(model: nn.Module, part: slice) -> None:
    """Two merges with the AdamW of poetx, whose moments are bfloat16, too."""
    optimizer = build_optimizer(param_groups(model, lr=1e-3, poet_lr=1e-2))
    merge_every(optimizer, model, steps=2)
    generator = torch.Generator().manual_seed(7)
    for _ in range(5):
        model(torch.randn(8, 11, generator=generator)[part].bfloat16()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


def merged(settings: dict[str, Any], shard: Callable[[Any], Any] = lambda model: model) -> dict[str, Tensor]:
    """A bfloat16 model after two merges from states that do not depend on how it is sharded."""
    model = shard(build(settings, torch.bfloat16))
    for _ in range(2):
        turn(model)
        merge_(model)
    return whole(model)


def one_of_four(rank: int, directory: str) -> None:
    found = {form: (merged(settings), merged(settings, shard)) for form, settings in NARROW.items()}
    torch.save(found, f"{directory}/{rank}.pt")


def on_a_rank(rank: int, directory: str) -> None:
    results: dict[str, Any] = {}
    for form, settings in FORMS.items():
        model = shard(build(settings))
        facts = train(model, slice(rank * 4, rank * 4 + 4))
        results[form] = facts, whole(model)
    model = shard(build(TRAINED, torch.bfloat16))
    train_narrow(model, slice(rank * 4, rank * 4 + 4))
    results["trained"] = whole(model)
    model = shard(build({}))
    before = whole(model)
    if rank == 1:
        model[1][0].skew_in.detach().to_local()[0, 0] = torch.nan
    for what, attempt in {
        "not finite": lambda: merge_(model),
        "alone": lambda: model[0][0].merge_(),
        "dense": lambda: poetx.to_dense_(model),
        "outside": lambda: model[0][0](torch.ones(2, 11, dtype=torch.float64)),
    }.items():
        with pytest.raises(UserError) as raised:
            attempt()
        results[what] = str(raised.value)
    unchanged = whole(model)
    results["unchanged"] = all(torch.equal(before[name], unchanged[name]) for name in before if "1.0.skew" not in name)
    torch.save(results, f"{directory}/{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("fsdp")
    run_on_two_ranks(on_a_rank, str(directory))
    return [torch.load(Path(directory) / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("form", FORMS)
def test_a_loop_of_ones_own_trains_the_weights_of_one_process(form: str, found: list[dict[str, Any]]) -> None:
    (facts, first), (others, second) = (results[form] for results in found)
    alone = build(FORMS[form])
    assert facts == others
    assert facts[-2] > 0.01  # the angle of the last merge
    assert facts == pytest.approx(train(alone, slice(None)), rel=1e-9)
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        assert first[name].shape == value.shape
        if value.dtype == torch.float64:
            assert relative_error(first[name], value) < 1e-12, name
        elif "packed_weight" not in name:
            assert torch.equal(first[name], value), name


def test_four_ranks_merge_the_same_state_to_the_bits_of_one_process(tmp_path: Path) -> None:
    run_on_ranks(4, one_of_four, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    for form, settings in NARROW.items():
        alone, before = merged(settings), build(settings, torch.bfloat16).state_dict()
        assert any(not torch.equal(value, before[name]) for name, value in alone.items() if value.ndim == 2)
        for name, value in alone.items():
            for results in found:
                for state in results[form]:
                    assert torch.equal(state[name], value), f"{form}, {name}"


def test_a_bfloat16_loop_follows_one_process(found: list[dict[str, Any]]) -> None:
    alone, start = build(TRAINED, torch.bfloat16), build(TRAINED, torch.bfloat16).state_dict()
    train_narrow(alone, slice(None))
    first, second = (results["trained"] for results in found)
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        if value.ndim == 2 and "skew" not in name:  # these are small just after a merge
            assert relative_error(first[name], value) < 0.02 < relative_error(value, start[name]), name
        elif not value.is_floating_point():
            assert torch.equal(first[name], value), name


def test_what_cannot_be_is_refused_on_all_ranks_alike(found: list[dict[str, Any]]) -> None:
    first, second = found
    assert first["not finite"] == second["not finite"]
    assert first["not finite"].startswith("1.0: inf or NaN in its weight or rotations")
    for what, layer in {"alone": "0.0", "dense": "2", "outside": "0.0"}.items():
        assert first[what].startswith(f"{layer}: its parameters are sharded; run the model that fully_shard"), what
    assert first["unchanged"]
    assert second["unchanged"]
