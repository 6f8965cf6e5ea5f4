"""The one training step: accumulate, see that all is finite, clip, step. Training, planning and benchmarks take it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poetx.distributed.gradients import GradientAverage, clip_, embeddings, total_norm
from poetx.distributed.ranks import on_any_rank, rank_count, sent_dtype, sum_
from poetx.distributed.sharded import as_forward, is_sharded
from poetx.errors import UserError
from poetx.layers.blocks_together import BlocksTogether, blocks_together, groups_of
from poetx.layers.shared_blocks import shared_blocks
from poetx.layers.walk import poet_layers
from poetx.methods.base import method_of, release_handle
from poetx.optim.gradient_release import is_handed_over
from poetx.recipe import Recipe
from poetx.savings.chunked_loss import chunked_cross_entropy
from poetx.train.graphs import NOT_PACKED, GraphedPasses
from poetx.train.one_document import one_document

#: Inputs and labels, and positions where documents are packed: a pair, or :class:`poetx.data.tokens.Batch`.
MicroBatch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]
#: Names under which a mixture of experts keeps the weight of its routers' load-balancing loss.
_ROUTER_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")


def no_phase(name: str) -> None:
    """The ``phase`` of a step that nobody measures: does nothing."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step found, on all ranks together.

    Attributes:
        loss: mean cross entropy over the tokens of the batch, nats.
        router_loss: what a mixture of experts added for balance, its weight included; None for any other model.
        grad_norm: before clipping, of the gradients that are there when backward is over.
        skipped: a loss or norm was not finite, and nothing was stepped.
    """

    loss: float
    router_loss: float | None
    grad_norm: float
    skipped: bool


@dataclass
class TrainingStep:
    """A model and its optimizer, ready to take steps; call it with a batch, or with this rank's part of one.

    Attributes:
        forward: what is called with ``input_ids``: the model, or its base model with ``chunked_loss``, or either of
            them compiled.
        acts_in_backward: of the method; the norm of the gradients leaves something out then.
        chunked_loss: never the full logits. autocast: compute in bfloat16, whatever the weights are.
        gradients: averages over the ranks of a process group; None in a lone process.
        together: layers that make their blocks together.
        graphs: replays passes; None: the host launches each kernel. Passes whose phases somebody measures it launches.
        phase: told ``"forward"`` and ``"backward"`` for every micro-batch, then ``"step"`` and ``"after"``.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    forward: Callable[..., Any]
    acts_in_backward: bool = False
    chunked_loss: bool = False
    autocast: bool = False
    gradients: GradientAverage | None = None
    together: list[BlocksTogether] = field(default_factory=list)
    phase: Callable[[str], None] = no_phase
    graphs: GraphedPasses | None = None

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        compiled: bool = False,
        phase: Callable[[str], None] = no_phase,
    ) -> TrainingStep:
        """The step that ``recipe`` asks for over a converted ``model`` and its method's ``optimizer``."""
        settings = recipe.train
        body: Any = model.base_model if settings.chunked_loss else model
        gradients = None
        if rank_count() > 1:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            kept = [p for p in model.parameters() if id(p) in held and not is_handed_over(p)]
            kept = [p for p in kept if not is_sharded(p)]  # fully_shard averages those by itself
            gradients = average_of(kept, model, overlap=release_handle(optimizer) is None) if kept else None
        alone = compiled or any(map(is_sharded, model.parameters()))
        step = cls(
            model=model,
            optimizer=optimizer,
            forward=torch.compile(body) if compiled else body,
            acts_in_backward=method_of(recipe).acts_in_backward,
            chunked_loss=settings.chunked_loss,
            autocast=settings.autocast,
            gradients=gradients,
            together=[] if alone else groups_of(model),
            phase=phase,
        )
        if settings.cuda_graphs:
            draws = not recipe.model.gradient_checkpointing
            step.graphs = GraphedPasses(model, optimizer, step.backward_of, may_draw=draws)
        return step

    def __call__(
        self, micro_batches: Sequence[MicroBatch], *, clip: float | None = None, tokens: int | None = None
    ) -> StepResult:
        """One optimizer step on inputs, labels and perhaps positions [sequences, tokens]; skipped if it is not finite.

        The gradient is that of the mean loss over all labels that count, however they are cut into micro-batches and
        over ranks.

        Args:
            clip: largest norm over all gradients; None or 0: no clipping.
            tokens: how many labels count (are not −100) in all micro-batches of this rank; None: every one.
        """
        # Of all ranks, whose mean is taken: one that has fewer weighs less.
        if tokens is not None and rank_count() > 1:
            tokens = int(sum_(torch.tensor(tokens, device=micro_batches[0][0].device)))
        share = None if tokens is None else max(1, tokens) / rank_count()
        total, router = self._accumulate(micro_batches, share, reads=True)
        grad_norm = total_norm([p.grad for p in self._parameters() if p.grad is not None])
        numbers = [total.double(), grad_norm.to(total.device).double(), *([] if router is None else [router.double()])]
        mean = sum_(torch.stack(numbers) / rank_count())  # so that all ranks skip, or clip, alike
        loss, norm, *rest = self._on_the_host(mean)
        skipped = not all(map(math.isfinite, (loss, norm, *rest)))
        if skipped:
            self._discard()
        else:
            if clip and norm > clip:
                clip_(self._parameters(), clip, mean[1].to(grad_norm))
            self._step()
        return StepResult(loss, rest[0] if rest else None, norm, skipped)

    def take(self, micro_batches: Sequence[MicroBatch], *, clip: float | None = None) -> Tensor:
        """The same step without looking at any number: for fake tensors, which have none; the loss, a scalar."""
        if self.graphs is not None:  # to which gradients are added, in memory that stays
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        total, _ = self._accumulate(micro_batches, None, reads=False)
        if clip:
            norm = total_norm([p.grad for p in self._parameters() if p.grad is not None])
            clip_(self._parameters(), clip, norm)
        self._step()
        return total

    def _on_the_host(self, numbers: Tensor) -> list[float]:
        """Their values; what the optimizer can do without them is done, or queued, before the host waits for them."""
        if not numbers.is_cuda:
            self._prepare()
            return numbers.cpu().tolist()
        here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        here.copy_(numbers, non_blocking=True)
        there = torch.cuda.current_stream(numbers.device).record_event()
        self._prepare()
        there.synchronize()
        return here.tolist()

    def _prepare(self) -> None:
        if (prepare := getattr(self.optimizer, "prepare", None)) is not None:
            prepare()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _step(self) -> None:
        self.phase("step")
        self.optimizer.step()
        self.phase("after")
        self.optimizer.zero_grad()

    def _discard(self) -> None:
        getattr(self.optimizer, "discard", self.optimizer.zero_grad)()
        release = release_handle(self.optimizer)
        if release is not None:
            release.reset()

    def _accumulate(
        self, micro_batches: Sequence[MicroBatch], tokens: float | None, *, reads: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Backward over the micro-batches; their mean losses, over the labels that count and over all, scalars."""
        if (snapshot := getattr(self.optimizer, "snapshot", None)) is not None:
            snapshot()  # backward feeds a momentum, and only the norm of all gradients says whether the step is taken
        everything = sum(batch[1].numel() for batch in micro_batches)
        tokens = everything if tokens is None else tokens
        self.model.train()
        if self.graphs is not None and reads and self.phase is no_phase:
            return self.graphs([_unpacked(batch) for batch in micro_batches], tokens), None
        irrevocable = release_handle(self.optimizer) is not None  # steps in backward
        total = torch.zeros((), dtype=torch.float32, device=micro_batches[0][0].device)
        routers: Tensor | None = None
        shared = shared_blocks(self.model) if len(micro_batches) > 1 else contextlib.nullcontext()
        with blocks_together(self.together), shared:
            for number, (inputs, labels, *position_ids) in enumerate(micro_batches, 1):
                self.phase("forward")
                loss, router = self.losses(inputs, labels, *position_ids)
                loss = loss / tokens
                whole = loss
                if router is not None:
                    router = router * (labels.numel() / everything)
                    whole = loss + router
                    routers = router.detach() + (0 if routers is None else routers)
                if reads and irrevocable and on_any_rank([not whole.isfinite()], whole.device)[0]:
                    return whole.detach(), routers
                self.phase("backward")
                if self.gradients is not None and number == len(micro_batches):
                    self.gradients.start()
                whole.backward()
                total += loss.detach()
            if self.gradients is not None:
                self.gradients.finish()
        return total, routers

    def backward_of(self, batch: Sequence[Tensor], tokens: Tensor) -> Tensor:
        """Add the gradients of a micro-batch's loss over ``tokens``, a scalar; the loss. The host waits for nothing."""
        with blocks_together(self.together):
            loss, router = self.losses(*batch)
            if router is not None:
                raise UserError("train.cuda_graphs: not with the loss of a mixture of experts' routers; leave it out")
            loss = loss / tokens
            loss.backward()
        return loss.detach()

    def losses(
        self, inputs: Tensor, labels: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Cross entropy in nats summed over the labels, and the routers' loss of a mixture of experts or None."""
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            return language_loss(self.model, self.forward, inputs, labels, position_ids, chunked=self.chunked_loss)


def _unpacked(batch: MicroBatch) -> Sequence[Tensor]:
    inputs, labels, *positions = batch
    if positions and positions[0] is not None:
        raise UserError(NOT_PACKED)
    return inputs, labels


def average_of(parameters: Iterable[Tensor], model: nn.Module, *, overlap: bool = True) -> GradientAverage:
    """What averages the gradients of ``parameters``, in ``model``, over the ranks: rotations in their layer's dtype."""
    rotations: list[tuple[Tensor, torch.dtype]] = []
    for _, layer in poet_layers(model):
        rotations += [(p, sent_dtype(p.dtype, layer.weight_dtype)) for p in layer.rotations]
    return GradientAverage(parameters, overlap=overlap, sent_in=dict(rotations), by_row=embeddings(model))


def language_loss(
    model: Any, forward: Any, inputs: Tensor, labels: Tensor, position_ids: Tensor | None = None, *, chunked: bool
) -> tuple[Tensor, Tensor | None]:
    """Cross entropy in nats summed over all labels but −100, in float32; all tensors are [sequences, tokens].

    And the routers' load-balancing loss with its weight, where the model computes one (``output_router_logits`` in
    its config), else None.

    Args:
        forward: the model, perhaps compiled; its body for ``chunked``.
        position_ids: where they begin anew, so does attention: transformers takes them for packed documents.
        chunked: through the last hidden state, so that the logits never exist as a whole; no routers' loss.
    """
    packed = {} if position_ids is None else {"position_ids": position_ids}
    with one_document(model) if position_ids is None else contextlib.nullcontext():
        if chunked:
            return as_forward(model, partial(_chunked_loss, model, forward, packed))(inputs, labels), None
        out = forward(input_ids=inputs, use_cache=False, **packed)
    loss = F.cross_entropy(out.logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    auxiliary = getattr(out, "aux_loss", None)
    return loss, None if auxiliary is None else auxiliary.to(loss.device) * router_weight(model)


def _chunked_loss(model: Any, forward: Any, packed: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
    hidden = forward(input_ids=inputs, use_cache=False, **packed).last_hidden_state
    head = model.get_output_embeddings()
    return chunked_cross_entropy(hidden, head.weight, labels, bias=head.bias, reduction="sum")


def router_weight(model: Any) -> float:
    """The factor on the routers' load-balancing loss of a mixture of experts.

    Raises:
        UserError: the model says none.
    """
    for name in _ROUTER_WEIGHTS:
        for owner in (model, getattr(model, "config", None)):
            if isinstance(weight := getattr(owner, name, None), int | float):
                return float(weight)
    raise UserError(
        f"{type(model).__name__} returns a loss of its routers but names no weight for it (router_aux_loss_coef); set "
        "output_router_logits to false in its config"
    )
