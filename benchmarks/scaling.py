"""How many tokens a second 1 to 1024 GPUs train, on paper: bytes, operations and bandwidths, every assumption named.

    python -m benchmarks.scaling

The tables of docs/scaling.md are written from here (``python -m benchmarks.tables``): predictions beside what was
published for 64 H100, and what the same model says of other numbers of GPUs. Nothing is measured. Sizes come from a
model of the shape on the meta device, converted; what is sent from :mod:`benchmarks.rank_bytes`.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.rank_bytes import VOCABULARY, sent_by_shapes
from poetx.models import build_model
from poetx.recipe import load_recipe
from poetx.targets import find_targets

# -- the machine: eight H100 SXM a node, one 400 Gb/s port each --------------------------------------------------------

PEAK = 989e12  #: operations a second of dense bfloat16 products, by the data sheet
MEMORY = 3.35e12  #: bytes a second of a GPU's memory, by the data sheet
NODE = 8  #: GPUs of a node
NVLINK = 450e9  #: bytes a second of a GPU within its node, one way
PORT = 50e9  #: bytes a second of a GPU to other nodes, one way

# -- what of it is reached: assumed, and chosen by looking at the published figures ------------------------------------

PRODUCTS = 0.4  #: share of PEAK in large products: what docs/reach.md plans with, too
BLOCK_PRODUCTS = 0.2  #: share of PEAK in batched products of blocks, float32 ones in TF32 included
BANDWIDTH = 0.6  #: share of MEMORY, NVLINK and PORT
OVERLAP = 0.6  #: share of the shorter of computing and sending that hides behind the longer
LATENCY = 20e-6  #: seconds of one collective for each doubling of the GPUs

# -- what is done ------------------------------------------------------------------------------------------------------

PASSES = 20  #: times activations of the hidden size are read or written in a layer, beside products
BLOCK_PASSES = 8  #: times that both sides' activations are, for permutations and block products
CAYLEY_PRODUCTS = 12  #: b × b products a block and step: packed skew to rotation, and back for its gradient
STATE_BYTES = 24  #: read and written for a trained number in a step: weight, gradient and two moments, float32 moments
#: A token's products of the weight's size (forward, again, to the input, of the weight), and those with blocks.
WORK = {"adamw": (3, 0), "fast": (2, 3), "mem": (3, 4), "single-step": (2, 1)}


@dataclass(frozen=True)
class Size:
    """How many numbers a model has: in matrices between its ends, along their sides, in its ends; and what trains."""

    matrices: float
    sides: float
    ends: float
    layers: int
    hidden: int
    sent: float  # bytes
    trained: float


@functools.cache
def size(shape: str, method: str, block_size: int) -> Size:
    words = [f"method={method}", "train.dtype=bfloat16"]
    words += [] if method == "adamw" else [f"poet.block_size={block_size}"]
    recipe, dense = load_recipe(shape, words, text=False), load_recipe(shape, ["method=adamw", words[1]], text=False)
    with torch.device("meta"):
        model = build_model(dense, vocab_size=VOCABULARY, end_of_text_id=0, device=torch.device("meta"))
    poet = load_recipe(shape, ["method=fast"], text=False).poet
    assert poet is not None
    linears = [m for m in find_targets(model, poet.config).layers.values() if isinstance(m, nn.Linear)]
    matrices = sum(m.weight.numel() for m in linears)
    every = sum(p.numel() for p in model.parameters())
    sent = sent_by_shapes(recipe, VOCABULARY)
    return Size(
        matrices=matrices,
        sides=sum(m.in_features + m.out_features for m in linears),
        ends=every - matrices,
        layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size,
        sent=sent,
        trained=every if method == "adamw" else sent / 2,
    )


def gather_seconds(size: float, gpus: int) -> float:
    """Of an all-gather, or a reduce-scatter, of so many bytes altogether: within nodes and between them at once."""
    if gpus == 1:
        return 0.0
    inside, nodes = min(gpus, NODE), max(1, gpus // NODE)
    within = size * (inside - 1) / inside / (NVLINK * BANDWIDTH)
    between = size * (nodes - 1) / nodes / (NODE * PORT * BANDWIDTH)
    return max(within, between)


@dataclass(frozen=True)
class Step:
    """Seconds of one step on one of the GPUs: what its tokens take, what they do not change, and what is sent."""

    tokens: float
    fixed: float
    sent: float

    @property
    def seconds(self) -> float:
        computed = self.tokens + self.fixed
        return max(computed, self.sent) + (1 - OVERLAP) * min(computed, self.sent)


def step(shape: str, method: str, parallel: str, gpus: int, tokens: int, block_size: int = 256) -> Step:
    """A step of ``tokens`` on each GPU, one sequence."""
    s = size(shape, method, block_size)
    weight_products, block_products = WORK[method]
    rate, memory = PEAK * PRODUCTS, MEMORY * BANDWIDTH
    operations = 2 * s.matrices * weight_products + 6 * s.ends / 2  # the head is one of the ends, and dense
    operations += 3 * 2 * s.layers * s.hidden * tokens  # causal attention, forward and twice as much backward
    each = operations / rate + PASSES * 2 * s.layers * s.hidden / memory
    each += 2 * block_products * block_size * s.sides / (PEAK * BLOCK_PRODUCTS)
    each += (BLOCK_PASSES * 2 * s.sides / memory) if method in ("fast", "mem") else 0.0
    shared = gpus if parallel == "fsdp" else 1
    blocks = s.sides / block_size
    fixed = STATE_BYTES * s.trained / shared / memory
    if method in ("fast", "mem"):
        fixed += CAYLEY_PRODUCTS * 2 * block_size**3 * blocks / (PEAK * BLOCK_PRODUCTS)
    elif method == "single-step":  # five rounds of three products for one side, and the fold of that side
        fixed += 15 * 2 * block_size**3 * blocks / 2 / (PEAK * BLOCK_PRODUCTS) + 2 * s.matrices * block_size / rate
    weights = 2 * (s.matrices + s.ends)
    collectives = 3 * s.layers if parallel == "fsdp" else 2 * max(1, s.sent / 25e6)
    sent = 2 * gather_seconds(s.sent, gpus)
    if parallel == "fsdp":
        sent = 2 * gather_seconds(weights, gpus) + gather_seconds(s.sent, gpus)
    return Step(each * tokens, fixed, sent + collectives * LATENCY * math.log2(gpus))


def tokens_a_second(shape: str, method: str, parallel: str, gpus: int, tokens: int) -> float:
    return gpus * tokens / step(shape, method, parallel, gpus, tokens).seconds


#: Thousands of tokens a second of 64 H100, by tokens of a sequence, one on each GPU.
PUBLISHED: dict[tuple[str, str, str], dict[int, int]] = {
    ("llama-8b", "adamw", "fsdp"): {512: 186, 1024: 278, 2048: 437},
    ("llama-8b", "fast", "ddp"): {512: 286, 1024: 439, 2048: 490},
    ("llama-8b", "mem", "ddp"): {512: 200, 1024: 294, 2048: 363},
    ("llama-13b", "fast", "ddp"): {512: 206, 1024: 304, 2048: 341},
}
#: Published too: how many times one GPU's tokens 64 train by *fast* of the 8B, at 2048 tokens.
PUBLISHED_SPEEDUP = 61.0
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
#: Nobody has published these.
MORE = [("llama-8b", "fast", "fsdp"), ("llama-8b", "single-step", "ddp"), ("llama-8b", "single-step", "fsdp")]


def checked() -> list[list[str]]:
    """Published and predicted, a row for each method and length."""
    rows = []
    for (shape, method, parallel), published in PUBLISHED.items():
        for tokens, thousands in published.items():
            found = tokens_a_second(shape, method, parallel, 64, tokens) / 1e3
            own = step(shape, method, parallel, 64, tokens)
            parts = [f"{1e3 * part:.0f}" for part in (own.tokens, own.fixed, own.sent, own.seconds)]
            off = f"{100 * (found / thousands - 1):+.0f} %"
            rows.append([shape, f"{method}, {parallel}", str(tokens), *parts, f"{found:.0f}", str(thousands), off])
    return rows


def planned(tokens: int) -> list[list[str]]:
    """Thousands of tokens a second by the number of GPUs, and what a step sends."""
    rows = []
    for shape, method, parallel in [*PUBLISHED, *MORE]:
        speeds = [tokens_a_second(shape, method, parallel, gpus, tokens) / 1e3 for gpus in GPUS]
        sent = size(shape, method, 256).sent / 1e9
        rows.append([shape, f"{method}, {parallel}", f"{sent:.2f}", *(f"{speed:,.0f}" for speed in speeds)])
    return rows


def speedup(gpus: int = 64) -> float:
    """What is predicted for :data:`PUBLISHED_SPEEDUP`."""
    return tokens_a_second("llama-8b", "fast", "ddp", gpus, 2048) / tokens_a_second("llama-8b", "fast", "ddp", 1, 2048)


def assumptions() -> list[list[str]]:
    """The constants by name, with what each means, as the source says it."""
    lines = (line for line in Path(__file__).read_text().splitlines() if re.match(r"[A-Z_]+ = .*  #: ", line))
    parts = (re.split(r" = |  #: ", line, maxsplit=2) for line in lines)
    return [[f"`{name}`", value, meaning] for name, value, meaning in parts]


def main() -> None:
    for row in [*checked(), *planned(512), *planned(2048)]:
        print("  ".join(row))


if __name__ == "__main__":
    main()
