"""What a model writes: tokens after tokens, and samples at every evaluation of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from poetx.data.tokenizer import load_tokenizer
from poetx.errors import UserError, one_line
from poetx.layers.shared_blocks import shared_blocks
from poetx.ops.random import seeded
from poetx.train.export import TOKENIZER_DIR

if TYPE_CHECKING:
    from poetx.train.loop import TrainingRun

PROMPTS = 2
_TEMPERATURE, _TOP_K = 0.8, 50


def continued(
    model: Any,
    inputs: torch.Tensor,
    *,
    max_new_tokens: int,
    end_of_text: int,
    temperature: float,
    top_k: int,
    seed: int,
) -> torch.Tensor:
    """``inputs`` [1, tokens] with at most so many new tokens behind them; temperature 0: the likeliest each time.

    Raises:
        UserError: the model's output is not finite.
    """
    from transformers import LogitsProcessorList

    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": 1.0}
    with seeded(seed, inputs.device), torch.no_grad(), shared_blocks(model):
        return model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            pad_token_id=end_of_text,
            use_cache=True,
            logits_processor=LogitsProcessorList([cast(Any, _check_finite)]),
            **sampling,
        )


def _check_finite(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Between a model and its sampling, which would end in an assertion on the device."""
    if not (logits < float("inf")).all():  # -inf, as a mask leaves it, is a probability of 0
        raise UserError(
            "the model's output is not finite, so there is nothing to generate; it has diverged in training"
        )
    return logits


def samples(run: TrainingRun) -> list[dict[str, str]]:
    """What the model in training writes after prompts of the validation text: prompt, text, and the text's own answer.

    All ranks of a process group take part, for a model may be spread over them. None where the model cannot write: a
    note says so once.
    """
    settings = run.recipe.train
    if not settings.sample_tokens or run.mute:
        return []
    tokenizer, model = load_tokenizer(run.run_dir / TOKENIZER_DIR), run.model
    was_training, found = model.training, []
    model.eval()
    try:
        for number, (prompt, answer) in enumerate(run.data.validation.prompts(PROMPTS)):
            written = continued(
                model,
                torch.tensor([prompt], device=run.device),
                max_new_tokens=settings.sample_tokens,
                end_of_text=run.data.meta.end_of_text_id,
                temperature=_TEMPERATURE,
                top_k=_TOP_K,
                seed=settings.seed + number,
            )[0, len(prompt) :]
            found.append({"prompt": tokenizer.decode(prompt), "text": tokenizer.decode(written.tolist())})
            if answer:
                found[-1]["answer"] = tokenizer.decode(answer)
    except Exception as error:  # a model may generate otherwise, or not at all: that is no failure of the run
        run.mute = True
        run.reporter.note(f"no samples: {one_line(error)[:160]}")
    finally:
        model.train(was_training)
    return found
