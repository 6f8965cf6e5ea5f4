"""Replayed passes against launched ones, with graphs of recorded operators; real ones are in test_on_gpu.py."""

from __future__ import annotations

import contextlib
import copy
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

import poetx
from builders import At, interrupt
from poetx import POETX, PoetConfig, UserError, convert_, param_groups
from poetx.layers.merge_reminder import MergeReminder
from poetx.layers.walk import single_step_layers
from poetx.methods.base import check_device, convert_model
from poetx.models import build_model
from poetx.ops.library import transparent_operators
from poetx.recipe import differing_keys, load_recipe
from poetx.runs.load import load_run
from poetx.savings import checkpoint_layers_
from poetx.train import graphs, run
from poetx.train.step import TrainingStep

IDS = torch.randint(97, (8, 12), generator=torch.Generator().manual_seed(0))


class Recorder(TorchDispatchMode):
    """Every operator with its tensors and numbers, as a graph has kernels with theirs."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        assert function is not torch.ops.aten._local_scalar_dense.default, "the host looks at a value"
        views = any(returned.alias_info is not None for returned in function._schema.returns)
        self.operators.append((function, args, kwargs or {}, out, views))
        return out


class Graph:
    """Stands for a CUDA graph: what was captured runs at a replay, operator by operator, on the same memory."""

    outside: ClassVar[list] = []  # what gives all tensors that a pass may write and that stay

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, out, views in self.recorder.operators:
                again = function(*args, **kwargs)
                for there, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(there, torch.Tensor) and not views and there is not new:
                        there.copy_(new)


class Stream:
    device = torch.device("cpu")

    def __init__(self, *args):
        pass

    def wait_stream(self, other):
        pass


@pytest.fixture
def made(monkeypatch):
    """The graphs that are captured; a capture runs nothing, so what it wrote is put back."""
    found: list[Graph] = []
    outside: list = []

    @contextlib.contextmanager
    def capture(graph, **settings):
        tensors = outside[0]()
        kept = [tensor.detach().clone() for tensor in tensors]
        graph.recorder = Recorder()
        failed = True
        try:
            with graph.recorder, transparent_operators():
                yield
            failed = False
        finally:
            with torch.no_grad():
                for tensor, before in zip(tensors, kept, strict=True):
                    tensor.detach().copy_(before)
            if failed:  # as leaving a capture that has failed does
                raise RuntimeError("operation failed due to a previous error during capture")
        found.append(graph)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: Stream())
    Graph.outside = outside
    return found


def llama(**config):
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(**(shape | {"num_attention_heads": 2} | config)))


def prepared(method, *, replays=True, model=None, **settings):
    model = model or llama()
    if method == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        convert_(model, PoetConfig(method=method, init="normalized", block_size=8, **settings))
        rates = {"lr": 1e-3, "poet_lr": 1e-3}
        optimizer = POETX(model) if method == "single-step" else torch.optim.AdamW(param_groups(model, **rates))
        if method == "poet-x":
            poetx.merge_every(optimizer, model, steps=3)
    step = TrainingStep(model, optimizer, model)

    def written():
        tensors = [*model.parameters(), *model.buffers()]
        tensors += [p.grad for p in model.parameters() if p.grad is not None]
        return [*tensors, *(t for m in getattr(optimizer, "matrices", ()) for t in (m.momenta, m.all_peaks))]

    if replays:
        Graph.outside[:] = [written]
        step.graphs = graphs.GraphedPasses(model, optimizer, step.backward_of)
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


def freeze_a_layer(number, model, optimizer):
    if number in (4, 6):
        model.model.layers[0].mlp.requires_grad_(number == 6)


def move(number, model, optimizer):
    if number == 4:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()


def move_buffers(number, model, optimizer):
    if number == 4:
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()


def move_peaks(number, model, optimizer):
    if number == 4:
        for _, layer in single_step_layers(model):
            peaks = (layer.momentum.peaks_in.clone(), layer.momentum.peaks_out.clone())
            layer.momentum = layer.momentum._replace(peaks_in=peaks[0], peaks_out=peaks[1])
            matrix = layer.trainer()
            matrix.peaks = dict(zip(("in", "out"), peaks, strict=True))


def load(number, model, optimizer):
    if number == 4:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize(
    ("change", "method", "captures"),
    [
        (freeze, "single-step", 2),
        (freeze, "poet-x", 2),
        (freeze_a_layer, "poet-x", 3),
        (freeze_a_layer, "single-step", 3),
        (move, "single-step", 2),
        (move, "poet-x", 2),
        (move_buffers, "poet-x", 2),
        (move_peaks, "single-step", 2),
        (load, "single-step", 2),  # whose momenta are new tensors then
        (load, "poet-x", 1),
    ],
)
def test_what_has_moved_or_is_frozen_is_captured_anew(change, method, captures, made, monkeypatch):
    monkeypatch.setattr(graphs, "_LAUNCHED_FIRST", 1)
    got = trained(method, made, steps=9, between=change)
    assert len(made) == captures
    check(got, trained(method, made, replays=False, steps=9, between=change))


def test_who_watches_gradients_is_in_no_graph(made, caplog):
    """As the look at a run's first steps does, and forgets what it has kept."""

    def watch(number, model, optimizer):
        if number == 0:
            model.hook = model.lm_head.weight.register_hook(lambda grad: seen.append(number))
        if number == 3:
            model.hook.remove()

    seen: list[int] = []
    got = trained("single-step", made, micro_batches=1, between=watch)
    assert got[2].graphs.replayed == 4
    assert len(seen) == 3
    seen.clear()
    check(got, trained("single-step", made, replays=False, micro_batches=1, between=watch))
    model, _, step = prepared("adamw")
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    for _ in range(20):
        step([(IDS, IDS)])
    assert step.graphs.captured == 0
    assert [r.message for r in caplog.records] == [
        "train.cuda_graphs: lm_head.weight has a hook on its gradient, so passes are launched"
    ]


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
    plain = MergeReminder.check_average

    def check_average(reminder, layer, **how):
        looked.append(layer)
        plain(reminder, layer, **how)

    monkeypatch.setattr(MergeReminder, "check_average", check_average)
    _, _, step = prepared("poet-x")  # which merges after 3, 6 and 9
    count = sum(isinstance(h, MergeReminder) for m in step.model.modules() for h in m._forward_pre_hooks.values())
    found = []
    for _ in range(10):
        looked.clear()
        step([(IDS, IDS)])
        found.append(len(looked) // count)
    assert found == [1, 1, 1, 1, 0, 0, 1, 0, 0, 1], (
        "launched, launched, captured (asked, and looks away), then after merges"
    )


def test_gradients_that_differ_by_shape_are_those_of_launched_steps(made):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.long, self.short = nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x):
            return (self.long if len(x) > 2 else self.short)(x).sum()

    model = Two()

    def body(batch, tokens):
        loss = model(batch[0])
        loss.backward()
        return loss.detach()

    Graph.outside[:] = [lambda: [p.grad for p in model.parameters() if p.grad is not None]]
    passes = graphs.GraphedPasses(model, torch.optim.SGD(model.parameters()), body)
    long, short = torch.ones(3, 4), torch.ones(2, 4)
    batches = {"both": [long, short], "short": [short], "long": [long]}
    for which in ("both", "both", "both", "short", "short", "short", "long", "long", "long", "both", "short"):
        passes([(batch, batch) for batch in batches[which]], 1)
        assert (model.long.weight.grad is None) == (which == "short")
        assert (model.short.weight.grad is None) == (which == "long")
        for part, batch in ((model.long, long), (model.short, short)):
            if part.weight.grad is not None:
                assert torch.equal(part.weight.grad, batch.sum(0, keepdim=True))
        model.zero_grad()
    assert (passes.captured, passes.replayed) == (2, 2 + 1 + 1 + 2 + 1)


def test_gradients_that_are_put_in_place_of_others_are_refused(made):
    model = nn.Linear(4, 1)

    def body(batch, tokens):
        loss = model(batch[0]).sum()
        loss.backward()
        model.weight.grad = model.weight.grad.clone()
        return loss.detach()

    Graph.outside[:] = [list]
    passes = graphs.GraphedPasses(model, torch.optim.SGD(model.parameters()), body)
    for _ in range(2):
        passes([(torch.ones(3, 4), torch.ones(3))], 1)
        model.zero_grad()
    with pytest.raises(UserError, match="in place of those before"):
        passes([(torch.ones(3, 4), torch.ones(3))], 1)


def test_a_model_of_frozen_ends_trains(made):
    def model():
        made = llama()
        for name, parameter in made.named_parameters():
            parameter.requires_grad_("proj" in name)
        return made

    found = []
    for replays in (True, False):
        _, _, step = prepared("single-step", replays=replays, model=model())
        found.append([step([(IDS, IDS)]).loss for _ in range(6)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][-1] < found[0][0]


def test_an_interruption_of_a_replay_can_be_taken_back(made, monkeypatch):
    _, optimizer, step = prepared("single-step")
    for _ in range(3):
        step([(IDS, IDS)])
    before = [m.momenta.clone() for m in optimizer.matrices]
    plain = Graph.replay

    def interrupted(graph):
        plain(graph)
        raise KeyboardInterrupt

    monkeypatch.setattr(Graph, "replay", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step([(IDS, IDS)])
    assert not torch.equal(optimizer.matrices[0].momenta, before[0])
    optimizer.discard()
    assert all(torch.equal(m.momenta, was) for m, was in zip(optimizer.matrices, before, strict=True))


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
        UserError, match=r"^train\.cuda_graphs: a pass .* \(operation .* capturing more\); leave it out$"
    ):
        step([(IDS, IDS)])

    def refuses(batch, tokens):
        raise UserError("routers")

    step.graphs.body = refuses
    with pytest.raises(UserError, match="^routers$"):
        step([(IDS, IDS)])

    def looks_up(batch, tokens):
        try:
            return {}["x"]
        except KeyError:
            raise UserError("say this") from None

    step.graphs.body = looks_up
    with pytest.raises(UserError, match="^say this$"):
        step([(IDS, IDS)])

    def interrupted(batch, tokens):
        raise KeyboardInterrupt

    step.graphs.body = interrupted
    with pytest.raises(KeyboardInterrupt):
        step([(IDS, IDS)])
    step.graphs.body = waits
    try:
        raise UserError("somebody else's")
    except UserError:
        with pytest.raises(UserError, match="cannot be captured"):
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


def test_checkpointed_layers_that_draw_are_refused(made):
    """Computed again they would draw something else, and nobody could tell from the loss."""
    for dropout in (0.0, 0.1):
        model = checkpoint_layers_(llama(attention_dropout=dropout), preserve_rng_state=False)
        step = TrainingStep(model, torch.optim.SGD(model.parameters()), model)
        step.graphs = graphs.GraphedPasses(model, step.optimizer, step.backward_of, may_draw=False)
        if dropout:
            with pytest.raises(UserError, match="draws random numbers"):
                step([(IDS, IDS)])
        else:
            step([(IDS, IDS)])


def test_a_recipe_checkpoints_without_the_generators_state():
    for on in (False, True):
        keys = ["model.gradient_checkpointing=true", f"train.cuda_graphs={str(on).lower()}", "method=adamw"]
        recipe = load_recipe("demo", [*keys, "model.num_layers=1", "train.dtype=float32"], text=False)
        model = build_model(recipe, vocab_size=300, end_of_text_id=0, device=torch.device("cpu"))
        convert_model(model, recipe, None)
        assert model.model.layers[0]._gradient_checkpointing_func.keywords["preserve_rng_state"] is not on
        step = TrainingStep.of(recipe, model, torch.optim.SGD(model.parameters()))
        assert (step.graphs is not None) == on
        assert step.graphs is None or not step.graphs.may_draw


def test_a_device_or_several_processes_without_graphs_are_refused(monkeypatch):
    recipe = load_recipe("demo", ["train.cuda_graphs=true"], text=False)
    with pytest.raises(UserError, match="the device is cpu"):
        check_device(recipe, torch.device("cpu"))
    check_device(recipe, torch.device("cuda"))
    check_device(recipe, None)
    monkeypatch.setattr("poetx.methods.base.rank_count", lambda: 2)
    with pytest.raises(UserError, match="several processes"):
        check_device(recipe, torch.device("cuda"))


def test_a_run_with_graphs_loads_where_there_are_none(tiny, monkeypatch):
    done = run.train(tiny("train.steps=2"))
    monkeypatch.setattr(
        "poetx.runs.load.load_recipe", lambda source: load_recipe(source).with_keys({"train.cuda_graphs": True})
    )
    assert load_run(str(done.run_dir), device="cpu").model is not None


def test_a_run_is_resumed_where_there_are_none(tiny):
    begun = tiny("train.steps=6")
    assert run.train(begun, reporter=At(3, interrupt)).signum
    elsewhere = begun.with_keys({"train.cuda_graphs": True})
    assert differing_keys(begun, elsewhere) == {}
    with pytest.raises(UserError, match="the device is cpu"):
        run.train(elsewhere, resume=True)
    assert run.train(begun, resume=True).signum is None


def test_gradients_that_stay_are_planned():
    """Of the loss's own memory, in which no gradient of the dense model was before."""
    keys = ["method=adamw", "data.seq_len=1024", "train.dtype=bfloat16", "data.vocab_size=8192"]
    without, with_graphs = (
        poetx.estimate_memory(load_recipe("demo", [*keys, *more], text=False))
        for more in ([], ["train.cuda_graphs=true"])
    )
    assert with_graphs.phases["forward"].total == without.phases["forward"].total + 2 * without.trainable
