"""Text from a loaded model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from poetx.errors import UserError
from poetx.runs.load import LoadedModel

if TYPE_CHECKING:
    import torch

_LOWEST_TEMPERATURE = 1e-6  # the likeliest token, but for ties; a logit of 30 divided by 1e-37 is infinite in float32


def generate_text(
    loaded: LoadedModel,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """The continuation of ``prompt``, without it. ``temperature`` 0, or below what float32
    divides by, takes the likeliest token each time.

    Raises:
        UserError: the prompt is not Unicode, or the model's output is not finite.
    """
    import torch
    from transformers import LogitsProcessorList

    from poetx.ops.random import seeded

    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature={temperature}: must be a number from 0 on")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError(f"--prompt={prompt!a}: not valid Unicode text; give it as UTF-8")

    inputs = loaded.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    if inputs.numel() == 0:
        inputs = torch.tensor([[loaded.end_of_text_id]])
    loaded.check_ids(int(inputs.max()))
    positions = getattr(loaded.model.config, "max_position_embeddings", None)
    if positions is not None:  # the end of the prompt, and no more new tokens than there is room for
        inputs = inputs[:, -max(1, positions - max_new_tokens) :]
        max_new_tokens = max(1, min(max_new_tokens, positions - inputs.shape[1]))
    inputs = inputs.to(device=loaded.device, dtype=torch.long)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > _LOWEST_TEMPERATURE:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": 1.0}
    with seeded(seed, loaded.device), torch.no_grad():
        output = cast(Any, loaded.model).generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            pad_token_id=loaded.tokenizer.eos_token_id,
            use_cache=True,
            logits_processor=LogitsProcessorList([cast(Any, _check_finite)]),
            **sampling,
        )
    return _after(loaded.tokenizer, output[0], inputs.shape[1])


def _after(tokenizer: Any, tokens: torch.Tensor, start: int) -> str:
    """The text of the tokens from ``start`` on, after what is before: decoders like SentencePiece's drop the space that
    begins a text.
    """
    before, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (tokens[:start], tokens))
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(tokens[start:], skip_special_tokens=True)


def _check_finite(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Between a model and its sampling, which would end in an assertion on the device."""
    if not (logits < float("inf")).all():  # -inf, as a mask leaves it, is a probability of 0
        raise UserError(
            "the model's output is not finite, so there is nothing to generate; it has diverged in training"
        )
    return logits
