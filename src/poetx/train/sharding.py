"""``parallel: fsdp``: FSDP2's ``fully_shard`` on every decoder layer and on the model."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from poetx.distributed.gradients import ReduceScatterByRow, embeddings
from poetx.distributed.ranks import sent_dtype
from poetx.distributed.sharded import is_sharded
from poetx.errors import UserError
from poetx.layers.walk import poet_layers, rotation_ids
from poetx.recipe import Recipe
from poetx.recipe.loading import flat
from poetx.savings.activation_checkpointing import decoder_layers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: What a sharded model is not trained with.
#: Keys that a sharded model is not trained with, and their values that switch them off.
_UNFIT = {
    "model.offload": "null",
    "optimizer.release_gradients": "false",
    "poet.merge_angle": "null",
    "train.compile": "false",
    "train.cuda_graphs": "false",
    "train.spectrum_every": "null",
    "train.memory_every": "null",
    "train.sample_tokens": "0",
}


def check_shardable(recipe: Recipe) -> None:
    """Refuse keys of the recipe that a sharded model is not trained with.

    Raises:
        UserError: one of them is set.
    """
    keys = dict(flat(recipe.to_dict()))
    for key, off in _UNFIT.items():
        if keys.get(key):
            raise UserError(f"{key}={keys[key]}: not with parallel=fsdp; give {key}={off}, or use parallel=ddp")
    if recipe.optimizer.name not in ("adamw", "sgd"):
        raise UserError(f"optimizer.name={recipe.optimizer.name}: not with parallel=fsdp; use adamw, or parallel=ddp")


def all_ranks(device: torch.device) -> DeviceMesh:
    """The mesh of all ranks, on ``device``."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (torch.distributed.get_world_size(),))


def shard_model_(model: nn.Module, device: torch.device, mesh: DeviceMesh) -> None:
    """Move ``model`` to ``device`` layer by layer, and keep there this rank's rows of each parameter.

    FSDP2 averages the gradients of a layer in one call, so of one dtype: where rotations are float32 in a bfloat16
    layer, its norms and biases, which are small, stay whole; gradients of rotations go in the layer's dtype, as they do
    where nothing is sharded. An embedding is a part of its own, whose gradient is sent by rows; it is gathered once for
    forward and backward, as what is outside of layers.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    layers = decoder_layers(model)
    inside = {module for layer in layers for module in layer.modules()}
    outside = [layer for _, layer in poet_layers(model) if layer not in inside]
    by_row = embeddings(model)
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight in by_row and m not in inside]
    held = Counter(table.weight for table in tables)
    tables = [table for table in tables if held[table.weight] == 1 and table.weight.requires_grad]
    for part in (*layers, *outside, *tables, model):
        own = rotation_ids(part)
        trained = [p for p in part.parameters() if p.requires_grad and not is_sharded(p)]
        trained.sort(key=lambda p: id(p) not in own)  # of the rotations' dtype, where there are any
        whole = {p for p in trained if p.dtype != trained[0].dtype}
        for parameter in whole:
            parameter.data = parameter.data.to(device)
        rotations = [(p, layer) for _, layer in poet_layers(part) for p in layer.rotations if not is_sharded(p)]
        sent = {sent_dtype(p.dtype, layer.weight_dtype) for p, layer in rotations}
        policy = MixedPrecisionPolicy(reduce_dtype=sent.pop() if len(sent) == 1 else None)
        kept = False if part in tables else None  # until backward, as what the model itself has
        fully_shard(part, mesh=mesh, ignored_params=whole, mp_policy=policy, reshard_after_forward=kept)
    for table in tables:
        sharded: Any = table  # fully_shard has given it another class
        sharded.set_custom_reduce_scatter(ReduceScatterByRow(table.embedding_dim))
