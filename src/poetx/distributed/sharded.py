"""Parameters that are sharded over ranks, which rotations, merges and our optimizers do not support yet."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import Tensor

from poetx.errors import UserError


def refuse_sharded(params: Iterable[Tensor], who: str) -> None:
    """Say at once what would end in an error of torch at the first merge.

    Raises:
        UserError: one of ``params`` is a DTensor.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor import DTensor

    for parameter in params:
        if isinstance(parameter, DTensor):
            raise UserError(
                f"{who}: a parameter of shape {tuple(parameter.shape)} is a DTensor (of fully_shard or tensor "
                "parallelism), which is not supported yet; use DistributedDataParallel"
            )
