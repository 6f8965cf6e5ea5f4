"""``FlopCounterMode`` sees the multiply-adds inside the project's operators."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from poetx import POETX, PoetConfig, convert_

TOKENS, IN, OUT, BLOCK = 24, 48, 96, 16
BIG = 2 * TOKENS * IN * OUT
BLOCKS = 2 * TOKENS * BLOCK * (IN + OUT)


def _converted(**settings: Any) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(IN, OUT))
    convert_(model, PoetConfig(**settings))
    return model


def _counts(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}


def test_products_of_the_papers_form() -> None:
    model = _converted(block_size=BLOCK)
    counts = _counts(model, torch.randn(TOKENS, IN, requires_grad=True))
    assert counts["poetx.linear_fast"] == BIG + BLOCKS
    assert counts["poetx.linear_fast_backward"] == BIG + 2 * BLOCKS
    assert counts["poetx.cayley"] > 0
    assert counts["poetx.cayley_backward"] > 0


@pytest.mark.parametrize("weight_format", [None, "int8"])
def test_what_is_computed_again_counts_again(weight_format: str | None) -> None:
    x = torch.randn(TOKENS, IN, requires_grad=True)
    fast = sum(_counts(_converted(block_size=BLOCK), x).values())
    mem = _counts(_converted(block_size=BLOCK, mode="mem", weight_format=weight_format), x)
    # The product with the weight and the input's side once more, and the blocks themselves.
    again = BIG + 2 * TOKENS * BLOCK * IN
    assert len(mem) == 2
    assert again < sum(mem.values()) - fast < 2 * again


def test_single_step_has_no_weight_gradient() -> None:
    model = _converted(method="single-step", block_size=8)
    optimizer = POETX(model)
    counts = _counts(model, torch.randn(TOKENS, IN, requires_grad=True))
    assert optimizer.state
    bias = 2 * OUT * 8  # taken out of y again
    assert counts == {"aten.addmm": BIG, "poetx.single_step_backward": BIG + BLOCKS // 2 + bias}


def test_counting_leaves_results_alone() -> None:
    torch.manual_seed(0)
    model = _converted(method="single-step", block_size=8)
    optimizer, x = POETX(model, momentum_dtype="float32"), torch.randn(TOKENS, IN, requires_grad=True)
    model(x).sum().backward()
    once = optimizer.state[model[0].weight]["momentum_in"].clone()
    _counts(model, x)
    torch.testing.assert_close(optimizer.state[model[0].weight]["momentum_in"], 2 * once)


def test_on_the_meta_device() -> None:
    model = _converted(block_size=BLOCK).to("meta")
    counts = _counts(model, torch.randn(TOKENS, IN, device="meta", requires_grad=True))
    assert counts["poetx.linear_fast"] == BIG + BLOCKS
