"""Whether every trainable matrix learns: seen in the first steps of any loop, on any optimizer, at next to no cost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poetx.distributed.sharded import is_sharded
from poetx.layers.poet import PoetLinear
from poetx.layers.single_step import SingleStepLinear
from poetx.layers.walk import check_model, poet_layers, single_step_layers
from poetx.merge import merge_handle
from poetx.optimizer_restart import check_optimizer

logger = logging.getLogger(__name__)

#: Elements read at once, so that no library makes a float64 copy of a whole matrix.
_SLICE = 1 << 22


@dataclass(frozen=True)
class TrainingProblem:
    """One parameter that does not learn: its name, what was seen, and what to do."""

    name: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}; {self.remedy}"


@dataclass(frozen=True)
class TrainingReport:
    """What :func:`check_training` saw. ``print(report)`` is meant to be read.

    Attributes:
        steps: optimizer steps watched.
        matrices: trainable matrices that were watched, rotations and weights of single-step layers among them.
        problems: those that did not learn, and parameters that the optimizer does not hold.
    """

    steps: int
    matrices: int
    problems: tuple[TrainingProblem, ...]

    def __str__(self) -> str:
        if not self.problems:
            return f"all {self.matrices} trainable matrices received gradient and moved in {self.steps} steps"
        title = f"{len(self.problems)} parameters do not learn as they should ({self.steps} steps watched):"
        return "\n".join([title, *(f"  {problem}" for problem in self.problems)])


@dataclass
class _Watched:
    """One matrix: what is known of it so far. The flags stay on its device until somebody asks."""

    name: str
    parameter: Tensor
    start: Tensor
    layer: nn.Module | None = None  # the converted layer that it belongs to
    merges: int | None = None  # merge count at the start, of a rotation
    arrived: bool = False
    nonzero: Tensor | None = None
    called: bool = False
    largest_lr: float = 0.0

    def see(self, grad: Tensor | None) -> None:
        if grad is None:  # of a function that has none for this input
            return
        values = grad._values() if grad.is_sparse else _local(grad)
        some = values.detach().any()
        self.arrived, self.nonzero = True, some if self.nonzero is None else self.nonzero | some


class TrainingCheck:
    """What :func:`check_training` returns.

    Attributes:
        result: the report, once enough steps were taken; None until then.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        tell: Callable[[TrainingReport], Any] | None,
    ) -> None:
        check_model(model)
        check_optimizer(optimizer)
        self._model, self._steps, self._tell = model, steps, tell
        while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer  # pyright: ignore[reportAttributeAccessIssue]  # accelerate's wrapper
        self._optimizer, self._taken = optimizer, 0
        self.result: TrainingReport | None = None
        self._watched = {id(p): _Watched(name, p, _checksum(p), layer) for name, p, layer in self._matrices()}
        for watched in self._watched.values():
            if isinstance(watched.layer, PoetLinear):
                watched.merges = int(watched.layer.merge_count)
        self._last = optimizer.register_step_post_hook(self._after_step)
        self._hooks: list[Any] = [optimizer.register_step_pre_hook(self._before_step)]
        # Before the gradient is accumulated: an optimizer that releases gradients leaves none to be looked at later.
        self._hooks += [w.parameter.register_hook(w.see) for w in self._watched.values() if w.parameter.requires_grad]

    def remove(self) -> None:
        """Stop watching; :meth:`report` still tells what was seen. Not for use inside a hook of the optimizer."""
        self._let_go()
        self._last.remove()

    def _let_go(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def report(self) -> TrainingReport:
        """What was seen so far; waits for the device."""
        if self.result is not None:
            return self.result
        held = self._held()
        problems = [problem for w in self._watched.values() if (problem := self._problem(w, id(w.parameter) in held))]
        problems += self._vectors(held)
        rotations = [(name, layer) for name, layer in poet_layers(self._model) if not layer.one_sided]
        if self._taken and rotations and not self._merges():
            problems.append(
                TrainingProblem(
                    rotations[0][0],
                    "nothing has merged the rotations, and poetx.merge_every is not registered on this optimizer",
                    "call poetx.merge_every(optimizer, model, steps=200), or poetx.merge_ yourself every few hundred "
                    "steps",
                )
            )
        return TrainingReport(self._taken, len(self._watched), tuple(problems))

    def _held(self) -> set[int]:
        return {id(p) for group in self._optimizer.param_groups for p in group["params"]}

    def _matrices(self) -> Iterator[tuple[str, Tensor, nn.Module | None]]:
        """What must learn, and rotations that the optimizer holds: (name, parameter, converted layer or None)."""
        held = self._held()
        rotations = {id(p): layer for _, layer in poet_layers(self._model) for p in layer.rotations}
        single = {id(layer.weight): layer for _, layer in single_step_layers(self._model) if not layer.frozen}
        for name, p in self._model.named_parameters():
            wanted = p.requires_grad or id(p) in single or (id(p) in rotations and id(p) in held)
            if wanted and p.ndim >= 2 and p.numel() and not p.is_meta:
                yield name, p, rotations.get(id(p)) or single.get(id(p))

    def _merges(self) -> bool:
        merged = (bool(layer.merge_count > 0) for _, layer in poet_layers(self._model))
        return merge_handle(self._optimizer) is not None or any(merged)

    def _vectors(self, held: set[int]) -> Iterator[TrainingProblem]:
        for name, p in self._model.named_parameters():
            if p.requires_grad and id(p) not in held and id(p) not in self._watched:
                yield TrainingProblem(name, *_MISSING)

    def _problem(self, seen: _Watched, held: bool) -> TrainingProblem | None:
        if not held:
            return TrainingProblem(seen.name, *_MISSING)
        if not seen.parameter.requires_grad and not isinstance(seen.layer, SingleStepLinear):
            return TrainingProblem(
                seen.name,
                "frozen (requires_grad=False), but the optimizer holds it",
                "call requires_grad_(True) on it, or leave it out of the optimizer if it is to stay as it is",
            )
        if not self._taken:
            return None
        if not seen.arrived:
            what, remedy = _NOT_CALLED if self._taken > 1 and not seen.called else _NO_GRADIENT
            return TrainingProblem(seen.name, what, remedy)
        sharded = is_sharded(seen.parameter)  # of which others may have the rows that are used
        if seen.nonzero is not None and not bool(seen.nonzero) and not sharded:
            return TrainingProblem(
                seen.name,
                "its gradient was exactly zero",
                "a factor next to it is zero (a zero weight, a closed gate, dead units), or nothing behind it depends "
                "on it; start that factor away from zero, or exclude the layer from conversion",
            )
        if seen.largest_lr == 0:
            return TrainingProblem(
                seen.name, "its learning rate was 0 in every step", "set lr of its group, or check the schedule"
            )
        if sharded or self._moved(seen):
            return None
        return TrainingProblem(
            seen.name,
            "received gradient but did not move",
            f"steps too small for {str(seen.parameter.dtype).removeprefix('torch.')}, or the optimizer leaves it out; "
            "raise its lr, keep it in float32, or use poetx.optim.AdamW, which rounds stochastically",
        )

    def _moved(self, seen: _Watched) -> bool:
        if isinstance(seen.layer, PoetLinear) and int(seen.layer.merge_count) != seen.merges:
            return True  # a merge put the rotation back to zero
        return not torch.equal(_checksum(seen.parameter), seen.start.to(seen.parameter.device))

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                seen = self._watched.get(id(p))
                if seen is None:
                    continue
                seen.largest_lr = max(seen.largest_lr, float(group.get("lr", 1.0)))
                if p.grad is not None and not seen.arrived:  # set without autograd's hooks, as FSDP does
                    seen.see(p.grad)
                if isinstance(seen.layer, SingleStepLinear):
                    self._see_momentum(seen)

    def _see_momentum(self, seen: _Watched) -> None:
        """A single-step layer has no gradient: its backward adds to the momentum."""
        state = self._optimizer.state.get(seen.parameter, {})
        for key, value in state.items():
            if key.startswith("momentum") and isinstance(value, Tensor) and value.numel():
                some = _local(value).any()
                seen.nonzero = some if seen.nonzero is None else seen.nonzero | some
        seen.arrived = seen.nonzero is not None and bool(seen.nonzero)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.result is not None:
            return  # torch goes through a step's hooks while it calls them, so that none may take itself away
        self._taken += 1
        if self._taken == 1 and self._steps > 1:
            self._watch_calls()
        if self._taken < self._steps:
            return
        self.result = self.report()
        self._let_go()
        if self._tell is not None:
            self._tell(self.result)
        elif self.result.problems:
            logger.warning("%s", self.result)
        else:
            logger.info("%s", self.result)

    def _watch_calls(self) -> None:
        """Whether modules whose weights got no gradient are called: only those, so that no other is compiled anew."""
        waiting: dict[int, list[_Watched]] = {}
        for seen in self._watched.values():
            if not seen.arrived:
                waiting.setdefault(id(seen.parameter), []).append(seen)
        for module in self._model.modules():
            found = [seen for p in module.parameters(recurse=False) for seen in waiting.get(id(p), [])]
            if found:

                def called(module: nn.Module, inputs: Any, found: list[_Watched] = found) -> None:
                    for seen in found:
                        seen.called = True

                self._hooks.append(module.register_forward_pre_hook(called))


_MISSING = (
    "trainable, but this optimizer does not hold it",
    "build the optimizer after poetx.convert_, from poetx.param_groups(model, ...) or the model itself; or freeze it "
    "with requires_grad_(False)",
)
_NOT_CALLED = (
    "its module was never called, so it received no gradient",
    "if the model multiplies by its weight itself, put it in exclude_modules; else the loss does not need it (an "
    "expert that no token reached, an unused head): freeze or remove it",
)
_NO_GRADIENT = (
    "received no gradient",
    "its output is not used by the loss, or is detached or computed under no_grad, or backward(inputs=...) names other "
    "tensors (single-step layers need a plain backward()); freeze it if that is meant",
)


def check_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int = 3,
    tell: Callable[[TrainingReport], Any] | None = None,
) -> TrainingCheck:
    """Watch the first ``steps`` optimizer steps and say which trainable matrix does not learn, and why.

    Call it when model and optimizer are ready; the loop stays as it is. Every matrix that requires a gradient (dense
    weights, embeddings, head, rotations, adapters) and every weight of a single-step layer must be in the optimizer,
    receive a gradient other than zero, and move. After ``steps`` steps it logs a warning with one line for each that
    did not, and stops watching; :meth:`TrainingCheck.report` tells at any time. Vectors (biases, norms) must be
    in the optimizer only.

    Costs two sums over every watched parameter, and one test of its gradient in each backward pass; memory: three
    scalars a parameter. Numbers of the training are not touched.

    Args:
        tell: called with the report instead of logging it.
    """
    return TrainingCheck(model, optimizer, steps, tell)


@torch.no_grad()
def _checksum(p: Tensor) -> Tensor:
    """[2]: sum and norm, which a step of any kind changes, summed in float64 where the device has it."""
    dtype = torch.float32 if p.device.type == "mps" else torch.float64
    parts = _local(p.detach()).reshape(-1).split(_SLICE)
    sums = torch.stack([part.sum(dtype=dtype) for part in parts]).sum()
    squares = torch.stack([torch.linalg.vector_norm(part, dtype=dtype).square() for part in parts]).sum()
    return torch.stack([sums, squares])


def _local(values: Any) -> Tensor:
    return values.to_local() if hasattr(values, "to_local") else values
