"""Of the gradient of an embedding only rows that some rank has are reduce-scattered, to the sums of an all-reduce."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from poetx.distributed.gradients import ReduceScatterByRow
from poetx.planner.fake import fake_ranks
from poetx.train.sharding import all_ranks, shard_model_
from ranks import run_on_ranks

RANKS, ROWS, WIDTH = 3, 4, 5  # rows of each rank


def on_a_rank(rank: int, directory: str) -> None:
    sent, exchange = [], dist.all_to_all_single

    def counted(*args, **kwargs):
        sent.append(args[1].numel())
        return exchange(*args, **kwargs)

    dist.all_to_all_single = counted
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        gradient = torch.zeros(RANKS * ROWS, WIDTH, dtype=dtype)
        rows = [0, 3, 4, 6 + rank]  # of the last rank all but the last are nobody's: 6, 7 are the second's, 8 its own
        gradient[rows] = torch.arange(len(rows) * WIDTH, dtype=dtype).view(-1, WIDTH).add(rank - 1)
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            reduce = ReduceScatterByRow(WIDTH)
            own = reduce.allocate((ROWS * WIDTH,), dtype=dtype, device=torch.device("cpu")).fill_(torch.nan)
            reduce(output_tensor=own, input_tensor=gradient.flatten(), group=dist.group.WORLD, op=op)
            whole = gradient.clone()
            dist.all_reduce(whole)
            expected = whole.view(RANKS, -1)[rank] / (RANKS if op == dist.ReduceOp.AVG else 1)
            found[str(dtype), str(op)] = own, expected
    torch.save((found, sent), f"{directory}/{rank}.pt")


def test_rows_that_some_rank_has_are_summed_and_no_others_sent(tmp_path: Path):
    run_on_ranks(RANKS, on_a_rank, str(tmp_path))
    for rank in range(RANKS):
        found, sent = torch.load(tmp_path / f"{rank}.pt")
        for what, (own, expected) in found.items():
            assert torch.allclose(own, expected, rtol=0 if "SUM" in what else 1e-2, atol=0), what
        assert set(sent) == {6 * WIDTH}  # 0, 3, 4, 6, 7, 8 of twelve


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(6, 4), nn.Embedding(6, 4)
        self.also, self.tied, self.fixed = nn.Embedding(6, 4), nn.Embedding(6, 4), nn.Embedding(6, 4)
        self.also.weight = self.places.weight
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.tied.weight
        self.fixed.requires_grad_(False)


def test_embeddings_that_one_module_alone_holds_and_trains_are_parts_of_their_own():
    model = Tables()
    with fake_ranks(2):
        place = torch.device("cpu")
        shard_model_(model, place, all_ranks(place))
        parts = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    assert parts == ["", "words"]
