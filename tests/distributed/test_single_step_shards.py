"""Single steps on layers that ``fully_shard`` has sharded: the matrices of one process, and nothing sent but edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from helpers import relative_error
from poetx import POETX, PoetConfig, UserError, convert_
from poetx.distributed.rows import own_part, whole_on_first
from poetx.distributed.sharded import whole_blocks
from poetx.optim.single_step import matrix
from ranks import run_on_ranks, run_on_two_ranks

#: Update, sizes of the layers and whether their blocks of 4 straddle ranks: 22 rows are 11 on each, 3 rows 2 and 1.
FORMS: dict[str, tuple[str, tuple[int, ...]]] = {
    "free": ("free", (16, 24, 8)),
    "rotation": ("rotation", (16, 24, 8)),
    "free, straddling": ("free", (9, 22, 3)),
    "rotation, straddling": ("rotation", (9, 22, 3)),
    "free, of Conv1D": ("free", (16, 24, 8)),
}


def build(form: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    update, (size, hidden, out) = FORMS[form]
    if "Conv1D" in form:
        model = nn.Sequential(Conv1D(hidden, size), nn.GELU(), Conv1D(out, hidden)).to(dtype)
    else:
        model = nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, out, bias=False)).to(dtype)
    return convert_(model, PoetConfig(method="single-step", update=update, block_size=4, init="normalized")) and model


def train(model: Any, part: slice, steps: int = 5) -> POETX:
    optimizer = POETX(model, lr=1e-3, angle=0.05, norm_growth=0.01)
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        x = torch.randn(8, model[0].in_features, generator=generator, dtype=torch.float64)[part]
        for half in x.chunk(2):
            (model(half.to(model[0].weight.dtype)).exp().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


class Sent(TorchDispatchMode):
    """Bytes of the tensors that this rank gives to c10d."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.total += sum(t.nbytes for t in tree_leaves(args) if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))


def count_folds(patch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """What each fold sends: of weights, and of sums for their norms."""
    sent: dict[str, list[int]] = {"blocks": [], "norms": []}
    for name, function in {"blocks": matrix.whole_blocks, "norms": matrix.shard_sum_}.items():

        def counted(*args: Any, name: str = name, function: Any = function) -> Any:
            with Sent() as counter:
                result = function(*args)
            sent[name].append(counter.total)
            return result

        patch.setattr(matrix, function.__name__, counted)
    return sent


def on_a_rank(rank: int, directory: str) -> None:
    found: dict[str, Any] = {}
    for form in FORMS:
        model = fully_shard(build(form))
        with pytest.MonkeyPatch.context() as patch:
            sent = count_folds(patch)
            optimizer = train(model, slice(rank * 4, rank * 4 + 4))
        state = {
            key: value.full_tensor() if key.endswith(("weight", "bias")) else value
            for key, value in model.state_dict().items()
        }
        found[f"{form}, read again"] = all(
            torch.equal(value.full_tensor() if key.endswith(("weight", "bias")) else value, state[key])
            for key, value in through_a_file(form, model, Path(directory)).items()
        )
        momenta = [optimizer.state[layer.weight] for layer in (model[0], model[2])]
        found[form] = state, [{k: v.clone() for k, v in m.items()} for m in momenta], sent
    mesh = model[0].weight.device_mesh
    whole = torch.arange(14.0).view(7, 2)  # rows 0-3 and 4-6
    for block_size in (2, 3, 4, 9):
        rows, begin = whole_blocks(distribute_tensor(whole, mesh, model[0].weight.placements), block_size)
        found[f"rows, {block_size}"] = rows.clone(), begin
    plain = fully_shard(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(UserError, match="POETX: a parameter of shape .* is a DTensor"):
        POETX(plain)
    torch.save(found, f"{directory}/{rank}.pt")


def through_a_file(form: str, model: Any, directory: Path) -> dict[str, Any]:
    """The state of another model that read its own part of what the first rank has gathered and written."""
    state, file = model.state_dict(), directory / f"{form}.safetensors"
    whole = list(whole_on_first(state.values()))
    if torch.distributed.get_rank() == 0:
        save_file({name: value.contiguous() for name, value in zip(state, whole, strict=True)}, file)
    torch.distributed.barrier()
    other = fully_shard(build(form))
    with safe_open(file, "pt") as opened:
        other.load_state_dict({name: own_part(opened, name, like) for name, like in other.state_dict().items()})
    return other.state_dict()


def bits_on_a_rank(rank: int, directory: str) -> None:
    found = {form: fold_alike(build(form, torch.bfloat16), fully_shard(build(form, torch.bfloat16))) for form in FORMS}
    torch.save(found, f"{directory}/{rank}.pt")


def fold_alike(whole: Any, sharded: Any) -> bool:
    """Whether bfloat16 matrices are the same bits after three steps with the same momentum, whole and sharded."""
    optimizers = [POETX(model, angle=0.05) for model in (whole, sharded)]
    for seed in range(3):
        for optimizer in optimizers:
            generator = torch.Generator().manual_seed(seed)
            for one in optimizer._matrices or ():
                for side in matrix.SIDES:
                    momentum = one.state[f"momentum_{side}"]
                    momentum += torch.randn(momentum.shape, generator=generator)
                    one.peaks[side].fill_(1.0)
                one.touched = True
            optimizer.step()
    pairs = [(layer.weight, other.weight.full_tensor()) for layer, other in zip(whole[::2], sharded[::2], strict=True)]
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("single-step")
    run_on_two_ranks(on_a_rank, str(directory))
    return [torch.load(Path(directory) / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("form", FORMS)
def test_shards_follow_one_process(form: str, found: list[dict[str, Any]]) -> None:
    alone, start = build(form), build(form).state_dict()
    optimizer = train(alone, slice(None))
    for rank in range(2):
        state, momenta, _ = found[rank][form]
        for name, value in alone.state_dict().items():
            assert relative_error(value, start[name]) > 1e-3 or "bias" in name
            assert relative_error(state[name], value) < 1e-12, name
        for layer, momentum in zip((alone[0], alone[2]), momenta, strict=True):
            for key, value in optimizer.state[layer.weight].items():
                torch.testing.assert_close(momentum[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_gathered_is_read_again_in_parts(form: str, found: list[dict[str, Any]]) -> None:
    assert found[0][f"{form}, read again"]
    assert found[1][f"{form}, read again"]


@pytest.mark.parametrize("form", FORMS)
def test_a_fold_sends_the_rows_of_blocks_that_straddle_ranks_alone(form: str, found: list[dict[str, Any]]) -> None:
    for rank in range(2):
        sent = found[rank][form][2]
        assert max(sent["norms"]) == 16
        straddles = "straddling" in form
        assert (max(sent["blocks"]) > 0) == straddles
        # Of 22 rows of 9, 3 of the straddling block are on rank 0 and 1 on rank 1; of 3 rows of 22, 2 and 1.
        assert not straddles or set(sent["blocks"]) == {0, 8 * 9 * 4, 8 * 22 * 3}


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_fold_of_the_same_momentum_gives_the_same_bits(ranks: int, tmp_path: Path) -> None:
    run_on_ranks(ranks, bits_on_a_rank, str(tmp_path))
    for rank in range(ranks):
        assert torch.load(tmp_path / f"{rank}.pt") == dict.fromkeys(FORMS, True)


@pytest.mark.parametrize(
    ("block_size", "reach"), [(2, [(0, 4), (4, 7)]), (3, [(0, 6), (3, 7)]), (4, [(0, 4), (4, 7)]), (9, [(0, 7)] * 2)]
)
def test_a_rank_gets_the_rows_of_its_blocks(
    block_size: int, reach: list[tuple[int, int]], found: list[dict[str, Any]]
) -> None:
    for results, (first, last) in zip(found, reach, strict=True):
        rows, begin = results[f"rows, {block_size}"]
        assert begin == first
        assert torch.equal(rows, torch.arange(14.0).view(7, 2)[first:last])


def frozen_on_a_rank(rank: int, directory: str) -> None:
    model = build("free")
    model[0].requires_grad_(False)
    before = [layer.weight.clone() for layer in (model[0], model[2])]
    train(fully_shard(model), slice(rank * 4, rank * 4 + 4), steps=1)
    after = [layer.weight.full_tensor() for layer in (model[0], model[2])]
    torch.save([torch.equal(a, b) for a, b in zip(before, after, strict=True)], Path(directory) / f"frozen-{rank}.pt")
    early = build("free")
    optimizer = POETX(early)
    fully_shard(early)
    early(torch.ones(2, early[0].in_features, dtype=early[0].weight_dtype)).sum().backward()
    with pytest.raises(UserError, match="POETX: 0.weight was sharded after POETX was built"):
        optimizer.step()


def test_a_layer_that_was_frozen_before_it_was_sharded_stays_so(tmp_path: Path) -> None:
    run_on_two_ranks(frozen_on_a_rank, str(tmp_path))
    assert [torch.load(tmp_path / f"frozen-{rank}.pt") for rank in range(2)] == [[True, False]] * 2
