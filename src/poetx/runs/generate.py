"""Text from a loaded model."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from poetx.errors import UserError
from poetx.runs.load import LoadedModel

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

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

    from poetx.train.samples import continued

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
        given, wanted = inputs.shape[1], max_new_tokens
        inputs = inputs[:, -max(1, positions - wanted, positions * 3 // 4) :]
        max_new_tokens = max(1, min(wanted, positions - inputs.shape[1]))
        if inputs.shape[1] < given or max_new_tokens < wanted:
            seen = f"the last {inputs.shape[1]} of the prompt's {given} tokens are seen"
            logger.warning("the model has %d positions: %s, and at most %d written", positions, seen, max_new_tokens)
    inputs = inputs.to(device=loaded.device, dtype=torch.long)
    output = continued(
        loaded.model,
        inputs,
        max_new_tokens=max_new_tokens,
        end_of_text=loaded.tokenizer.eos_token_id,
        temperature=temperature if temperature > _LOWEST_TEMPERATURE else 0,
        top_k=top_k,
        seed=seed,
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
