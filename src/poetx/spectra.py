"""What POET promises: singular values that do not move. Measured here, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from poetx.errors import UserError
from poetx.layers.walk import converted_layers


@dataclass(frozen=True)
class LayerSpectrum:
    """Spectrum of one layer's dense weight, float64 on the CPU.

    Attributes:
        singular_values: [min(m, n)], descending.
        norm: Frobenius norm ‖W‖.
        entropy: SVD entropy ``−Σ pᵢ log pᵢ / log r`` with p = σ²/Σσ², 1 for a flat spectrum, 0 for a zero weight.
        norm_ratio: ‖W‖ over the reference's, or None without a reference.
        drift_median, drift_max: of ``|σ − σ_ref| / σ_ref``, or None without a reference.
    """

    singular_values: Tensor
    norm: float
    entropy: float
    norm_ratio: float | None = None
    drift_median: float | None = None
    drift_max: float | None = None


@torch.no_grad()
def spectrum(model: nn.Module, reference: Mapping[str, LayerSpectrum] | None = None) -> dict[str, LayerSpectrum]:
    """Spectrum of every rotated layer by name, and its drift against an earlier call's result.

    Takes the weight that forward acts with, rotations included, in float64: minutes for a large model, on its
    device one layer at a time.

    Raises:
        UserError: no rotated layer, or a reference of other layers.
    """
    result: dict[str, LayerSpectrum] = {}
    for name, layer in converted_layers(model):
        values = torch.linalg.svdvals(layer.dense_weight().double()).cpu()
        share = values.square() / (values.square().sum() or 1.0)
        entropy = -torch.special.xlogy(share, share).sum() / torch.log(torch.tensor(max(2.0, values.numel())))
        norm = float(values.norm())
        drift: dict[str, float] = {}
        if reference is not None:
            if name not in reference or reference[name].singular_values.shape != values.shape:
                raise UserError(f"{name}: the reference spectrum has no such layer of this size")
            start = reference[name]
            # 0/0 is no change; a value that was zero and is not any more has changed without bound.
            change = ((values - start.singular_values).abs() / start.singular_values).nan_to_num(0.0, posinf=math.inf)
            drift = {
                "norm_ratio": norm / start.norm if start.norm else (math.inf if norm else 1.0),
                "drift_median": float(change.median()),
                "drift_max": float(change.max()),
            }
        result[name] = LayerSpectrum(values, norm, float(entropy), **drift)
    if not result:
        raise UserError("the model has no converted layer; call poetx.convert_ first")
    return result
