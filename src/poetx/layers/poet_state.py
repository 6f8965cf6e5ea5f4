"""What a ``PoetLinear`` takes of a saved state, and what it refuses before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from poetx.errors import UserError
from poetx.ops.block_diagonal import is_permutation
from poetx.ops.reference import EXACT

if TYPE_CHECKING:
    from poetx.layers.poet import PoetLinear

#: Neumann orders as a config has them, and as operators take them.
ORDERS = {3: 3, 7: 7, "exact": EXACT}
_FEW = 8  # features; of fewer the identity is drawn now and then


def settings_of(layer: PoetLinear) -> Tensor:
    """``layer.trained_with``, by its config."""
    return torch.tensor([layer.order, layer.config.seed % (1 << 63)], device="cpu")


def check_state(layer: PoetLinear, state_dict: dict[str, Any], prefix: str) -> None:
    """Refuse a state of other settings; ``trained_with`` is added to an older one without it, which is taken to fit.

    Raises:
        UserError: another weight format, order, seed or kind of permutation; a part of a layer's tensors; damage.
    """
    _check_format(layer, state_dict, prefix)
    _check_complete(layer, state_dict, prefix)
    own, key = settings_of(layer), f"{prefix}trained_with"
    saved = state_dict.setdefault(key, own.to(state_dict.get(f"{prefix}perm_in", own).device))
    if not saved.is_meta and saved.tolist() != own.tolist():
        names = {order: name for name, order in ORDERS.items()}
        pairs = (
            ("neumann_order", *(names.get(order, order) for order in (int(saved[0]), int(own[0])))),
            ("seed", int(saved[1]), int(own[1])),
        )
        setting, theirs, ours = next(pair for pair in pairs if pair[1] != pair[2])
        raise UserError(
            f"{layer.label}: the state was trained with {setting}={theirs!r}, the layer has {ours!r}; convert the "
            f"model with {setting}={theirs!r} to load it"
        )
    for side in ("perm_in", "perm_out"):
        perm = state_dict.get(f"{prefix}{side}")
        if perm is not None and perm.shape == getattr(layer, side).shape:
            _check_permutation(layer, side, perm)


def _check_permutation(layer: PoetLinear, side: str, perm: Tensor) -> None:
    if not is_permutation(perm):
        raise UserError(
            f"{layer.label}: {side} in the state is no permutation (indices twice or out of range); its file is "
            "damaged: load another one"
        )
    if perm.is_meta or layer.one_sided or len(perm) <= _FEW:
        return
    saved_in_place, here_in_place = torch.equal(perm, torch.arange(len(perm)).to(perm)), not layer.is_permuted
    if saved_in_place != here_in_place:
        saved_as = "contiguous" if saved_in_place else "random"
        raise UserError(
            f"{layer.label}: the state is of permutation={saved_as!r}, the layer of {layer.config.permutation!r}; "
            f"convert the model with permutation={saved_as!r} to load it"
        )


def _check_complete(layer: PoetLinear, state_dict: dict[str, Any], prefix: str) -> None:
    """Refuse a part of what makes the weight, which ``strict=False`` would mix with what is here."""
    weight = "packed_weight.codes" if layer.base_weight is None else "base_weight"
    names = (weight, "skew_in", "skew_out", "perm_in", "perm_out")
    there = [name for name in names if f"{prefix}{name}" in state_dict]
    if there and len(there) < len(names) and not layer.one_sided:
        missing = next(name for name in names if name not in there)
        raise UserError(
            f"{layer.label}: the state has its {there[0]}, but not its {missing}: the tensors of a layer belong "
            "together, buffers too; save and load model.state_dict(), or the plain model (poetx.save_pretrained)"
        )


def _check_format(layer: PoetLinear, state_dict: dict[str, Any], prefix: str) -> None:
    """Refuse permutations and rotations whose weight ``strict=False`` would leave out: they are of no other."""
    if f"{prefix}{'packed_weight.codes' if layer.packed_weight is None else 'base_weight'}" not in state_dict:
        return
    name = state_dict.get(f"{prefix}packed_weight.weight_format")
    theirs = None if name is None or name.is_meta else bytes(name.tolist()).decode()
    raise UserError(
        f"{layer.label}: the state is of weight_format={theirs!r}, the layer of {layer.config.weight_format!r}; "
        f"convert the model with weight_format={theirs!r} to load it"
    )
