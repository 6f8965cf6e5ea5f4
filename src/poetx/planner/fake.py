"""Models without memory, and what their fake CPU steps are told so that they do what CUDA does."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

logger = logging.getLogger(__name__)

#: The name under which ``transformers`` finds :func:`_attention` and :func:`_mask`.
_FUSED = "poetx_fused"


@contextlib.contextmanager
def fake_ranks(count: int, rank: int = 0) -> Iterator[None]:
    """Be the first, or another, of so many ranks, whose collectives send nothing; of one: no group at all."""
    if count == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy of ``model`` whose parameters and buffers are on the meta device, tied ones tied."""
    memo: dict[int, Any] = {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    return copy.deepcopy(model, memo)


def fake_(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace meta tensors by fake CPU tensors of the same shape, tied ones by one."""
    memo: dict[int, Any] = {}
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in memo:
                        # not empty_like: fake tensors refuse to look at what some versions take for a subclass
                        size, stride = parameter.size(), parameter.stride()
                        fresh = torch.empty_strided(size, stride, dtype=parameter.dtype, device="cpu")
                        memo[id(parameter)] = nn.Parameter(fresh, requires_grad=parameter.requires_grad)
                    module._parameters[name] = memo[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    if id(buffer) not in memo:
                        memo[id(buffer)] = torch.empty_like(buffer, device="cpu")
                    module._buffers[name] = memo[id(buffer)]


class NumbersAreOne(TorchDispatchMode):
    """A number that an optimizer reads from a fake tensor is 1 (Adafactor reads norms); a model may read none.

    Nor is any row of a gradient zero.
    """

    phase = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and self.phase != "forward":
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if func is torch.ops.aten.nonzero.default and self.phase != "forward":
            return torch.arange(args[0].numel()).view(-1, 1)
        return func(*args, **(kwargs or {}))


def fuse_attention_(model: Any) -> None:
    """Make a ``transformers`` model take the fused kernel, whatever the device would choose, and no mask without need.

    A model that has eager attention only keeps it; one warning says so.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "_attn_implementation", None)
    if kind == "eager":
        _say_eager(str(getattr(config, "model_type", type(model).__name__)))
    if kind != "sdpa":
        return
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_FUSED, _attention)
    AttentionMaskInterface.register(_FUSED, _mask)
    model.set_attn_implementation(_FUSED)


@functools.cache
def _say_eager(model_type: str) -> None:
    logger.warning(
        "%s: transformers has no fused attention for it; estimated with attn_implementation='eager', whose scores are "
        "tokens × tokens",
        model_type,
    )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Flash attention of heads [batch, heads, tokens, width]: no tokens × tokens matrix, key-value heads as they are.

    With a mask CUDA takes the memory-efficient kernel, and so does ``transformers``' own function here.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is not None or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout, query.shape[2] > 1, scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


def _mask(*args: Any, **settings: Any) -> Tensor | None:
    """``transformers``' mask for fused attention, which is none for plain causal attention.

    From fake position ids it cannot read that no sequences are packed, and would build tokens × tokens.
    """
    from transformers.masking_utils import sdpa_mask

    if not settings.get("use_vmap") and "allow_is_bidirectional_skip" not in settings:
        settings["allow_is_causal_skip"] = True
    return sdpa_mask(*args, **settings)


def flash_backward_buffers(operator: Any, args: tuple) -> int:
    """Bytes that flash attention's backward on CUDA allocates inside: a float32 dq, row sums, expanded dk and dv."""
    if operator is not torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return 0
    _, q, k = args[:3]
    batch, heads, tokens, width = q.shape
    expanded = 2 * batch * heads * tokens * width * q.element_size() if k.shape[1] != heads else 0
    return 4 * batch * heads * tokens * (width + 1) + expanded
