"""Replayed passes against launched ones, with graphs that run the captured Python again; real ones: test_on_gpu.py."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import poetx
from poetx import POETX, PoetConfig, UserError, convert_, param_groups
from poetx.recipe import load_recipe
from poetx.savings import checkpoint_layers_
from poetx.train import graphs
from poetx.train.step import TrainingStep

IDS = torch.randint(97, (8, 12), generator=torch.Generator().manual_seed(0))


class Graph:
    """What is captured runs when it is replayed, and leaves as little on the host as a real one."""

    now: Graph | None = None

    def replay(self):
        matrices = [(m, m._touched, m._taken, m.changes) for m in self.matrices]
        out = self.run()
        for matrix, *before in matrices:
            matrix._touched, matrix._taken, matrix.changes = before
        self.loss.copy_(out)


@pytest.fixture
def made(monkeypatch):
    """The graphs that are captured."""
    found = []

    @contextlib.contextmanager
    def capture(graph, **settings):
        Graph.now = graph
        found.append(graph)
        yield
        Graph.now = None

    class Stream:
        device = torch.device("cpu")

        def __init__(self, *args):
            pass

        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: Stream())
    return found


def llama(**config):
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(**(shape | {"num_attention_heads": 2} | config)))


def prepared(method, *, replays=True, **settings):
    """A step whose captured passes do nothing to model and momenta until they are replayed, as on a GPU."""
    model = llama()
    if method == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        convert_(model, PoetConfig(method=method, init="normalized", block_size=8, **settings))
        optimizer = (
            POETX(model) if method == "single-step" else torch.optim.AdamW(param_groups(model, lr=1e-3, poet_lr=1e-3))
        )
        if method == "poet-x":
            poetx.merge_every(optimizer, model, steps=3)
    step = TrainingStep(model, optimizer, model)

    def body(batch, tokens):
        if Graph.now is None:
            return step.backward_of(batch, tokens)
        graph, matrices = Graph.now, list(getattr(optimizer, "matrices", ()))
        tensors = [p.grad for p in model.parameters() if p.grad is not None]
        tensors += [t for m in matrices for t in (m.momenta, m.all_peaks)]
        kept = [t.clone() for t in tensors]
        graph.run, graph.matrices = (lambda: step.backward_of(batch, tokens)), matrices
        graph.loss = step.backward_of(batch, tokens).clone()
        for tensor, before in zip(tensors, kept, strict=True):
            tensor.copy_(before)
        return graph.loss

    if replays:
        step.graphs = graphs.GraphedPasses(model, optimizer, body)
    return model, optimizer, step


def trained(method, made, *, replays=True, micro_batches=2, steps=8, between=None, **settings):
    model, optimizer, step = prepared(method, replays=replays, **settings)
    found = []
    for number in range(steps):
        ids = IDS.roll(number, 0)
        parts = [(part, part) for part in ids.chunk(micro_batches)]
        found.append(step(parts, clip=1.0))
        if between is not None:
            between(number, model, optimizer)
    return found, {name: tensor.clone() for name, tensor in model.state_dict().items()}, step


def check(got, want):
    for a, b in zip(got[0], want[0], strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
    for name, tensor in want[1].items():
        torch.testing.assert_close(got[1][name], tensor, rtol=2e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("method", ["adamw", "poet-x", "single-step"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_replayed_steps_train_as_launched_ones(method, micro_batches, made):
    got = trained(method, made, micro_batches=micro_batches)
    assert len(made) == 1, "one capture, across merges, too"
    assert got[2].graphs.replayed == 6 * micro_batches, "two steps are launched"
    check(got, trained(method, made, replays=False, micro_batches=micro_batches))


def test_another_shape_is_launched_and_captured_by_itself(made):
    def shapes(replays):
        _, _, step = prepared("single-step", replays=replays)
        lengths = [12, 12, 12, 7, 12, 7, 7, 12]
        return [step([(IDS[:, :n], IDS[:, :n])]).loss for n in lengths], {}, step

    got = shapes(True)
    assert len(made) == 2
    assert got[2].graphs.replayed == 4
    assert got[0] == pytest.approx(shapes(False)[0], rel=1e-5)


def test_tokens_that_count_are_no_part_of_a_graph(made):
    def labels(replays):
        _, _, step = prepared("single-step", replays=replays)
        found = []
        for number in range(6):
            targets = IDS.clone()
            targets[: number + 1] = -100
            found.append(step([(IDS, targets)], tokens=int((targets != -100).sum())).loss)
        return found

    assert labels(True) == pytest.approx(labels(False), rel=1e-5)
    assert len(made) == 1


def freeze(number, model, optimizer):
    if number == 4:
        model.lm_head.weight.requires_grad_(False)


def move(number, model, optimizer):
    if number == 4:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()


def load(number, model, optimizer):
    if number == 4:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("change", [freeze, move, load])
@pytest.mark.parametrize("method", ["single-step", "poet-x"])
def test_what_has_moved_or_is_frozen_is_captured_anew(method, change, made):
    got = trained(method, made, steps=9, between=change)
    again = change is not load or method == "single-step"  # whose momenta are new tensors then
    assert len(made) == (2 if again else 1)
    check(got, trained(method, made, replays=False, steps=9, between=change))


def test_a_parameter_without_gradient_gets_none(made):
    model, optimizer, step = prepared("adamw")
    model.unused = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [model.unused], "weight_decay": 0.5})
    for _ in range(4):
        step([(IDS, IDS)])
    assert step.graphs.replayed == 2
    assert torch.equal(model.unused, torch.ones(3))


def test_a_step_that_is_not_finite_is_skipped_and_taken_back(made):
    def spoil(number, model, optimizer):
        with torch.no_grad():
            if number == 4:
                model.lm_head.weight[0] += torch.inf
            if number == 5:
                model.lm_head.weight[0] = 0.01

    got = trained("single-step", made, between=spoil)
    assert [result.skipped for result in got[0]] == [number == 5 for number in range(8)]
    want = trained("single-step", made, replays=False, between=spoil)
    for name, tensor in want[1].items():
        torch.testing.assert_close(got[1][name], tensor, rtol=2e-4, atol=2e-5, msg=name)


def test_a_merge_is_looked_at(made, monkeypatch):
    looked = []
    monkeypatch.setattr(graphs, "look_at_merges", lambda model: looked.append(model))
    trained("poet-x", made, steps=10)  # which merges after 3, 6 and 9
    assert len(looked) == 3


def test_a_measured_step_is_launched(made):
    _, _, step = prepared("single-step")
    for _ in range(4):
        step([(IDS, IDS)])
    step.phase = lambda name: None
    step([(IDS, IDS)])
    assert step.graphs.replayed == 2


def test_what_a_graph_cannot_have_is_said(made):
    _, _, step = prepared("single-step")
    with pytest.raises(UserError, match=r"packed; set data\.pack=false"):
        step([(IDS, IDS, torch.arange(12).expand(8, 12))])
    step.losses = lambda *batch: (torch.ones((), requires_grad=True), torch.ones(()))
    with pytest.raises(UserError, match="routers"):
        step([(IDS, IDS)])


def test_a_pass_that_waits_is_refused_in_one_line(made):
    _, _, step = prepared("adamw")
    step([(IDS, IDS)])
    step([(IDS, IDS)])

    def waits(batch, tokens):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    step.graphs.body = waits
    with pytest.raises(
        UserError, match=r"^train\.cuda_graphs: a pass .* \(operation not permitted .*\); leave it out$"
    ):
        step([(IDS, IDS)])


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ("train.compile=true", "not with train.compile=true"),
        ("method=mem model.offload=frozen", "not with model.offload=frozen"),
        ("optimizer.release_gradients=true optimizer.clip=null", "not with optimizer.release_gradients=true"),
        ("data.pack=true", "not with data.pack=true"),
        ("method=single-step poet.rotation_dtype=bfloat16", "not with poet.rotation_dtype=bfloat16 of method"),
    ],
)
def test_settings_that_need_the_host_are_refused(keys, text):
    with pytest.raises(UserError, match=f"^train.cuda_graphs: {text}"):
        load_recipe("demo", ["train.cuda_graphs=true", *keys.split()], text=False)


def test_momenta_that_are_rounded_are_refused():
    with pytest.raises(UserError, match=r"bfloat16 \(poet\.rotation_dtype\)"):
        prepared("single-step", rotation_dtype="bfloat16")


def test_checkpointed_layers_without_random_numbers():
    model = llama(attention_dropout=0.1)
    with pytest.raises(UserError, match=r"attention_dropout=0\.1 of the config draws"):
        checkpoint_layers_(model, preserve_rng_state=False)
    with pytest.raises(UserError, match=r"the dropout 0 draws"):
        checkpoint_layers_(nn.ModuleList([nn.Dropout(0.5), nn.Dropout(0.5)]), preserve_rng_state=False)
