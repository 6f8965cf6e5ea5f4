"""Kernels that a layer asks a GPU for, counted on fake tensors."""

from __future__ import annotations

import pytest
from benchmarks.launches import of_a_decoder_layer, of_a_layer, of_a_step

from poetx.bench.step import by_method
from poetx.recipe import load_recipe

pytest.importorskip("triton", reason="what is counted are its launches")
TINY = ["model.hidden_size=64", "model.intermediate_size=96", "model.num_heads=2", "data.vocab_size=300"]
TINY += ["poet.block_size=16", "train.dtype=bfloat16"]
NEIGHBOURS = "poet.permutation=contiguous"


@pytest.mark.parametrize(
    ("method", "more", "most"),
    [("single-step", [], 6), ("fast", [], 25), ("mem", [], 30), ("fast", [NEIGHBOURS], 18), ("mem", [NEIGHBOURS], 22)],
)
def test_a_layer_asks_for_few_kernels(method: str, more: list[str], most: int) -> None:
    found = of_a_layer(by_method(load_recipe("demo", TINY + more, text=False), method), 48)
    assert len(found) == 3
    for kernels, moved in found.values():
        assert moved.keys() == kernels.keys()
        assert 4 < kernels.total() <= most, dict(kernels)


@pytest.mark.parametrize(
    ("method", "more", "most"),
    [("fast", [], 17), ("fast", [NEIGHBOURS], 10), ("mem", [], 20.5), ("mem", [NEIGHBOURS], 12)],
)
def test_layers_of_a_decoder_layer_ask_for_fewer_together(method: str, more: list[str], most: float) -> None:
    """Products are eight (fast) and ten (mem) of them."""
    keys = [*TINY, "poet.neumann_order=3", *more]
    kernels, layers = of_a_decoder_layer(by_method(load_recipe("demo", keys, text=False), method), 48)
    assert layers == 7
    assert kernels["series_kernel"] == (1 if method == "fast" else 2)
    assert kernels.total() / layers <= most, dict(kernels)


def test_shared_permutations_leave_half_of_the_passes_and_a_third_of_their_bytes() -> None:
    """q, k and v in, gate and up in: one pass forward, one back; o in three; out two each but for the MLP's inner."""
    found = {}
    for permutation in ("random", "shared", "contiguous"):
        keys = [*TINY, "model.num_layers=2", "model.intermediate_size=224", f"poet.permutation={permutation}"]
        counts, layers = of_a_step(by_method(load_recipe("demo", keys, text=False), "fast"), 1, 32)
        assert layers == 14
        passes = sum(count for (_, name), count in counts.counts.items() if name == "permute_kernel")
        found[permutation] = passes, counts.bytes["permute_kernel"]
    assert {kind: passes for kind, (passes, _) in found.items()} == {"random": 70, "shared": 34, "contiguous": 0}
    assert found["shared"][1] < 0.35 * found["random"][1]


@pytest.mark.parametrize(
    ("method", "most", "kernels"),
    [("single-step", 2500, {"fold_kernel", "norm_kernel", "decay_kernel"}), ("fast", 500, {"adamw_many_kernel"})],
)
def test_the_optimizer_of_8b_asks_for_few_kernels(method: str, most: int, kernels: set[str]) -> None:
    """Of 224 matrices; *fast* with 8 bits of state for its 448 rotations."""
    keys = ["optimizer.state_dtype=int8"]
    counts, layers = of_a_step(by_method(load_recipe("llama-8b", keys, text=False), method), 1, 16)
    assert layers == 224
    assert kernels <= {name for phase, name in counts.counts if phase == "step"}
    assert 2 < counts.total("step") <= most
