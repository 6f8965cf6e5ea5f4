"""What a sharded step sends, counted on fake tensors, is what its shapes say."""

from __future__ import annotations

import pytest
import torch
from benchmarks.rank_bytes import KINDS, sent_by_shapes, sent_sharded

from poetx.methods.base import convert_model
from poetx.models import build_model
from poetx.recipe import Recipe, load_recipe

WIDTH, HIDDEN, VOCABULARY, BLOCK, RANKS = 48, 96, 321, 16, 2
SMALL = 2000  # bytes: which rows of the embedding have a gradient, norms of gradients, which of them there are
SHAPE = [f"model.hidden_size={WIDTH}", f"model.intermediate_size={HIDDEN}", "model.num_heads=4", "model.num_layers=1"]
COMMON = [*SHAPE, f"data.vocab_size={VOCABULARY}", "train.sample_tokens=0", "parallel=fsdp"]


def recipe(*words: str) -> Recipe:
    return load_recipe("demo", [*COMMON, f"poet.block_size={BLOCK}", *words], text=False)


def padded(recipe: Recipe) -> dict[str, int]:
    """Bytes of a layer's frozen weights, its rotations and its norms, and of what is outside, each as it is sent."""
    with torch.device("meta"):
        model = build_model(recipe, vocab_size=VOCABULARY, end_of_text_id=0, device=torch.device("meta"))
    convert_model(model, recipe, None)
    sizes: dict[str, int] = dict.fromkeys(("frozen", "rotations", "norms", "outside"), 0)
    for name, p in model.named_parameters():
        inside = "norms" if "norm" in name else "rotations" if p.requires_grad else "frozen"
        kind = inside if ".layers." in name else "outside"
        sizes[kind] += -(-p.shape[0] // RANKS) * RANKS * p[0].numel() * p.itemsize
    return sizes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_gathered_twice_and_gradients_of_float32_rotations_go_in_their_dtype(dtype):
    asked = recipe("method=mem", f"train.dtype={dtype}")
    sent, sizes, ring = sent_sharded(asked, RANKS), padded(asked), (RANKS - 1) / RANKS
    rotations = sizes["rotations"]
    norms = sizes["norms"] if dtype == "float32" else 0  # bfloat16 ones are whole on every rank
    assert sent["frozen, gathered"] == 2 * ring * sizes["frozen"]
    assert sent["trained, gathered"] == ring * (2 * (rotations + norms) + sizes["outside"])
    reduced = ring * (rotations * (0.5 if dtype == "bfloat16" else 1) + sizes["norms"] + sizes["outside"])
    assert 0 < sent["trained, reduced"] - reduced < SMALL
    assert sent["folded rows"] == 0


def test_a_single_step_sends_each_momentum_once_and_the_rows_of_blocks_that_straddle():
    asked = recipe("method=single-step", "train.dtype=float32")
    found = [sent_sharded(asked, RANKS, rank) for rank in range(RANKS)]
    assert [{k: f[k] for k in KINDS[:3]} for f in found] == [{k: found[0][k] for k in KINDS[:3]}] * RANKS
    sizes, ring = padded(asked), (RANKS - 1) / RANKS
    assert found[0]["frozen, gathered"] == 2 * ring * sizes["frozen"]
    momenta = sent_by_shapes(asked, VOCABULARY) - sizes["norms"] - sizes["outside"]
    expected = ring * (2 * momenta + sizes["norms"] + sizes["outside"])
    assert 0 < found[0]["trained, reduced"] - expected < SMALL
    # of 48 rows each rank has 24, where blocks of 16 straddle, and of 96 it has 48, three whole ones
    straddling = 8 * (4 * WIDTH + HIDDEN) * 4  # bytes that each asks of the other in every other step
    assert [sent["folded rows"] for sent in found] == [straddling / 2] * RANKS
