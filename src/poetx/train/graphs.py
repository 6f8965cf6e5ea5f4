"""Forward and backward of micro-batches as CUDA graphs: what the host launched kernel by kernel, it launches at once.

Where the host takes longer to launch a step's kernels than the GPU takes to run them, which is so below some thousands
of tokens, the GPU waits. A graph holds the kernels of one pass, with the addresses of all they read and write; so the
inputs are copied to where the graph reads them, and gradients stay where it adds to them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from poetx.errors import UserError
from poetx.layers.merge_reminder import look_at_merges
from poetx.layers.poet import PoetLinear
from poetx.layers.single_step import SingleStepLinear

#: Inputs and labels of a micro-batch, and perhaps positions.
Batch = Sequence[Tensor]
#: ``body(batch, tokens)`` adds the gradient of a micro-batch's loss over ``tokens``, a scalar, and returns the loss.
Body = Callable[[Batch, Tensor], Tensor]

#: Steps of a shape of micro-batch that the host launches before a graph is captured: what is made once is made there.
_LAUNCHED_FIRST = 2


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    batch: list[Tensor]
    loss: Tensor
    fed: list[Any]  # single-step matrices whose momentum the pass adds to


class GraphedPasses:
    """The micro-batches of training steps, captured once for each shape, then replayed.

    A step is launched as ever where a micro-batch has a shape that is new. Where tensors have moved, or other
    parameters train, all graphs are made anew. What layers do on the host in a pass they do not do in a replay: a merge
    is looked at here, and matrices of single-step layers are told that their momentum was added to.

    Args:
        model, optimizer: on a GPU; the optimizer steps after backward, not in it.
        body: the same for all steps; it waits for nothing on the host.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, body: Body) -> None:
        if rounds := next((m.name for m in getattr(optimizer, "matrices", ()) if m.config.rounds_momenta), None):
            raise UserError(
                f"train.cuda_graphs: {rounds} has a momentum in bfloat16 (poet.rotation_dtype), for whose rounding the "
                "host draws a number in every pass; use float32, or leave it out"
            )
        self.model, self.optimizer, self.body = model, optimizer, body
        self.replayed = self.captured = 0
        self._stream: torch.cuda.Stream | None = None
        self._forget()

    def _forget(self) -> None:
        self._graphs: dict[Any, _Graph] = {}
        self._launched: Counter[Any] = Counter()
        self._trained: set[nn.Parameter] = set()
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._made_of: Any = None
        self._written: Any = None
        self._pool: Any = None

    def __call__(self, micro_batches: Sequence[Batch], tokens: float) -> Tensor:
        """Add the gradients of a step to parameters that have none yet; the sum of the losses, a scalar.

        Raises:
            UserError: the pass cannot be captured, because the host has to look at a value in it.
        """
        device = micro_batches[0][0].device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        shapes = [tuple((tuple(t.shape), t.dtype) for t in batch) for batch in micro_batches]
        written, made_of = self._state()
        if made_of != self._made_of:
            self._forget()
        launches = any(self._launched[shape] < _LAUNCHED_FIRST for shape in shapes)
        over = torch.full((), tokens, dtype=torch.float32, device=device)
        if launches:
            losses = [self._launch(batch, over) for batch in micro_batches]
            self._launched.update(set(shapes))
            self._trained |= {p for p in self.model.parameters() if p.grad is not None}
        else:
            if written != self._written:
                look_at_merges(self.model)
            self._set_gradients()
            pairs = zip(shapes, micro_batches, strict=True)
            losses = [self._replay(shape, batch, over) for shape, batch in pairs]
        self._written, self._made_of = written, made_of
        return torch.stack(losses).sum()

    def _state(self) -> tuple[Any, Any]:
        """Who has written layers so far; and where everything is that a graph reads and writes, and what trains."""
        written, made_of = [], []
        for module in self.model.modules():
            for tensors in (module._parameters.values(), module._buffers.values()):
                made_of += [(t.data_ptr(), t.requires_grad) for t in tensors if t is not None]
            if isinstance(module, PoetLinear):
                written += [t._version for t in (module.merge_count, module.perm_in, module.perm_out)]
            elif isinstance(module, SingleStepLinear) and module.momentum is not None:
                made_of += [t.data_ptr() for t in module.momentum[:4]]
        return written, made_of

    def _launch(self, batch: Batch, over: Tensor) -> Tensor:
        """As the host does it, on the stream that graphs are captured on, whose workspaces are made by this."""
        assert self._stream is not None
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = self.body(batch, over)
        current.wait_stream(self._stream)
        return loss

    def _set_gradients(self) -> None:
        """Zeros at the same places in every step: graphs add to them."""
        for parameter in self._trained - self._gradients.keys():
            self._gradients[parameter] = torch.empty_like(parameter.detach())
        torch._foreach_zero_([*self._gradients.values()])  # pyright: ignore[reportPrivateImportUsage]
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient

    def _replay(self, shape: Any, batch: Batch, over: Tensor) -> Tensor:
        found = self._graphs.get(shape)
        if found is None:
            found = self._graphs[shape] = self._capture(batch, over)
        for target, value in zip(found.batch, (*batch, over), strict=True):
            target.copy_(value, non_blocking=True)
        found.graph.replay()
        for matrix in found.fed:
            matrix.touched = True
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
        try:
            # thread_local: other threads may go on copying
            with torch.cuda.graph(graph, capture_error_mode="thread_local", **settings):
                loss = self.body(static[:-1], static[-1])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"train.cuda_graphs: a pass of this model cannot be captured ({str(error).splitlines()[0]}); leave it "
                "out"
            ) from error
        if any(parameter.grad is not gradient for parameter, gradient in before):
            raise UserError(
                "train.cuda_graphs: not every pass of this model gives the same parameters a gradient, or it puts them "
                "in place of those before; leave it out"
            )
        self.captured += 1
        return _Graph(graph, static, loss, [matrix for matrix, before in changes if matrix.changes != before])
