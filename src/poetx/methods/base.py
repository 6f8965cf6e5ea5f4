"""A method says what it does to a model, which optimizer trains it, and whether its backward already changes something.

``poetx train``, the planner, the benchmarks and comparisons build a step by these alone:

    method = method_of(recipe)
    report = convert_model(model, recipe, device)               # method.apply_, and the recipe's memory savings
    optimizer = method.build_optimizer(model, recipe.train.steps)
    step = TrainingStep.of(recipe, model, optimizer)            # poetx.train.step
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from poetx.config import PoetConfig
from poetx.distributed.ranks import rank_count
from poetx.errors import UserError
from poetx.layers.walk import converted_layers
from poetx.merge import hook_owner
from poetx.merge import merge_handle as merge_handle
from poetx.optim.gradient_release import ReleaseHandle, release_gradients
from poetx.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from poetx.conversion_report import ConversionReport


@dataclass(frozen=True)
class Method(ABC):
    """One way to train a model, as a recipe sets it.

    A new one is a file with a subclass, a word in :data:`poetx.recipe.shorthands.METHODS` and a line in
    :func:`method_of`; keys of its own, if it has any, go into :mod:`poetx.recipe.sections`.
    """

    recipe: Recipe

    @property
    @abstractmethod
    def title(self) -> str:
        """A few words for people, such as ``POET-X fast b=256``."""

    @property
    def acts_in_backward(self) -> bool:
        """Whether backward already changes a parameter (released gradients) or a momentum (single-step layers).

        Gradient norms leave something out then; and a loss that is not finite must be seen before its backward where
        that changes parameters.
        """
        return self.recipe.optimizer.release_gradients

    @property
    def without_norm(self) -> str:
        """Which gradients are gone after backward, and so out of their norm, where :attr:`acts_in_backward`."""
        return "released gradients (optimizer.release_gradients)"

    def apply_(self, model: nn.Module) -> ConversionReport | None:
        """Change the dense ``model`` in place to what is trained, by the recipe's ``poet`` section if it has one.

        Args:
            model: may be on the meta device.

        Returns:
            What was converted, or None for a method that converts nothing.
        """
        from poetx.convert import convert_

        return None if self.recipe.poet is None else convert_(model, self.recipe.poet.config)

    def to_dense_(self, model: nn.Module) -> None:
        """Turn the trained ``model`` back into plain layers, in place: the inverse of :meth:`apply_`."""
        from poetx.convert import to_dense_

        to_dense_(model)

    @abstractmethod
    def _optimizer(self, model: nn.Module, steps: int, options: dict[str, Any]) -> Optimizer:
        """The optimizer over every trainable parameter; ``options`` for :func:`poetx.optim.build_optimizer`."""

    def build_optimizer(self, model: nn.Module, steps: int, *, foreach: bool | None = None) -> Optimizer:
        """The optimizer over every trainable parameter of the converted ``model``, merges and releases included.

        What it does beside its step, merging every so often and releasing gradients inside backward, is registered
        on it: :func:`merge_handle` and :func:`release_handle` find the handles.

        Args:
            steps: of the whole run, which schedules of the method itself are stretched over.
            foreach: of torch's AdamW; None lets torch choose by the device.
        """
        own = self.recipe.optimizer
        given = own.model_dump(include={"lr", "betas", "eps", "momentum", "state_dtype"})
        optimizer = self._optimizer(model, steps, given | {"foreach": foreach})
        if own.release_gradients:
            share, micro_batch = self.recipe.train.share(rank_count())
            passes = share // micro_batch
            release_gradients(_dense_part(optimizer), large_parameters(model), accumulation_steps=passes)
        return optimizer


def by_module(config: PoetConfig) -> str:
    """Part of a title: whether some layers have settings of their own."""
    return ", some layers otherwise" if config.overrides else ""


def method_of(recipe: Recipe) -> Method:
    """The method that ``recipe`` asks for: its ``poet`` or ``lora`` section, or else a dense baseline."""
    if recipe.lora is not None:
        from poetx.methods.lora import LoRA

        return LoRA(recipe)
    if recipe.poet is None:
        from poetx.methods.dense import Dense

        return Dense(recipe)
    if recipe.poet.config.method == "single-step":
        from poetx.methods.single_step import SingleStep

        return SingleStep(recipe)
    if recipe.poet.config.method == "oft":
        from poetx.methods.oft import OFT

        return OFT(recipe)
    from poetx.methods.poet import MergedRotations

    return MergedRotations(recipe)


def convert_model(model: nn.Module, recipe: Recipe, device: torch.device | None) -> ConversionReport | None:
    """Convert in place as the recipe's method does, then set up the memory savings that are asked for.

    Args:
        model: dense, on any device. One on the meta device is given its weights on ``device``, layer by layer.
        device: None leaves a model on the meta device there (what the planner wants).

    Returns:
        What was converted, or None where the method converts nothing.
    """
    from poetx.materialize import materialize_
    from poetx.ops.host import HostQueue
    from poetx.savings.activation_checkpointing import checkpoint_layers_, decoder_layers
    from poetx.savings.offload import offload_frozen_
    from poetx.savings.offload_activations import offload_activations_
    from poetx.targets import ZERO

    check_device(recipe, device)
    report = method_of(recipe).apply_(model)
    if device is not None and next(model.parameters()).is_meta:
        queue = HostQueue(directory=recipe.model.offload_path)
        ready = (lambda layer: layer.keep_in_host_memory_(queue, device)) if recipe.model.streams_weights else None
        materialize_(model, recipe.model.pretrained, device=device, seed=recipe.train.seed, ready=ready)
        report = report and report.with_dense(model, ZERO)
    if recipe.model.streams_weights:
        recomputed = decoder_layers(model) if recipe.model.gradient_checkpointing else []
        weights = (sum(1 for _ in converted_layers(layer)) for layer in recomputed)
        place = None if device is None else recipe.model.offload_path
        offload_frozen_(model, device or "meta", keep=max(weights, default=0), directory=place)
    if recipe.model.gradient_checkpointing:
        # In a graph nobody could ask for the generator's state; see GraphedPasses, which looks whether anything draws.
        preserve = not recipe.train.cuda_graphs
        checkpoint_layers_(model, recompute=recipe.model.recompute, preserve_rng_state=preserve)
    if recipe.model.offloads_activations:
        offload_activations_(model)
    return report


def check_device(recipe: Recipe, device: torch.device | None) -> None:
    """Raise :class:`UserError` where the recipe has settings that its device has no use for."""
    if recipe.train.cuda_graphs and device is not None and device.type != "cuda":
        raise UserError(f"train.cuda_graphs: the device is {device.type}, which has none; leave it out")
    if recipe.train.cuda_graphs and device is not None and rank_count() > 1:
        raise UserError("train.cuda_graphs: not with several processes; leave it out")
    if recipe.model.offload and device is not None and device.type == "cpu":
        raise UserError(f"model.offload={recipe.model.offload}: the device is the CPU; leave it out")


def large_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters whose gradients ``optimizer.release_gradients`` means.

    In a model with rotated layers embeddings and output head, the only large gradients there; in any other model every
    trainable matrix.
    """
    if next(converted_layers(model), None) is None:
        return [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    return list({id(p): p for p in end_weights(model) if p.requires_grad}.values())


def end_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the input embedding and of the output head, where the model has them; a tied one twice."""
    ends: Any = (getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings"))
    return [end.weight for end in ends if end is not None]


def release_handle(optimizer: Optimizer) -> ReleaseHandle | None:
    """What :func:`poetx.optim.release_gradients` registered on ``optimizer``, or None."""
    return hook_owner(_dense_part(optimizer), ReleaseHandle)


def _dense_part(optimizer: Optimizer) -> Optimizer:
    """The optimizer of what POETX does not rotate, or the optimizer itself."""
    return getattr(optimizer, "dense_optimizer", None) or optimizer
