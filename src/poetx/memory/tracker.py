"""Which tensors exist when: a dispatch mode that follows storages from birth to death, real or fake ones.

Every operator below autograd passes through, so the tracker sees what the model, its backward and its optimizer
allocate, whoever wrote them. It does not see inside one native kernel.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from poetx.distributed.sharded import is_sharded, local
from poetx.layers.walk import converted_layers, rotation_ids, single_step_layers

#: What a byte can belong to, in the order of the tables.
CATEGORIES = ("frozen", "trainable", "gradient", "optimizer", "gathered", "activations", "temporary")
PHASES = ("forward", "backward", "step", "merge")

#: Sizes by (category, whether it belongs to a packed rotation).
Split = dict[tuple[str, bool], int]


@dataclass(slots=True)
class Record:
    """One storage: bytes, the events between which it lived, and what it is."""

    size: int
    born: int
    phase: str
    category: str | None = None
    rotation: bool = False
    died: int | None = None
    reference: weakref.ref | None = None


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages behind a tensor; those of a wrapper subclass (a quantized tensor) are its parts', of a shard its."""
    tensor = local(tensor)
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [storage for name in names for storage in storages(getattr(tensor, name))]
    try:
        return [tensor.untyped_storage()]
    except NotImplementedError:  # sparse and opaque layouts have none
        return []


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of every storage that an operator makes, or something resizes, while the mode is on.

    What grows from nothing is ``"gathered"``: FSDP2 keeps the storages of a layer's whole parameters and empties them.

    Args:
        granularity: sizes are rounded up to this many bytes: 512 for the CUDA caching allocator, 1 for none.
        hidden: extra bytes that a native kernel allocates inside itself and frees, from the operator and its
            arguments: what a dispatch mode cannot see.
    """

    def __init__(
        self,
        *,
        granularity: int = 1,
        hidden: Callable[[Any, tuple], int] | None = None,
    ) -> None:
        super().__init__()
        self._granularity = granularity
        self._hidden = hidden or (lambda operator, args: 0)
        self._alive: dict[int, Record] = {}
        self._elsewhere: set[int] = set()
        self._records: list[Record] = []
        self._clock = 0
        self._current = 0
        self._phase = ""
        self._labels: tuple[str, ...] = ("",)
        self._peaks: dict[str, tuple[int, int]] = {}  # label -> (bytes, clock)
        self._forward_ends: list[int] = []
        self._operators: dict[str, int] = {}

    # -- what happened ----------------------------------------------------------------------------------------

    def enter_phase(self, phase: str) -> None:
        """Everything from here on belongs to ``phase``, until the next call."""
        if self._phase == "forward" and phase != "forward":
            self._forward_ends.append(self._clock)
        self._phase = phase
        self.enter_label(phase)

    def enter_label(self, *labels: str) -> None:
        """Finer names for the stretch of time that begins here."""
        self._labels = labels
        self._operators.clear()
        self._mark(0)

    @property
    def phase(self) -> str:
        return self._phase

    def adopt(self, tensors: Iterable[Tensor], category: str, *, rotation: bool = False) -> None:
        """Say what these tensors are; those the tracker has not met are counted from now on."""
        for tensor in tensors:
            for storage in storages(tensor):
                record = self._alive.get(storage._cdata) or self._add(storage, tensor.is_meta)
                if record is not None:
                    record.category, record.rotation = category, rotation

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these, which are in other memory and stay alive as long as the tracker is on."""
        self._elsewhere.update(storage._cdata for tensor in tensors for storage in storages(tensor))

    def __enter__(self) -> StorageTracker:
        resize = self._resize = torch.UntypedStorage.resize_

        def followed(storage: torch.UntypedStorage, size: int) -> Any:
            before = storage.nbytes()
            result = resize(storage, size)
            if storage._cdata in self._alive:
                self._remove(storage._cdata)
            record = self._add(storage)
            if record is not None and not before:
                record.category = "gathered"
            self._mark(0)
            return result

        torch.UntypedStorage.resize_ = followed  # pyright: ignore[reportAttributeAccessIssue]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._see(out)
        elif isinstance(out, (tuple, list)):
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._see(leaf)
        else:
            return out
        if self._phase == "step":
            name = f"step/{func}"
            count = self._operators[name] = self._operators.get(name, 0) + 1
            self._labels = ("step", name, f"{name}#{count}")
        self._mark(self._hidden(func, args))
        return out

    def _see(self, tensor: Tensor) -> None:
        for storage in storages(tensor):
            if storage._cdata not in self._alive:
                self._add(storage, tensor.is_meta)

    def _add(self, storage: torch.UntypedStorage, is_meta: bool = False) -> Record | None:
        size = storage.nbytes()
        if not size or is_meta or storage._cdata in self._elsewhere:
            return None
        size += -size % self._granularity
        self._clock += 1
        key = storage._cdata
        record = Record(size, self._clock, self._phase)
        record.reference = weakref.ref(storage, lambda _: self._remove(key))
        self._alive[key] = record
        self._records.append(record)
        self._current += size
        return record

    def _remove(self, key: int) -> None:
        record = self._alive.pop(key)
        record.reference = None
        self._clock += 1
        record.died = self._clock
        self._current -= record.size

    def _mark(self, extra: int) -> None:
        total = self._current + extra
        for label in self._labels:
            if label not in self._peaks or total > self._peaks[label][0]:
                self._peaks[label] = (total, self._clock)

    # -- what it comes to -------------------------------------------------------------------------------------

    @property
    def current(self) -> int:
        """Bytes alive now."""
        return self._current

    @property
    def labels(self) -> list[str]:
        return list(self._peaks)

    def split(self, label: str) -> Split:
        """Bytes by (category, rotation) at the largest moment of a phase or label; they sum to that moment's total.

        Activations are what forward made and left behind at its end, for backward. Everything else that is not a
        parameter, a gradient or optimizer state is temporary, what a checkpointed layer computes again included.
        """
        total, clock = self._peaks[label]
        split: Split = {}
        for record in self._records:
            if record.born <= clock and (record.died is None or record.died > clock):
                key = record.category or self._guess(record), record.rotation
                split[key] = split.get(key, 0) + record.size
        hidden = total - sum(split.values())
        if hidden:
            split["temporary", False] = split.get(("temporary", False), 0) + hidden
        return split

    def _guess(self, record: Record) -> str:
        if record.phase != "forward":
            return "activations" if not record.phase else "temporary"  # before the first phase: the batch itself
        end = next((end for end in self._forward_ends if end >= record.born), None)
        stayed = end is not None and (record.died is None or record.died > end)
        return "activations" if stayed else "temporary"


@contextlib.contextmanager
def followed(tracker: StorageTracker, model: nn.Module) -> Iterator[None]:
    """Tell ``tracker`` about the model's parameters and buffers now, and about each gradient when it is there."""
    rotations = rotation_ids(model)
    handles = []
    tracker.leave_out(tensor for _, layer in converted_layers(model) for tensor in layer.host_tensors())
    for parameter in model.parameters():
        rotation = id(parameter) in rotations
        category = "trainable" if parameter.requires_grad else "frozen"
        tracker.adopt([parameter], category, rotation=rotation)
        if not parameter.requires_grad:
            continue
        if parameter.grad is not None:
            tracker.adopt([parameter.grad], "gradient", rotation=rotation)

        def hook(p: Tensor, rotation: bool = rotation) -> None:
            if p.grad is not None:
                tracker.adopt([p.grad], "gradient", rotation=rotation)

        handles.append(parameter.register_post_accumulate_grad_hook(hook))
    tracker.adopt(model.buffers(), "frozen")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stepped_rotations(model: nn.Module) -> set[int]:
    """``id`` of the parameters whose optimizer state is that of rotations: of single-step layers the weight."""
    return rotation_ids(model) | {id(layer.weight) for _, layer in single_step_layers(model)}


def adopt_state(tracker: StorageTracker, optimizers: Iterable[torch.optim.Optimizer], model: nn.Module) -> None:
    """Tell ``tracker`` about the tensors in the optimizers' state, and FSDP2's gradients, of which no hook tells."""
    rotations = stepped_rotations(model)
    for parameter in model.parameters():
        if parameter.grad is not None and is_sharded(parameter):
            tracker.adopt([parameter.grad], "gradient", rotation=id(parameter) in rotations)
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor) and leaf.numel() > 1]
            tracker.adopt(tensors, "optimizer", rotation=id(parameter) in rotations)


@dataclass(frozen=True)
class PhasePeak:
    """The largest moment of one phase: bytes by category, and those of them that belong to packed rotations."""

    total: int
    categories: dict[str, int]
    rotations: dict[str, int]


def peak_of(split: Split) -> PhasePeak:
    """The table row of one moment."""
    categories = {name: split.get((name, False), 0) + split.get((name, True), 0) for name in CATEGORIES}
    rotations = {name: split.get((name, True), 0) for name in ("trainable", "gradient", "optimizer")}
    return PhasePeak(sum(categories.values()), categories, rotations)
