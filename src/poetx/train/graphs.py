"""Forward and backward of micro-batches as CUDA graphs: what the host launched kernel by kernel, it launches at once.

Where the host takes longer to launch a step's kernels than the GPU takes to run them, which is so below some thousands
of tokens, the GPU waits. A graph holds the kernels of one pass, with the addresses of all they read and write; so the
inputs are copied to where the graph reads them, and gradients stay where it adds to them.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from poetx.errors import UserError, one_line
from poetx.layers.merge_reminder import look_at_merges
from poetx.layers.poet import PoetLinear
from poetx.layers.single_step import SingleStepLinear
from poetx.optim.gradient_release import is_handed_over

logger = logging.getLogger(__name__)

#: Inputs and labels of a micro-batch.
Batch = Sequence[Tensor]
#: ``body(batch, tokens)`` adds the gradient of a micro-batch's loss over ``tokens``, a scalar, and returns the loss.
Body = Callable[[Batch, Tensor], Tensor]

NOT_PACKED = "train.cuda_graphs: not with documents that are packed; set data.pack=false, or leave it out"
#: Steps of a shape of micro-batch that the host launches before a graph is captured: what is made once is made there.
_LAUNCHED_FIRST = 2
#: Steps launched because somebody hooks on a gradient, after which that is said.
_HOOKED_LONG = 16


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    batch: list[Tensor]
    loss: Tensor
    fed: list[Any]  # single-step matrices whose momentum the pass adds to


class GraphedPasses:
    """The micro-batches of training steps, captured once for each shape, then replayed.

    A step is launched as ever where a micro-batch has a shape that is new, and as long as a parameter has a hook on its
    gradient. Where tensors have moved, or other parameters train, all graphs are made anew. What layers do on the host
    in a pass they do not do in a replay: a merge is looked at here, and matrices of single-step layers are told that
    their momentum was added to. Nobody counts passes without a merge, and hooks of modules do not run.

    Args:
        model, optimizer: on a GPU; the optimizer steps after backward, not in it.
        body: the same for all steps; it waits for nothing on the host.
        may_draw: random numbers. Not where layers are computed again without the generator's state.

    Raises:
        UserError: a momentum whose rounding needs the host in every pass.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, body: Body, *, may_draw: bool = True
    ) -> None:
        if rounds := next((m.name for m in getattr(optimizer, "matrices", ()) if m.config.rounds_momenta), None):
            raise UserError(
                f"train.cuda_graphs: {rounds} has a momentum in bfloat16 (poet.rotation_dtype), for whose rounding the "
                "host draws a number in every pass; use float32, or leave it out"
            )
        self.model, self.optimizer, self.body, self.may_draw = model, optimizer, body, may_draw
        self.replayed = self.captured = self._hooked = 0
        self._stream: torch.cuda.Stream | None = None
        self._forget()

    def _forget(self) -> None:
        self._graphs: dict[Any, _Graph] = {}
        self._launched: Counter[Any] = Counter()
        self._trained: dict[Any, set[nn.Parameter]] = {}  # by the shapes of a step
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._made_of: Any = None
        self._written: Any = None
        self._pool: Any = None

    def __call__(self, micro_batches: Sequence[Batch], tokens: float) -> Tensor:
        """Add the gradients of a step to parameters that have none yet; the sum of the losses, a scalar.

        Raises:
            UserError: the pass cannot be captured: the host has to look at a value in it, it draws where it must not,
                or not every step of these shapes gives the same parameters a gradient.
        """
        device = micro_batches[0][0].device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        shapes = [tuple((tuple(t.shape), t.dtype) for t in batch) for batch in micro_batches]
        written, made_of, hooked = self._state()
        if made_of != self._made_of:
            self._forget()
        over = torch.full((), tokens, dtype=torch.float32, device=device)
        kind = frozenset(shapes)  # another may give other parameters a gradient
        if hooked is not None:
            self._say_hooked(hooked)
        if hooked is not None or self._launched[kind] < _LAUNCHED_FIRST:
            losses = [self._launch(batch, over) for batch in micro_batches]
            self._launched[kind] += 1
            self._trained[kind] = {p for p in self.model.parameters() if p.grad is not None}
        else:
            if written != self._written:
                look_at_merges(self.model)
            self._set_gradients(self._trained[kind])
            pairs = zip(shapes, micro_batches, strict=True)
            losses = [self._replay(shape, batch, over) for shape, batch in pairs]
        self._written, self._made_of = written, made_of
        return torch.stack(losses).sum()

    def _say_hooked(self, parameter: nn.Parameter) -> None:
        """Not of the look at a run's first steps, which goes."""
        self._hooked += 1
        if self._hooked == _HOOKED_LONG:
            name = next(name for name, p in self.model.named_parameters() if p is parameter)
            logger.warning("train.cuda_graphs: %s has a hook on its gradient, so passes are launched", name)

    def _state(self) -> tuple[Any, Any, nn.Parameter | None]:
        """Who has written layers so far; where everything is that a graph reads and writes, and what trains; and a
        parameter on whose gradient somebody hooks.
        """
        written, made_of, hooked = [], [], None
        for module in self.model.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    made_of.append((parameter.data_ptr(), parameter.requires_grad))
                    hooked = parameter if _is_hooked(parameter) else hooked
            made_of += [buffer.data_ptr() for buffer in module._buffers.values() if buffer is not None]
            if isinstance(module, PoetLinear):
                written += [t._version for t in (module.merge_count, module.perm_in, module.perm_out)]
            elif isinstance(module, SingleStepLinear) and module.momentum is not None:
                made_of += [module.frozen, *(t.data_ptr() for t in module.momentum[:4])]
        return written, made_of, hooked

    def _launch(self, batch: Batch, over: Tensor) -> Tensor:
        """As the host does it, on the stream that graphs are captured on, whose workspaces are made by this."""
        assert self._stream is not None
        device = batch[0].device
        current = torch.cuda.current_stream(device)
        before = None if self.may_draw else _random_state(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = self.body(batch, over)
        current.wait_stream(self._stream)
        if before is not None and not torch.equal(before, _random_state(device)):
            raise UserError(
                "train.cuda_graphs: the model draws random numbers (dropout, say), which with "
                "model.gradient_checkpointing=true would be others when a layer is computed again; leave one of them "
                "out"
            )
        return loss

    def _set_gradients(self, trained: set[nn.Parameter]) -> None:
        """Zeros at the same places in every step: graphs add to them."""
        for parameter in trained - self._gradients.keys():
            self._gradients[parameter] = torch.empty_like(parameter.detach())
        if trained:
            torch._foreach_zero_([self._gradients[p] for p in trained])  # pyright: ignore[reportPrivateImportUsage]
        for parameter in trained:
            parameter.grad = self._gradients[parameter]

    def _replay(self, shape: Any, batch: Batch, over: Tensor) -> Tensor:
        found = self._graphs.get(shape)
        if found is None:
            found = self._graphs[shape] = self._capture(batch, over)
        for target, value in zip(found.batch, (*batch, over), strict=True):
            target.copy_(value, non_blocking=True)
        for matrix in found.fed:  # first, so that an interruption finds what is to be taken back
            matrix.touched = True
        found.graph.replay()
        self.replayed += 1
        return found.loss.clone()

    def _capture(self, batch: Batch, over: Tensor) -> _Graph:
        """A graph of the pass, of which nothing runs yet."""
        static = [t.clone() for t in (*batch, over)]
        before = [(p, p.grad) for p in self.model.parameters()]
        changes = [(matrix, matrix.changes) for matrix in getattr(self.optimizer, "matrices", ())]
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        settings: dict[str, Any] = {"pool": self._pool, "stream": self._stream}
        outside = sys.exc_info()[1]
        try:
            # thread_local: other threads may go on copying
            with torch.cuda.graph(graph, capture_error_mode="thread_local", **settings):
                loss = self.body(static[:-1], static[-1])
        except Exception as error:
            raise _why(error, outside) from None
        if any(parameter.grad is not gradient for parameter, gradient in before):
            raise UserError(_OTHER_GRADIENTS)
        self.captured += 1
        return _Graph(graph, static, loss, [matrix for matrix, before in changes if matrix.changes != before])


_OTHER_GRADIENTS = (
    "train.cuda_graphs: not every pass of this model gives the same parameters a gradient, or it puts them in place of "
    "those before; leave it out"
)


def _why(error: BaseException, outside: BaseException | None) -> BaseException:
    """What to raise where a capture failed: leaving one that has failed raises an error of its own.

    Args:
        outside: what was being handled when the capture began.
    """
    chain = [error]
    while (before := chain[-1].__context__) is not None and before is not outside:
        chain.append(before)
    for link in chain:
        if isinstance(link, (UserError, torch.OutOfMemoryError)) or not isinstance(link, Exception):
            return link
    return UserError(
        f"train.cuda_graphs: a pass of this model cannot be captured ({one_line(chain[-1])}); leave it out"
    )


def _is_hooked(parameter: nn.Parameter) -> bool:
    after = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return bool(parameter._backward_hooks) or (bool(after) and not is_handed_over(parameter))


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
