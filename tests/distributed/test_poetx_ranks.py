"""Every rank of a process group folds alike, whatever form, and follows one process with all of the data."""

import tempfile

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers import relative_error
from poetx import POETX, PoetConfig, convert_
from poetx.distributed import ranks as agreement
from ranks import run_on_two_ranks

CASES = {
    "released": {"release_gradients": True},
    "one rank uses it": {"converted": True},
    "bfloat16": {"narrow": True},
    "bfloat16, released": {"narrow": True, "release_gradients": True},
    "bfloat16, converted": {"narrow": True, "converted": True},
}


def build(*, converted=False, narrow=False, **settings):
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(12, 12), "b": nn.Linear(12, 12, bias=False)})
    dtype = "bfloat16" if narrow else "float32"
    if not converted:
        return model, POETX(model, block_size=4, momentum_dtype=dtype, **settings)
    convert_(model, PoetConfig(method="single-step", block_size=4, rotation_dtype=dtype))
    return model, POETX(model, **settings)


class Loss(nn.Module):
    """Layer b takes part where ``use_b`` says; the mean over ranks is that of one process with both halves."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, use_b):
        y = self.model["a"](x)
        return y.exp().mean() + (self.model["b"](y.tanh()).exp().mean() if use_b else 0)


def train(loss, optimizer, case, ranks):
    generator = torch.Generator().manual_seed(7)
    for step in range(6):
        halves = torch.randn(2, 8, 12, generator=generator)
        for rank in ranks:
            use_b = case != "one rank uses it" or (rank == 0 and step % 2 == 0)
            (loss(halves[rank], use_b) / len(ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()


def work(rank, directory):
    for case, settings in CASES.items():
        model, optimizer = build(**settings)
        torch.manual_seed(rank)  # nothing may depend on the global generator
        train(DistributedDataParallel(Loss(model)), optimizer, case, [rank])
        torch.save(model.state_dict(), f"{directory}/{case}-{rank}.pt")


@pytest.fixture(scope="module")
def trained():
    with tempfile.TemporaryDirectory() as directory:
        run_on_two_ranks(work, directory)
        yield {case: [torch.load(f"{directory}/{case}-{rank}.pt") for rank in range(2)] for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_ranks_stay_identical_and_follow_one_process(trained, case):
    first, second = trained[case]
    model, optimizer = build(**CASES[case])
    start = {name: value.clone() for name, value in model.state_dict().items()}
    train(Loss(model), optimizer, case, [0, 1])
    for name, value in model.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        assert relative_error(first[name], start[name]) > 1e-3
        if not CASES[case].get("narrow"):
            assert relative_error(first[name], value) < 1e-4, name


def test_the_mean_of_narrow_momenta_is_unbiased(monkeypatch):
    """64 ranks of which one has something to add, too little for a sum in bfloat16 to see."""
    monkeypatch.setattr(agreement, "rank_count", lambda: 64)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.mul_(64).add_(2**-4))
    momentum = torch.ones(20000, dtype=torch.bfloat16)
    agreement.average_(momentum, lambda: torch.Generator().manual_seed(0))
    # Of 2^-7, the gap above 1, an eighth is added: 2^-10, with the standard error of 20000 draws.
    assert abs(momentum.float().mean() - 1 - 2**-10) < 5 * 2**-7 * (1 / 8 * 7 / 8 / 20000) ** 0.5
