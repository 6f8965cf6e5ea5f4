"""Whether a model keeps documents apart that lie side by side in a window."""

from __future__ import annotations

from typing import Any

import torch

from poetx.errors import UserError

_SAME = 1e-4  # of the largest logit; what experts that take other tokens' company into account differ by


@torch.no_grad()
def check_packing(model: Any) -> None:
    """See in a forward pass that a document does not change when the one before it does.

    Raises:
        UserError: the model has no ``position_ids``, or attention, a convolution or a state reaches over the beginning.
    """
    remedy = "use data.pack=false, which lays documents one after the other"
    device, rows = model.device, model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(8, device=device).view(2, 4) % rows
    ids[:, 2:] = ids[:1, 2:]
    positions = torch.tensor([[0, 1, 0, 1]], device=device)
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        one, other = (
            model(input_ids=row[None], position_ids=positions, use_cache=False).logits[0, 2:].float() for row in ids
        )
    except TypeError as error:
        raise UserError(f"data.pack: {type(model).__name__} takes no positions ({error}); {remedy}") from None
    finally:
        for module in training:
            module.training = True
    if (one - other).abs().max() > _SAME * one.abs().max():
        raise UserError(
            f"data.pack: in {type(model).__name__} a document sees the one before it in the same window "
            f"(attn_implementation={getattr(model.config, '_attn_implementation', None)}); {remedy}"
        )
