"""``parallel: fsdp``: FSDP2's ``fully_shard`` on every decoder layer and on the model."""

from __future__ import annotations

import torch
from torch import nn

from poetx.errors import UserError
from poetx.recipe import Recipe
from poetx.recipe.loading import flat
from poetx.savings.activation_checkpointing import decoder_layers

#: What a sharded model is not trained with.
_UNFIT = (
    "model.offload",
    "optimizer.release_gradients",
    "train.compile",
    "train.spectrum_every",
    "train.memory_every",
    "train.sample_tokens",
)


def check_shardable(recipe: Recipe) -> None:
    """Refuse keys of the recipe that a sharded model is not trained with.

    Raises:
        UserError: one of them is set.
    """
    keys = dict(flat(recipe.to_dict()))
    for key in _UNFIT:
        if keys.get(key):
            raise UserError(f"{key}={keys[key]}: not with parallel=fsdp; leave it out, or use parallel=ddp")


def shard_model_(model: nn.Module, device: torch.device) -> None:
    """Move ``model`` to ``device`` layer by layer, and keep there this rank's rows of each parameter.

    Raises:
        UserError: float32 rotations beside bfloat16 norms, say, which FSDP2 does not train in one call.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad})
    if len(dtypes) > 1:
        raise UserError(
            f"parallel=fsdp: {' and '.join(dtypes)} train together, which FSDP2 does not; set train.dtype=float32 "
            "(and train.autocast=true to compute in bfloat16), or use parallel=ddp"
        )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
