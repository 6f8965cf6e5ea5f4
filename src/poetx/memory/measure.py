"""What a step really took: allocator counters on CUDA, tracked tensors and resident memory on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from poetx.errors import UserError
from poetx.layers.walk import rotation_ids
from poetx.memory.resident import resident_peak
from poetx.memory.tracker import (
    PHASES,
    PhasePeak,
    Split,
    StorageTracker,
    adopt_state,
    followed,
    peak_of,
    stepped_rotations,
    storages,
)
from poetx.merge import merge_handle
from poetx.ops.library import transparent_operators


class MemoryProbe:
    """What :func:`measure_memory` returns: results while and after the ``with`` block.

    Attributes:
        phases: the largest moment of each phase so far, as in :class:`poetx.memory.MemoryEstimate`.
        reserved: bytes that the CUDA allocator held at most; 0 on the CPU.
        resident: largest resident set of the process so far, bytes.
    """

    def __init__(self, model: nn.Module, optimizers: tuple[torch.optim.Optimizer, ...], device: torch.device) -> None:
        self.phases: dict[str, PhasePeak] = {}
        self.reserved = 0
        self._model, self._optimizers, self._device = model, optimizers, device
        self._stack = contextlib.ExitStack()
        self._tracker: StorageTracker | None = None
        self._phase, self._saved, self._merges = "", 0, 0

    @property
    def peak(self) -> int:
        """Bytes at the largest moment of any phase."""
        return max((phase.total for phase in self.phases.values()), default=0)

    @property
    def resident(self) -> int:
        return resident_peak()

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for a line of metrics; sizes in bytes."""
        phases = {name: {"total": p.total, **p.categories} for name, p in self.phases.items()}
        return {"peak": self.peak, "reserved": self.reserved, "resident": self.resident, "phases": phases}

    def phase(self, name: str) -> None:
        """Say that ``forward``, ``backward``, ``step`` or ``merge`` begins, where hooks cannot know."""
        self._close_phase()
        self._phase = name
        if self._tracker is not None:
            if name == "step" or name == "merge":
                adopt_state(self._tracker, self._optimizers, self._model)
            self._tracker.enter_phase(name)

    def __enter__(self) -> MemoryProbe:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._tracker = StorageTracker()
            self._stack.enter_context(transparent_operators())
            self._stack.enter_context(self._tracker)
            self._stack.enter_context(followed(self._tracker, self._model))
            adopt_state(self._tracker, self._optimizers, self._model)
        hooks: list[Any] = [
            self._model.register_forward_pre_hook(lambda module, args: self.phase("forward")),
            self._model.register_forward_hook(self._after_forward),
        ]
        for optimizer in self._optimizers:
            hooks.append(optimizer.register_step_pre_hook(lambda *_: self.phase("step")))
            first = optimizer.register_step_post_hook(self._before_merge)
            optimizer._optimizer_step_post_hooks.move_to_end(first.id, last=False)  # type: ignore[attr-defined]
            hooks += [first, optimizer.register_step_post_hook(self._after_merge)]
        for hook in hooks:
            self._stack.callback(hook.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.phase("")
        self._stack.close()

    def _after_forward(self, module: nn.Module, args: Any, out: Any) -> None:
        first = next((t for t in _tensors(out) if t.requires_grad), None)
        if first is not None:
            first.register_hook(lambda grad: self.phase("backward"))

    def _merge_count(self) -> int:
        handles = map(merge_handle, self._optimizers)
        return sum(handle.merges for handle in handles if handle is not None)

    def _before_merge(self, *_: Any) -> None:
        if self._tracker is not None:
            adopt_state(self._tracker, self._optimizers, self._model)
        self._merges = self._merge_count()
        self.phase("merge")

    def _after_merge(self, *_: Any) -> None:
        if self._merge_count() == self._merges:
            self._phase = ""  # nothing was merged: this was no phase
        self.phase("after")

    def _close_phase(self) -> None:
        name = self._phase
        if self._tracker is not None:
            if name in PHASES and name in self._tracker.labels:
                self._note(name, self._tracker.split(name))
            return
        if name in PHASES:
            torch.cuda.synchronize(self._device)
            self._note(name, self._counters(name))
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved(self._device))
        torch.cuda.reset_peak_memory_stats(self._device)

    def _note(self, name: str, split: Split) -> None:
        peak = peak_of(split)
        if name not in self.phases or peak.total > self.phases[name].total:
            self.phases[name] = peak

    def _counters(self, phase: str) -> Split:
        """CUDA's counters say how much, not what: parameters, gradients and state are added up, the rest is the rest.

        Activations are what forward left allocated at its end; in backward no more than that is called so.
        """
        split = owned_bytes(self._model, self._optimizers)
        known = sum(split.values())
        rest = torch.cuda.max_memory_allocated(self._device) - known
        if phase == "forward":
            self._saved = max(0, torch.cuda.memory_allocated(self._device) - known)
        activations = min(rest, self._saved) if phase in ("forward", "backward") else 0
        return split | {("activations", False): activations, ("temporary", False): max(0, rest - activations)}


def owned_bytes(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> Split:
    """Bytes of parameters, buffers, gradients and optimizer state as they are now, shared storages once."""
    rotations, stepped = rotation_ids(model), stepped_rotations(model)
    split: Split = {}
    seen: set[int] = set()

    def add(tensor: Tensor, category: str, rotation: bool) -> None:
        for storage in storages(tensor):
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                split[category, rotation] = split.get((category, rotation), 0) + storage.nbytes()

    for p in model.parameters():
        add(p, "trainable" if p.requires_grad else "frozen", id(p) in rotations)
        if p.grad is not None:
            add(p.grad, "gradient", id(p) in rotations)
    for buffer in model.buffers():
        add(buffer, "frozen", False)
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            for tensor in tree_leaves(state):
                if isinstance(tensor, Tensor) and tensor.device == p.device:
                    add(tensor, "optimizer", id(p) in stepped)
    return split


def _tensors(out: Any) -> Iterator[Tensor]:
    values = out.values() if isinstance(out, dict) else out if isinstance(out, (tuple, list)) else [out]
    return (value for value in values if isinstance(value, Tensor))


def measure_memory(
    model: nn.Module, *optimizers: torch.optim.Optimizer, device: torch.device | str | None = None
) -> MemoryProbe:
    """Measure the training steps inside a ``with`` block, by phase and category.

        with poetx.measure_memory(model, optimizer) as memory:
            model(**batch).loss.backward()
            optimizer.step()
        print(memory.peak, memory.phases["backward"].categories)

    Phases begin by themselves at the model's forward, at the gradient of its output, at ``optimizer.step()`` and at a
    merge within it; ``memory.phase(name)`` says so where that is not enough. On CUDA the allocator's counters are
    read (and its peak statistics reset) at each phase. On the CPU every tensor is followed, which makes the steps
    several times slower; kernels' own buffers are seen in ``memory.resident`` only.

    Raises:
        UserError: a model without parameters.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise UserError("measure_memory: the model has no parameters")
    return MemoryProbe(model, optimizers, torch.device(device or parameter.device))
