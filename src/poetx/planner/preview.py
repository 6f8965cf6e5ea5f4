"""What ``poetx train`` would do with a recipe: read and planned, with nothing written and no memory taken."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import torch

from poetx.data.prepare import FoundData, find_data
from poetx.data.tokens import DataMeta, window_count
from poetx.errors import UserError
from poetx.methods.base import check_device, convert_model
from poetx.models import model_config, resolve_device, settled
from poetx.planner.estimate import estimate_memory, meta_model, vocabulary
from poetx.planner.link import measure_products
from poetx.recipe import Recipe
from poetx.train.run import check_free


def preview(recipe: Recipe, *, ranks: int = 1, overwrite: bool = False) -> Iterator[tuple[str, str]]:
    """Names and values of what would be trained: model, method, layers, text, tokens, memory, time, and where it is.

    Args:
        ranks: processes that share each batch; memory is that of one of them.
        overwrite: an earlier run in the same place is deleted.

    Raises:
        UserError: what the run itself would be refused for before its first step, but for what only tokens tell.
    """
    recipe.train.share(ranks)
    device = resolve_device(recipe.train.device)
    check_device(recipe, device)
    if not overwrite:
        check_free(recipe.directory)
    data = find_data(recipe)
    recipe = settled(recipe, device)
    estimate = estimate_memory(recipe, device="cuda" if device.type == "cuda" else "cpu", ranks=ranks)
    yield "recipe", f"{recipe.name}, {recipe.train.dtype} on {device}" + (f", {ranks} processes" if ranks > 1 else "")
    trains = f"{estimate.trainable / 1e6:.2f}M of {estimate.parameters / 1e6:.2f}M parameters train"
    layers = _layers(recipe)
    yield "method", estimate.method if layers else f"{estimate.method}; {trains}"
    if layers:
        yield "layers", layers
    yield "text", _text(data)
    yield "tokens", _tokens(recipe, data.meta)
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in estimate.categories.items() if size)
    yield "memory", f"{estimate.gib:.2f} GiB planned at the peak of a step, in {estimate.phase} ({parts})"
    yield "time", _time(recipe, device, ranks)
    yield "run", f"{recipe.directory}{' (an earlier run there would be deleted)' if _taken(recipe) else ''}"


def _time(recipe: Recipe, device: torch.device, ranks: int) -> str:
    """At least: forward, backward to the input, what is computed again, and the gradients of weights that train."""
    config = model_config(recipe, vocab_size=vocabulary(recipe), end_of_text_id=0)
    linear = [module for module in meta_model(config, recipe).modules() if isinstance(module, torch.nn.Linear)]
    dense = recipe.poet is None and recipe.lora is None
    operations = 4 + 2 * recipe.model.gradient_checkpointing + 2 * dense
    tokens = recipe.train.steps * recipe.train.batch_size * recipe.data.seq_len
    flops = measure_products(device)
    seconds = operations * sum(module.weight.numel() for module in linear) * tokens / flops / ranks
    least = str(timedelta(seconds=round(seconds)))
    return f"at least {least}, by large products alone at the {flops / 1e12:.3g} TFLOP/s measured here"


def _layers(recipe: Recipe) -> str:
    """What is converted; empty of a method that converts nothing."""
    config = model_config(recipe, vocab_size=vocabulary(recipe), end_of_text_id=0)
    report = convert_model(meta_model(config, recipe), recipe, None)
    return "" if report is None else str(report)


def _taken(recipe: Recipe) -> bool:
    try:
        check_free(recipe.directory)
    except UserError:
        return True
    return False


def _text(data: FoundData) -> str:
    size = sum(file.stat().st_size for file in data.files) / 1e6
    text = f"{data.source}: {len(data.files)} files, {size:,.1f} MB" if data.files else data.source
    if data.meta is None:
        return f"{text}; not tokenized yet"
    held_out = f"{data.meta.validation_tokens:,} held out ({data.directory})"
    return f"{text}; {data.meta.train_tokens:,} tokens to train on, {held_out}"


def _tokens(recipe: Recipe, meta: DataMeta | None) -> str:
    steps, batch, length = recipe.train.steps, recipe.train.batch_size, recipe.data.seq_len
    text = f"{steps * batch * length:,}: {steps:,} steps of {batch} x {length}"
    if meta is None or not (windows := window_count(meta.train_tokens, length)):
        return text
    return f"{text}, {steps * batch / windows:,.2f} times all of the text"
