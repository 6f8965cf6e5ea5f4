"""Linear layers that another library has quantized: read without importing it, or named with the reason."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_foreign(module: nn.Module) -> bool:
    """Whether this is a linear layer of bitsandbytes, or an ``nn.Linear`` that torchao has quantized."""
    return _bitsandbytes(module) or (type(module) is nn.Linear and _module_of(type(module.weight)) == "torchao")


def _module_of(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _bitsandbytes(module: nn.Module) -> bool:
    kinds = [kind for kind in type(module).__mro__ if _module_of(kind) == "bitsandbytes"]
    return isinstance(module, nn.Linear) and any(kind.__name__ in ("Linear4bit", "Linear8bitLt") for kind in kinds)


def dense_weight(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight [out_features, in_features] that such a layer multiplies by.

    In the dtype that its library recorded before quantizing; ``dtype`` where none was (8-bit layers of bitsandbytes).

    Raises:
        ValueError: the library cannot undo its format, with its words.
    """
    weight: Any = module.weight
    if _module_of(type(module.weight)) == "torchao":
        try:
            return weight.dequantize()
        except (NotImplementedError, RuntimeError, AttributeError) as error:
            first = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise ValueError(f"torchao does not dequantize {type(weight).__name__} here ({first[0][:120]})") from None
    if weight.is_floating_point():  # bitsandbytes quantizes when the layer is moved to a device
        return weight.detach()
    if weight.dtype == torch.int8:
        # The first forward moves the row scales from the parameter to the layer.
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else getattr(module.state, "SCB", None)
        if scales is None:
            raise ValueError("an 8-bit layer of bitsandbytes without its scales; move the model to its device first")
        return (weight.detach().float() * (scales.float() / 127)[:, None]).to(dtype)
    if getattr(weight, "quant_state", None) is None:
        raise ValueError("a 4-bit layer of bitsandbytes without its quant_state; move the model to its device first")
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

    return dequantize_4bit(weight.data, weight.quant_state)


def drop_quantizers_(model: nn.Module) -> None:
    """Take the quantizer off ``transformers`` models none of whose layers is quantized any more.

    With one, a model is saved by the quantizer, and its config says that what is loaded must be quantized.
    """
    for module in model.modules():
        quantizer: Any = vars(module).get("hf_quantizer")
        if quantizer is not None and not any(is_foreign(m) or foreign_buffers(m) for m in module.modules()):
            quantizer.remove_quantization_config(module)


def foreign_buffers(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Integer weights of formats that are not read at all (GPTQ, AWQ, …), by buffer name and shape."""
    return [
        (name, tuple(buffer.shape))
        for name, buffer in module.named_buffers(recurse=False)
        if "weight" in name and buffer.ndim >= 2 and buffer.dtype in (torch.int8, torch.uint8, torch.int32)
    ]
