"""Peak memory of one training step, predicted by taking the step: on fake tensors, with the code that trains."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from poetx.data.tokenizer import embeddings_needed, read_tokenizer, tokenizer_file
from poetx.distributed.ranks import rank_count
from poetx.errors import UserError
from poetx.layers.walk import converted_layers, poet_layers
from poetx.memory.tracker import PHASES, PhasePeak, Split, StorageTracker, adopt_state, followed, peak_of
from poetx.methods.base import convert_model, method_of
from poetx.models import check_fits, model_config, model_from_config, settled
from poetx.ops.library import transparent_operators
from poetx.planner.fake import NumbersAreOne, fake_, fake_ranks, flash_backward_buffers, fuse_attention_, meta_copy
from poetx.recipe import Recipe, load_recipe
from poetx.recipe.places import is_prepared
from poetx.savings.activation_checkpointing import decoder_layers
from poetx.savings.chunked_loss import check_head
from poetx.savings.offload_activations import host_activations
from poetx.targets import find_targets
from poetx.train.sharding import all_ranks, check_shardable, shard_model_
from poetx.train.step import TrainingStep

GIB = 1 << 30
#: Decoder layers of the two short runs that a deep model is extrapolated from.
_FEW = (3, 4)
_CUDA_GRANULARITY = 512
_DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class MemoryEstimate:
    """What one training step will take.

    Attributes:
        peak: bytes at the largest moment, and ``phase``, when that is.
        categories: those bytes as frozen, trainable, gradient, optimizer, activations, temporary.
        rotations: the part of trainable, gradient and optimizer that belongs to packed rotations.
        phases: the same for the largest moment of each phase.
        tokens: in one backward pass. parameters: all of them; trainable: those that train.
        host: bytes in host memory (``model.offload``); file: in files (``model.offload_dir``); moved: bytes that a
            micro-batch brings from both; stepped: that a step brings and writes, beside its micro-batches
            (single-step). hosted: of weights among host and file; read: locked memory to read them through.
        extrapolated: whether decoder layers were extrapolated from a few.
        recipe: what was asked, with ``train.dtype`` settled. device: whose allocator and kernels.
    """

    peak: int
    phase: str
    categories: dict[str, int]
    rotations: dict[str, int]
    phases: dict[str, PhasePeak]
    tokens: int
    parameters: int
    trainable: int
    host: int
    file: int
    hosted: int
    read: int
    moved: int
    stepped: int
    extrapolated: bool
    recipe: Recipe
    device: str

    @property
    def gib(self) -> float:
        """Peak in GB as the papers' tables count them: 2³⁰ bytes."""
        return self.peak / GIB

    @property
    def method(self) -> str:
        """The method in a few words, as its file in :mod:`poetx.methods` says it."""
        return method_of(self.recipe).title

    def in_files(self) -> MemoryEstimate:
        """The same with the weights of host memory in files."""
        return dataclasses.replace(self, host=self.host - self.hosted + self.read, file=self.hosted)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, sizes in bytes."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        phases = {name: dataclasses.asdict(peak) for name, peak in self.phases.items()}
        return values | {"phases": phases, "recipe": self.recipe.to_dict()}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.categories.items())
        return f"{self.gib:.2f} GB in {self.phase} ({parts})"


@dataclass
class _Run:
    """One step's peaks by label."""

    splits: dict[str, Split] = field(default_factory=dict)
    parameters: int = 0
    trainable: int = 0
    hosted: int = 0
    activations: int = 0  # in host memory
    read: int = 0
    moved: int = 0
    stepped: int = 0


def estimate_memory(
    source: Any,
    overrides: Sequence[str] = (),
    *,
    recipe: Recipe | str | None = None,
    device: str = "cuda",
    every_layer: bool = False,
    ranks: int = 1,
) -> MemoryEstimate:
    """Predict the peak memory of one training step, without a GPU and without the memory.

    Model, conversion, optimizer and step are made by the functions that ``poetx train`` calls; only the tensors are
    fake (``FakeTensorMode``), and every storage is followed from birth to death. The optimizer's state is there from
    the start, as in every step but the first. A run that accumulates gradients is planned with two of its
    micro-batches. Every tensor is counted by itself; what a CUDA kernel allocates inside goes into
    ``planner.fake.flash_backward_buffers``.

    What is modelled instead of run, for ``device="cuda"``: sizes are rounded to the allocator's 512
    bytes, attention is the flash kernel with its backward's buffers, and layers take the slices they take on an
    accelerator. Not counted: the CUDA context, cuBLAS's workspace, NCCL's buffers, fragmentation, the other temporaries
    inside a native kernel, and merging. No text is read; without a tokenizer there are ``data.vocab_size`` tokens.

    Args:
        source: a recipe, the name or path of one, or a model of your own: a module, a function that makes one
            (called on the meta device), or a ``transformers`` config.
        overrides: ``"key=value"`` settings of the recipe; ``"method=adamw"`` is one word for several.
        recipe: what trains a model of your own. Default: as ``llama-1b`` does, *mem* with blocks of 256.
        device: ``"cuda"`` or ``"cpu"``; ``train.dtype: auto`` is bfloat16 or float32 there.
        every_layer: run all decoder layers instead of extrapolating from 3 and 4 of them. Both give the same number
            (a test holds that) for a model of equal layers; others are run whole anyway.
        ranks: processes that share each batch; planned is what the first takes, which has the most rows of what
            ``parallel: fsdp`` shards.

    Raises:
        UserError: a recipe, a model or a setting that does not exist or does not fit together.
    """
    if device not in _DEVICES:
        raise UserError(f"device={device}: must be one of {', '.join(_DEVICES)}")
    own_model, plan = planned_recipe(source, overrides, recipe)
    plan = settled(part_of(plan, ranks), torch.device(device))
    if isinstance(own_model, nn.Module) or callable(own_model):
        return _result(_take_step(_made(own_model), plan, device, ranks), plan, device, extrapolated=False)
    config = own_model
    vocab_size = 0
    if config is None:
        vocab_size = vocabulary(plan)
        config = model_config(plan, vocab_size=vocab_size, end_of_text_id=0)
    _check_positions(config)

    def run(layers: int | None = None) -> _Run:
        model = meta_model(config if layers is None else _with_layers(config, layers), plan)
        check_fits(model, plan, vocab_size)
        return _take_step(model, plan, device, ranks)

    depth = int(getattr(config, "num_hidden_layers", 0) or 0)
    if every_layer or depth <= max(_FEW) or not _uniform(config, plan):
        return _result(run(), plan, device, extrapolated=False)
    few = [run(layers) for layers in _FEW]
    return _result(_extrapolate(few[0], few[1], depth), plan, device, extrapolated=True)


def planned_recipe(source: Any, overrides: Sequence[str], recipe: Recipe | str | None) -> tuple[Any, Recipe]:
    """The model that was given, None where the recipe makes it, and the recipe without what planning leaves out."""
    source = os.fspath(source) if isinstance(source, os.PathLike) else source
    own_model = None if isinstance(source, (str, Recipe)) else source
    if not (isinstance(source, (str, Recipe)) or callable(source) or hasattr(source, "model_type")):
        raise UserError(f"{source!r}: is no recipe, no path of one, no model, no function that makes one and no config")
    overrides = [overrides] if isinstance(overrides, str) else overrides
    asked: Any = source if own_model is None else recipe if recipe is not None else "llama-1b"
    if not isinstance(asked, Recipe):
        asked = load_recipe(asked, overrides, text=False)
    elif overrides:
        raise UserError(f"overrides={list(overrides)}: are for a recipe's name or path; change the recipe itself")
    return own_model, asked.with_keys({"poet.merge_every": None}) if asked.merge_every is not None else asked


def part_of(recipe: Recipe, ranks: int) -> Recipe:
    """What one of so many processes trains.

    Raises:
        UserError: a batch that cannot be parted, or a key that a sharded model is not trained with.
    """
    if ranks == 1:
        return recipe
    if recipe.parallel == "fsdp":
        check_shardable(recipe)
    share, micro_batch = recipe.train.share(ranks)
    return recipe.with_keys({"train.batch_size": share, "train.micro_batch_size": micro_batch})


def vocabulary(recipe: Recipe) -> int:
    """Tokens of the recipe's tokenizer, of the one that would be trained, or 0 where the model decides."""
    if is_prepared(recipe.data.train):
        return embeddings_needed(read_tokenizer(tokenizer_file(str(recipe.data.train))))
    if recipe.data.tokenizer is not None:
        return embeddings_needed(read_tokenizer(tokenizer_file(recipe.data.tokenizer)))
    return 0 if recipe.model.config or recipe.model.pretrained else recipe.data.vocab_size


def _check_positions(config: Any) -> None:
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise UserError(f"rope_type={kind}: its tables depend on the data, which an estimate has none of; use default")


def _made(model: Any) -> nn.Module:
    if isinstance(model, nn.Module):
        made = meta_copy(model)
    else:
        with torch.device("meta"):
            made = model()
    if not isinstance(made, nn.Module):
        raise UserError(f"{model!r}: gives {type(made).__name__}, not a model")
    takes = inspect.signature(made.forward).parameters
    if "input_ids" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        raise UserError(
            f"{type(made).__name__}: its forward takes no input_ids; estimates are of transformers models that take "
            "them, and labels"
        )
    return made


def meta_model(config: Any, recipe: Recipe) -> Any:
    dtype = getattr(torch, recipe.train.dtype)
    return model_from_config(config, dtype, torch.device("meta"), f"model_type={config.model_type}")


def _with_layers(config: Any, layers: int) -> Any:
    """The same config with fewer decoder layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


_UNIFORM: dict[str, bool] = {}


def _uniform(config: Any, recipe: Recipe) -> bool:
    """Whether every decoder layer is like every other; remembered, for the sake of searches."""
    if len(set(getattr(config, "layer_types", None) or [""])) > 1:
        return False
    poet = None if recipe.poet is None else recipe.poet.config
    key = f"{type(config)} {config.to_json_string()} {poet}"
    if key not in _UNIFORM:
        model = meta_model(config, recipe)
        layers = decoder_layers(model)
        rotated = {} if poet is None else find_targets(model, poet).layers
        settings = {module: poet and poet.for_layer(name) for name, module in rotated.items()}
        kinds = {
            (
                *((n, p.shape, p.dtype) for n, p in layer.named_parameters()),
                *((n, settings[m]) for n, m in layer.named_modules() if m in settings),
            )
            for layer in layers
        }
        _UNIFORM[key] = len(layers) == config.num_hidden_layers and len(kinds) == 1
    return _UNIFORM[key]


def _take_step(model: nn.Module, recipe: Recipe, device: str, ranks: int) -> _Run:
    """Convert the dense meta model, build its optimizer, and follow its second step."""
    with fake_ranks(ranks):
        return _taken_step(model, recipe, device)


def _taken_step(model: nn.Module, recipe: Recipe, device: str) -> _Run:
    fuse_attention_(model)
    convert_model(model, recipe, None)
    if recipe.train.chunked_loss:
        check_head(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake_(model, mode)
    if recipe.parallel == "fsdp" and rank_count() > 1:
        place = torch.device("cpu")
        mesh = all_ranks(place)
        with mode:
            shard_model_(model, place, mesh)
    parameters = list(model.parameters())
    on_cuda = device == "cuda"
    tracker = StorageTracker(
        granularity=_CUDA_GRANULARITY if on_cuda else 1, hidden=flash_backward_buffers if on_cuda else None
    )
    clip = recipe.optimizer.clip or None
    passes = min(2, recipe.train.batch_size // recipe.train.micro_batch)
    recipe = recipe.with_keys({"train.batch_size": passes * recipe.train.micro_batch * rank_count()})
    moved: dict[str, int] = {}  # when a phase began the last time
    with mode, NumbersAreOne() as numbers, _one_line(recipe):

        def enter(phase: str) -> None:
            numbers.phase = phase
            if phase == "step":
                adopt_state(tracker, [optimizer], model)
            tracker.enter_phase(phase)
            moved[phase] = _moved(model)

        method = method_of(recipe)
        # foreach: what torch.optim chooses on CUDA by itself
        optimizer = method.build_optimizer(model, recipe.train.steps, foreach=True if on_cuda else None)
        step = TrainingStep.of(recipe, model, optimizer, phase=lambda phase: setattr(numbers, "phase", phase))
        seen = transparent_operators(device_type=device) if recipe.model.offload else contextlib.nullcontext()
        with seen:  # the optimizer's state comes to be, and the order is known in which weights are brought
            step.take([_batch(1, min(8, recipe.data.seq_len))], clip=clip)
        step.phase = enter
        batches = [_batch(recipe.train.micro_batch, recipe.data.seq_len) for _ in range(passes)]
        with contextlib.ExitStack() as stack:
            stack.enter_context(transparent_operators(device_type=device))
            stack.enter_context(tracker)
            stack.enter_context(followed(tracker, model))
            adopt_state(tracker, [optimizer], model)
            stack.enter_context(_labels(tracker, model))
            away = host_activations(model)
            if away is not None:
                away.told = tracker.leave_out
            before = _moved(model)
            step.take(batches, clip=clip)
    rotated = [layer for _, layer in poet_layers(model)]
    hosted = [t.numel() * t.element_size() for _, layer in converted_layers(model) for t in layer.host_tensors()]
    packed = sum(layer.in_features * layer.out_features for layer in rotated if layer.packed_weight is not None)
    return _Run(
        splits={label: tracker.split(label) for label in tracker.labels},
        parameters=sum(p.numel() for p in parameters) + packed,
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        hosted=sum(hosted),
        activations=away.size if away is not None else 0,
        read=2 * sum({1 << (size - 1).bit_length() for size in hosted if size}),  # as torch pins: powers of two, kept
        moved=(moved["step"] - before) // passes,
        stepped=_moved(model) - moved["step"],
    )


def _moved(model: nn.Module) -> int:
    """Bytes between host and device so far, both ways; activations, which come and go at different times, once."""
    queues = {id(layer.host): layer.host for _, layer in converted_layers(model) if layer.host is not None}
    away = host_activations(model)
    return sum(queue.moved + queue.returned for queue in queues.values()) + (0 if away is None else away.moved)


@contextlib.contextmanager
def _one_line(recipe: Recipe) -> Iterator[None]:
    """Say in one line what fake tensors cannot do: torch's fake product of stacked experts takes bfloat16 alone."""
    try:
        yield
    except RuntimeError as error:
        if "BF16" not in str(error):
            raise
        raise UserError(
            f"train.dtype={recipe.train.dtype}: a mixture of experts can be planned in bfloat16 only; set "
            "train.dtype=bfloat16"
        ) from None


def _batch(sequences: int, tokens: int) -> tuple[Tensor, Tensor]:
    inputs, labels = (torch.zeros(sequences, tokens, dtype=torch.long) for _ in range(2))
    return inputs, labels


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
        hosted=_line(few.hosted, more.hosted, factor),
        activations=_line(few.activations, more.activations, factor),
        read=few.read,
        moved=_line(few.moved, more.moved, factor),
        stepped=_line(few.stepped, more.stepped, factor),
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


def _result(run: _Run, recipe: Recipe, device: str, *, extrapolated: bool) -> MemoryEstimate:
    phases = {}
    for phase in PHASES:
        own = (f"{phase} ", f"{phase}/")
        splits = [split for label, split in run.splits.items() if label == phase or label.startswith(own)]
        if splits:
            phases[phase] = peak_of(max(splits, key=lambda split: sum(split.values())))
    phase = max(phases, key=lambda name: phases[name].total)
    top = phases[phase]
    estimate = MemoryEstimate(
        peak=top.total,
        phase=phase,
        categories=top.categories,
        rotations=top.rotations,
        phases=phases,
        tokens=recipe.train.micro_batch * recipe.data.seq_len,
        parameters=run.parameters,
        trainable=run.trainable,
        host=run.hosted + run.activations,
        file=0,
        hosted=run.hosted,
        read=run.read,
        moved=run.moved,
        stepped=run.stepped,
        extrapolated=extrapolated,
        recipe=recipe,
        device=device,
    )
    return estimate.in_files() if recipe.model.offload_dir else estimate
