"""Keys that a section's type has and that nothing in the recipe at hand reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from poetx.recipe.places import is_prepared
from poetx.recipe.sections import default_of

_OF_TOKENS = ("data.train", "data.seq_len", "data.cache_dir")  # read where the text is tokenized already


def idle(values: Mapping[str, Any], key: str) -> str:
    """Why ``key``, which the types allow, is read by nothing in nested recipe ``values``; empty where it is read."""

    def chosen(dotted: str) -> Any:
        section, _, name = dotted.partition(".")
        part = values.get(section)
        part = part if isinstance(part, Mapping) else {}
        return part[name] if name in part else default_of(section, name)

    if is_prepared(chosen("data.train")) and key.startswith("data.") and key not in _OF_TOKENS:
        return f"with data.train={chosen('data.train')}, which poetx data has prepared"
    source = next((name for name in ("data.tokenizer", "model.pretrained") if chosen(name)), None)
    if key == "data.vocab_size" and source:
        return f"with the tokenizer of {source}"
    if key == "data.validation_fraction" and chosen("data.validation"):
        return "with data.validation"
    rotated = values.get("poet", None if values.get("lora") is not None else {}) is not None
    if key in ("train.spectrum_every", "model.recompute") and not rotated:
        return "where no layer is rotated"
    if key == "poet.residual_modules" and chosen("poet.residual_scale") == 1:
        return "without poet.residual_scale"
    if key == "optimizer.weight_decay" and rotated and chosen("poet.method") == "oft":
        return "on rotations, which are all that poet.method=oft trains"
    merges = rotated and chosen("poet.method") == "poet-x" and chosen("poet.merge_every")
    if key == "poet.merge_angle" and (not merges or merges == 1):
        return "without poet.merge_every above 1"
    ramp = ("optimizer.clip", "optimizer.clip_ramp_steps", "optimizer.clip_ramp_until")
    if key.startswith("optimizer.clip_ramp") and not (merges and all(map(chosen, ramp))):
        return f"without poet.merge_every and {', '.join(ramp)}"
    dense = chosen("optimizer.dense_optimizer")
    if dense not in (None, "adamw") and key in ("optimizer.betas", "optimizer.eps"):
        return f"with optimizer.dense_optimizer={dense} (of rotations: optimizer.poet_{key.rpartition('.')[2]})"
    return ""
