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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_mean_in_bfloat16_is_unbiased(monkeypatch, dtype):
    """64 ranks of which one has something to add, too little for a sum in bfloat16 to see."""

    def exchange(parts, sent):
        assert sent.dtype == torch.bfloat16
        parts.copy_(sent)
        parts[0] += 2**-4

    def gather(parts, own):
        for part in parts:
            part.copy_(own)

    monkeypatch.setattr(agreement, "rank_count", lambda: 64)
    monkeypatch.setattr(torch.distributed, "all_to_all_single", exchange)
    monkeypatch.setattr(torch.distributed, "all_gather", gather)
    momentum = torch.ones(64 * 20000 - 3, dtype=dtype)
    agreement.average_(momentum, lambda: torch.Generator().manual_seed(0), torch.bfloat16)
    # Of 2^-7, the gap above 1, an eighth is added: 2^-10, with the standard error of 20000 draws.
    assert abs(momentum.float().mean() - 1 - 2**-10) < 5 * 2**-7 * (1 / 8 * 7 / 8 / 20000) ** 0.5


def test_what_is_sent_in_bfloat16_is_rounded_without_bias(monkeypatch):
    sent = []
    monkeypatch.setattr(agreement, "rank_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_to_all_single", lambda parts, values: sent.append(values.clone()))
    monkeypatch.setattr(torch.distributed, "all_gather", lambda parts, own: None)
    agreement.average_(torch.full((20000,), 1 + 2**-10), lambda: torch.Generator().manual_seed(0), torch.bfloat16)
    assert abs(sent[0].float().mean() - 1 - 2**-10) < 5 * 2**-7 * (1 / 8 * 7 / 8 / 20000) ** 0.5
