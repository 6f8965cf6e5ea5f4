"""What a recipe may differ in from the one that a run was started with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from poetx.recipe.loading import Recipe, flat, parsed

# A resumed run may differ from its checkpoint in these, and in nothing else: none of them changes a weight.
# The device is here because a checkpoint is portable; bitwise equality is only promised on one kind of device, and with
# its CUDA graphs, which other devices have not. Text may have moved: the fingerprint of its tokens is compared.
FREE_ON_RESUME = (
    "name",
    "run_dir",
    "parallel",
    "data.train",
    "data.validation",
    "data.tokenizer",
    "data.cache_dir",
    "model.offload_dir",
    "train.device",
    "train.cuda_graphs",
    "train.eval_every",
    "train.spectrum_every",
    "train.eval_windows",
    "train.sample_tokens",
    "train.report_to",
    "train.memory_every",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.max_bad_steps",
    "train.export",
)

#: What else a single step does not read: how text becomes tokens, and how steps are made repeatable.
_OF_THE_TEXT = ("data.text_field", "data.format", "data.chat_template", "data.validation_fraction", "data.end_of_text")
_READ_BY_A_STEP = {"parallel", "data.train", "data.tokenizer", "train.device", "train.cuda_graphs", "model.offload_dir"}


def idle_in_a_step(overrides: Sequence[str]) -> list[str]:
    """The keys of overrides that one step by itself, planned or timed, does not depend on."""
    idle = {*FREE_ON_RESUME, *_OF_THE_TEXT, "train.deterministic"} - _READ_BY_A_STEP
    return [key for key, _ in parsed(overrides) if key in idle]


def differing_keys(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two recipes train differently, cadence and places (:data:`FREE_ON_RESUME`) left out."""
    before, after = dict(flat(old.to_dict())), dict(flat(new.to_dict()))
    keys = [key for key in before | after if key not in FREE_ON_RESUME and before.get(key) != after.get(key)]
    return {key: (before.get(key), after.get(key)) for key in keys}


def settled_as(old: Recipe, new: Recipe) -> Recipe:
    """``new`` with what it leaves open, its dtype and whether to keep extra bits, as it was settled in ``old``."""
    settled: dict[str, Any] = {}
    if new.train.dtype == "auto":
        settled["train.dtype"] = old.train.dtype
    if getattr(new.poet, "weight_extra_bits", False) is None:
        settled["poet.weight_extra_bits"] = getattr(old.poet, "weight_extra_bits", None)
    return new.with_keys(settled) if settled else new
