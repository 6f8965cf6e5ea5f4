"""Peak memory of one training step, predicted by taking the step: on fake tensors, with the real code."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from poetx.errors import UserError
from poetx.memory.tracker import PHASES, PhasePeak, Split, StorageTracker, adopt_state, followed, peak_of
from poetx.ops.library import transparent_operators
from poetx.optim import adamw
from poetx.optim import sliced as _base
from poetx.planner.allocator import OutOfMemory, replay
from poetx.planner.build import Step, fake_, meta_model, prepare_, read_config, training_step, with_layers
from poetx.planner.setup import TrainingSetup
from poetx.savings.activation_checkpointing import decoder_layers

GIB = 1 << 30
#: Decoder layers of the two short runs that a deep model is extrapolated from.
_FEW = (3, 4)
_CUDA_GRANULARITY = 512


@dataclass(frozen=True)
class MemoryEstimate:
    """What one training step will take.

    Attributes:
        peak: bytes at the largest moment, and ``phase``, when that is.
        categories: those bytes as frozen, trainable, gradient, optimizer, activations, temporary.
        rotations: the part of trainable, gradient and optimizer that belongs to packed rotations.
        phases: the same for the largest moment of each phase.
        tokens: in one backward pass. parameters: all of them; trainable: those that train.
        extrapolated: whether decoder layers were extrapolated from a few.
        setup: what was asked.
        reserved: bytes that CUDA's caching allocator holds at most, if that was asked; None also where the card is
            too small for it. Without the CUDA context, half a GB.
    """

    peak: int
    phase: str
    categories: dict[str, int]
    rotations: dict[str, int]
    phases: dict[str, PhasePeak]
    tokens: int
    parameters: int
    trainable: int
    extrapolated: bool
    setup: TrainingSetup
    reserved: int | None = None

    @property
    def gib(self) -> float:
        """Peak in GB as the papers' tables count them: 2³⁰ bytes."""
        return self.peak / GIB

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, sizes in bytes."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.categories.items())
        return f"{self.gib:.2f} GB in {self.phase} ({parts})"


@dataclass
class _Run:
    """One step's peaks by label."""

    splits: dict[str, Split] = field(default_factory=dict)
    parameters: int = 0
    trainable: int = 0
    reserved: int | None = None


def estimate_memory(
    model: Any,
    setup: TrainingSetup | None = None,
    *,
    every_layer: bool = False,
    card_gib: float | None = None,
    **changes: Any,
) -> MemoryEstimate:
    """Predict the peak memory of one training step, without a GPU and without the memory.

    The model, its conversion, its backward and its optimizers are the real ones; only the tensors are fake
    (``FakeTensorMode``), and every storage is followed from birth to death. The optimizer's state is there from the
    start, as in every step but the first. What is modelled instead of run, for ``device="cuda"``: sizes are rounded
    to the allocator's 512 bytes, attention is the flash kernel with its backward's buffers, and the layer takes the
    slices it takes on an accelerator. Not counted: the CUDA context, cuBLAS's workspace, fragmentation, the other
    temporaries inside a native kernel, and merging.

    Args:
        model: a name of :data:`poetx.memory.SHAPES`, a ``transformers`` config, a ``config.json`` or a directory with
            one, or a function that makes a causal language model (called on the meta device).
        setup: what trains and how; ``changes`` are settings of it to change.
        every_layer: run all decoder layers instead of extrapolating from 3 and 4 of them. Both give the same number
            (a test holds that) for a model of equal layers; others are run whole anyway.
        card_gib: say what the caching allocator would hold, too, on a card with so much memory beside the CUDA
            context (``math.inf`` for any): every layer is run, and the storages are replayed by the allocator's
            rules. What kernels allocate inside themselves is not among them.

    Raises:
        UserError: a model or a setting that does not exist; ``card_gib`` with ``device="cpu"``.
    """
    setup = (setup or TrainingSetup()).replace(**changes)
    if card_gib is not None and setup.device != "cuda":
        raise UserError(f"card_gib={card_gib}: is about CUDA's allocator; use device='cuda'")
    if callable(model):
        return _result(_run_factory(model, setup, card_gib), setup, extrapolated=False)
    config = read_config(model)
    _check_length(config, setup)
    depth = int(getattr(config, "num_hidden_layers", 0) or 0)
    if every_layer or card_gib is not None or depth <= max(_FEW) or not _uniform(config, setup):
        return _result(_run_config(config, setup, card_gib), setup, extrapolated=False)
    few = [_run_config(with_layers(config, layers), setup) for layers in _FEW]
    return _result(_extrapolate(few[0], few[1], depth), setup, extrapolated=True)


def _check_length(config: Any, setup: TrainingSetup) -> None:
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise UserError(f"rope_type={kind}: its tables depend on the data, which an estimate has none of; use default")


def _run_factory(factory: Callable[[], Any], setup: TrainingSetup, card_gib: float | None) -> _Run:
    with torch.device("meta"):
        model = factory()
    return _take_step(model.train(), setup, card_gib)


def _run_config(config: Any, setup: TrainingSetup, card_gib: float | None = None) -> _Run:
    return _take_step(meta_model(config, setup), setup, card_gib)


_UNIFORM: dict[str, bool] = {}


def _uniform(config: Any, setup: TrainingSetup) -> bool:
    """Whether every decoder layer is like every other; remembered, for the sake of searches."""
    if len(set(getattr(config, "layer_types", None) or [""])) > 1:
        return False
    key = f"{type(config)} {config.to_json_string()}"
    if key not in _UNIFORM:
        layers = decoder_layers(meta_model(config, setup))
        kinds = {tuple((n, p.shape, p.dtype) for n, p in layer.named_parameters()) for layer in layers}
        _UNIFORM[key] = len(layers) == config.num_hidden_layers and len(kinds) == 1
    return _UNIFORM[key]


def _take_step(model: nn.Module, setup: TrainingSetup, card_gib: float | None) -> _Run:
    model = prepare_(model, setup)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake_(model, mode)
    parameters = list(model.parameters())
    on_cuda = setup.device == "cuda"
    tracker = StorageTracker(
        granularity=_CUDA_GRANULARITY if on_cuda else 1, hidden=_flash_backward_buffers if on_cuda else None
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(_as_transformers_runs())
        stack.enter_context(transparent_operators(device_type=setup.device))
        stack.enter_context(mode)
        input_ids = torch.zeros(setup.batch_size, setup.seq_len, dtype=torch.long)
        step = training_step(model, input_ids, setup)
        _make_state(step, parameters)
        stack.enter_context(_fused_attention())
        stack.enter_context(tracker)
        stack.enter_context(followed(tracker, model))
        adopt_state(tracker, step.optimizers, model)
        stack.enter_context(_labels(tracker, model))
        step.run(tracker.enter_phase)
    run = _Run(
        parameters=sum(p.numel() for p in parameters), trainable=sum(p.numel() for p in parameters if p.requires_grad)
    )
    for label in tracker.labels:
        run.splits[label] = tracker.split(label)
    if card_gib is not None:
        with contextlib.suppress(OutOfMemory):
            run.reserved = replay(tracker.records, card=card_gib * GIB)
    return run


def _make_state(step: Step, parameters: list[nn.Parameter]) -> None:
    """One step on empty gradients, so that the state is there before the step that counts."""
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    for state in (state for optimizer in step.optimizers for state in optimizer.state.values()):
        for momentum in (state[key] for key in ("momentum_in", "momentum_out") if key in state):
            momentum.add_(0)  # as the backward of a single-step layer would: without a gradient it is not moved
    # In one slice a parameter: this step's temporaries do not count, and slices take time.
    with mock.patch.object(adamw, "SLICE", 1 << 62), mock.patch.object(_base, "SLICE", 1 << 62):
        for optimizer in step.optimizers:
            optimizer.step()
    for parameter in parameters:
        parameter.grad = None


# -- what the fake CPU is told so that it does what CUDA does ---------------------------------------------------------


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention by the fused kernel, whatever the device would choose: no tokens × tokens matrix.

    Replaced by name: a ``TorchFunctionMode`` is off during backward, when a checkpointed layer runs again.
    """
    original = F.scaled_dot_product_attention

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        bound = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        q, k, v = bound["query"], bound["key"], bound["value"]
        if bound.get("attn_mask") is not None:  # CUDA takes the memory-efficient kernel: the mask as it is
            return original(*args, **kwargs)
        if torch.is_autocast_enabled("cpu"):
            q, k, v = (t.to(torch.get_autocast_dtype("cpu")) for t in (q, k, v))
        causal = bool(bound.get("is_causal", False))
        out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, float(bound.get("dropout_p", 0.0)), causal, scale=bound.get("scale")
        )
        return out

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield


def _flash_backward_buffers(operator: Any, args: tuple) -> int:
    """Bytes that flash attention's backward on CUDA allocates inside: a float32 dq, row sums, expanded dk and dv."""
    if operator is not torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return 0
    _, q, k = args[:3]
    batch, heads, tokens, width = q.shape
    expanded = 2 * batch * heads * tokens * width * q.element_size() if k.shape[1] != heads else 0
    return 4 * batch * heads * tokens * (width + 1) + expanded


@contextlib.contextmanager
def _as_transformers_runs() -> Iterator[None]:
    """Keep ``transformers`` from building a tokens × tokens mask, which it does for fake tensors only.

    It cannot read from them that no sequences are packed; on real ones it does, and passes no mask.
    """
    from transformers import masking_utils

    if not hasattr(masking_utils, "find_packed_sequence_indices"):
        yield
        return
    with mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None):
        yield


# -- labels, and what many layers take from what few take -------------------------------------------------------------


@contextlib.contextmanager
def _labels(tracker: StorageTracker, model: nn.Module) -> Iterator[None]:
    """Name the stretches of a step by decoder layer: the first two, and the last two counted from the end."""
    layers = decoder_layers(model)
    handles = []

    def enter(*where: str) -> None:
        tracker.enter_label(tracker.phase, *(f"{tracker.phase} {name}" for name in where))

    def before(where: tuple[str, ...]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple) -> None:
            if tracker.phase == "forward":
                enter(*where)
                if "0" in where and args and isinstance(args[0], Tensor) and args[0].requires_grad:
                    args[0].register_hook(lambda grad: enter("inputs"))

        return hook

    def after(where: tuple[str, ...]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, out: Any) -> None:
            if tracker.phase != "forward":
                return
            hidden = out[0] if isinstance(out, tuple) else out
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda grad: enter(*where))
            if "-1" in where:
                enter("head")

        return hook

    for index, layer in enumerate(layers):
        where = tuple(str(place) for place in (index, index - len(layers)) if -2 <= place < 2)
        handles.append(layer.register_forward_pre_hook(before(where)))
        handles.append(layer.register_forward_hook(after(where)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _extrapolate(few: _Run, more: _Run, depth: int) -> _Run:
    """Every label's split is linear in the number of layers; labels that only one run has lie between others.

    An operator's n-th call is compared only where both runs call it equally often (multi-tensor optimizers); where
    it is called for every parameter, the largest of all its calls is.
    """
    factor = (depth - _FEW[0]) / (_FEW[1] - _FEW[0])
    calls = [_calls(run) for run in (few, more)]
    result = _Run(
        parameters=_line(few.parameters, more.parameters, factor),
        trainable=_line(few.trainable, more.trainable, factor),
    )
    for label in few.splits.keys() & more.splits.keys():
        operator, _, count = label.partition("#")
        if count and calls[0].get(operator) != calls[1].get(operator):
            continue
        a, b = few.splits[label], more.splits[label]
        result.splits[label] = {key: _line(a.get(key, 0), b.get(key, 0), factor) for key in a.keys() | b.keys()}
    return result


def _calls(run: _Run) -> dict[str, int]:
    calls: dict[str, int] = {}
    for label in run.splits:
        operator, _, count = label.partition("#")
        if count:
            calls[operator] = max(calls.get(operator, 0), int(count))
    return calls


def _line(few: int, more: int, factor: float) -> int:
    return round(few + (more - few) * factor)


def _result(run: _Run, setup: TrainingSetup, *, extrapolated: bool) -> MemoryEstimate:
    phases = {}
    for phase in PHASES:
        own = (f"{phase} ", f"{phase}/")
        splits = [split for label, split in run.splits.items() if label == phase or label.startswith(own)]
        if splits:
            phases[phase] = peak_of(max(splits, key=lambda split: sum(split.values())))
    phase = max(phases, key=lambda name: phases[name].total)
    top = phases[phase]
    return MemoryEstimate(
        peak=top.total,
        phase=phase,
        categories=top.categories,
        rotations=top.rotations,
        phases=phases,
        tokens=setup.batch_size * setup.seq_len,
        parameters=run.parameters,
        trainable=run.trainable,
        extrapolated=extrapolated,
        setup=setup,
        reserved=run.reserved,
    )
