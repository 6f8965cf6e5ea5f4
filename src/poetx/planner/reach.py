"""What fits a card and a host, and what it costs: the frozen weights resident or streamed, in each precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from poetx.errors import UserError
from poetx.planner.estimate import GIB, MemoryEstimate, estimate_memory
from poetx.recipe import Recipe

#: Ways to keep the frozen weights, the cheapest first: (weight format, offload).
WAYS: tuple[tuple[str | None, str | None], ...] = (
    (None, None),
    ("int8", None),
    ("int4", None),
    (None, "frozen"),
    ("int8", "frozen"),
    ("int4", "frozen"),
)
#: The rest of the memory savings, which every way has: recipe keys.
STACK: dict[str, Any] = {
    "model.gradient_checkpointing": True,
    "train.chunked_loss": True,
    "poet.mode": "mem",
    "poet.rotation_dtype": "bfloat16",
    "optimizer.state_dtype": "int8",
    "optimizer.release_gradients": True,
    "optimizer.clip": None,
}


@dataclass(frozen=True)
class Link:
    """What carries weights to a card, and what multiplies there; both as a run reaches them, not as a data sheet says.

    Attributes:
        bandwidth: bytes a second from locked host memory. flops: operations a second of large bfloat16 products.
    """

    bandwidth: float
    flops: float

    @classmethod
    def parse(cls, text: str) -> Link:
        """From ``"GB/s,TFLOP/s"``, as ``poetx env --measure`` prints them.

        Raises:
            UserError: these are no two positive numbers.
        """
        try:
            gigabytes, teraflops = map(float, text.split(","))
            link = cls(gigabytes * 1e9, teraflops * 1e12)
        except ValueError:
            link = cls(0, 0)
        if not (0 < link.bandwidth < math.inf and 0 < link.flops < math.inf):
            raise UserError(f"link={text}: must be GB/s and TFLOP/s, such as 48.2,410; poetx env --measure prints them")
        return link

    def __str__(self) -> str:
        return f"{self.bandwidth / 1e9:.4g},{self.flops / 1e12:.4g}"


#: PCIe 5 and 4 with 16 lanes at four fifths of their 63 and 31.5 GB/s; two fifths of the dense bfloat16 peak of an H100
#: SXM (989 TFLOP/s) and of an RTX 4090 (165).
LINKS = {"h100": Link(50e9, 400e12), "4090": Link(25e9, 66e12)}
#: Bytes a second that a good NVMe SSD reads (PCIe 4, sequential).
DISK = 5e9
#: Operations a token and weight in a micro-batch: forward, backward to the input, and with checkpointing forward again;
#: there is no product for a weight gradient. Block products come on top, a few percent at blocks of 256.
_OPERATIONS = {False: 4, True: 6}


@dataclass(frozen=True)
class Way:
    """One way to train a recipe.

    Attributes:
        keys: what it sets in the recipe, to copy.
        estimate: with ``host`` and ``moved``.
    """

    keys: dict[str, Any]
    estimate: MemoryEstimate

    @property
    def device_gib(self) -> float:
        return self.estimate.gib

    @property
    def host_gib(self) -> float:
        return self.estimate.host / GIB

    def seconds(self, link: Link) -> tuple[float, float]:
        """Of one micro-batch: of its products, and of the copies that run beside them."""
        recipe = self.estimate.recipe
        operations = _OPERATIONS[recipe.model.gradient_checkpointing] * self.estimate.parameters
        bandwidth = min(link.bandwidth, DISK) if self.estimate.file else link.bandwidth
        return operations * self.estimate.tokens / link.flops, self.estimate.moved / bandwidth

    def step_seconds(self, link: Link) -> float:
        """Of a step beside its micro-batches: weights that come and go at once, on both ways of the link."""
        return self.estimate.stepped / 2 / link.bandwidth

    def tokens_per_second(self, link: Link) -> float:
        """At most: whichever of products and copies takes longer, and what the step adds."""
        train = self.estimate.recipe.train
        step = self.step_seconds(link) * train.micro_batch / train.batch_size
        return self.estimate.tokens / (max(self.seconds(link)) + step)

    def enough_tokens(self, link: Link) -> int:
        """Tokens of a micro-batch from which on the products take longer than the copies; 0 where nothing is copied."""
        products, copies = self.seconds(link)
        return round(self.estimate.tokens * copies / products)


def plan(recipe: Recipe, weight_format: str | None, offload: str | None, *, device: str = "cuda") -> Way:
    """``recipe`` with its frozen weights in one way, and :data:`STACK`.

    Raises:
        UserError: a recipe without rotated layers, or what :func:`estimate_memory` raises.
    """
    if recipe.poet is None or recipe.poet.config.method == "oft":
        raise UserError(
            "the weights of method=poet-x and single-step can be kept in several ways; use one of them for --host"
        )
    keys = STACK | {"model.offload": offload}
    if recipe.poet.config.method == "poet-x":
        keys |= {"poet.weight_format": weight_format}
    if recipe.train.batch_size != recipe.train.micro_batch:
        keys |= {"optimizer.release_gradients": False}
    return Way(keys, estimate_memory(recipe.with_keys(keys | {"model.offload_dir": None}), device=device))


def ways(recipe: Recipe, *, device: str = "cuda") -> Iterator[Way]:
    """Every way of :data:`WAYS` for ``recipe``, each planned when it is asked for: :func:`plan`; then those from files.

    Of single-step weights those that do not quantize: what changes at every step has no use for few bits, nor any for a
    disk.
    """
    single = recipe.poet is not None and recipe.poet.config.method == "single-step"
    streamed = []
    for weight_format, offload in WAYS:
        if weight_format is None or not single:
            yield (way := plan(recipe, weight_format, offload, device=device))
            streamed += [way] if offload and not single else []
    for way in streamed:
        yield Way(way.keys | {"model.offload_dir": "DIR"}, way.estimate.in_files())
