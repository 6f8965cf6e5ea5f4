"""Bytes of a layer's kernels as the roofline has them, beside those that are counted."""

from __future__ import annotations

import pytest
from benchmarks.launches import of_a_layer
from benchmarks.roofline import DEVICES, Layer, seconds, totals

from poetx.bench.step import by_method
from poetx.recipe import load_recipe

pytest.importorskip("triton", reason="what is counted are its launches")
TINY = ["model.hidden_size=64", "model.intermediate_size=96", "model.num_heads=2", "data.vocab_size=300"]
TINY += ["poet.block_size=16", "train.dtype=bfloat16"]


FORMS = [(method, near, order) for method in ("fast", "mem") for near in (False, True) for order in (3, 7)]


@pytest.mark.parametrize("tokens", [48, 512])
@pytest.mark.parametrize(("method", "near", "order"), [*FORMS, ("single-step-free", False, None)])
def test_bytes_and_launches_are_those_counted(method: str, near: bool, order: int | None, tokens: int) -> None:
    keys = [*TINY, *([f"poet.neumann_order={order}"] if order else [])]
    keys += ["poet.permutation=contiguous"] if near else []
    for shape, (kernels, moved) in of_a_layer(by_method(load_recipe("demo", keys, text=False), method), tokens).items():
        m, n = map(int, shape.split("x"))
        layer = Layer(m, n, tokens, 16, gathered=not near, order=order or 3, momentum=4)
        launches, expected = totals(method, layer)
        assert launches == kernels
        for name, size in moved.items():
            assert expected[name] == pytest.approx(size, rel=0.05), name


def test_time_is_bound_by_products_where_there_are_many_tokens() -> None:
    device = DEVICES["h200"]
    plain, rotated = (seconds(method, Layer(4096, 4096, 1 << 17, 256), device) for method in ("linear", "fast"))
    assert plain == pytest.approx(3 * 2 * 4096**2 * (1 << 17) / device.product)
    assert 0.9 < rotated / plain < 1.15
    few = Layer(4096, 4096, 16, 256)
    assert seconds("fast", few, device) > 3 * seconds("linear", few, device)
