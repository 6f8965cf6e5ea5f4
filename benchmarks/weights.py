"""What training did to the matrices of a model: how large they are, and on how many directions their energy lies."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def weight_statistics(model: Any) -> dict[str, float]:
    """Means over the matrices inside the blocks.

    ``rms``: of the elements. ``effective_rank``: exp of the entropy of σ² / Σσ² over min(m, n), 1 for a flat spectrum,
    0.6 for a square Gaussian matrix.
    """
    rms, ranks = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or name == "lm_head" or getattr(module, "in_features", None) is None:
            continue
        values = torch.linalg.svdvals(module.weight.float())
        share = values.square() / values.square().sum()
        rms.append(module.weight.float().square().mean().sqrt())
        ranks.append(torch.exp(-torch.special.xlogy(share, share).sum()) / values.numel())
    return {"rms": float(torch.stack(rms).mean()), "effective_rank": float(torch.stack(ranks).mean())}
