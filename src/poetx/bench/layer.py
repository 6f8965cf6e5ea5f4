"""``poetx bench layer``: forward and backward of one layer, every contestant in the same run, and where time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from poetx.bench.timing import gate, interleaved, median, peak_bytes, provenance
from poetx.config import PoetConfig
from poetx.errors import UserError, nearest
from poetx.layers.poet import PoetLinear
from poetx.layers.single_step import SingleStepLinear
from poetx.ops import block_diagonal as rotations
from poetx.ops.cayley import cayley
from poetx.ops.single_step import map_gradient, skew_gradient
from poetx.optim.single_step.optimizer import POETX


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One layer and its input: ``tokens`` rows of ``in_features``, a weight [out_features, in_features]."""

    tokens: int
    in_features: int
    out_features: int
    block_size: int
    dtype: torch.dtype
    device: torch.device

    def facts(self) -> dict[str, Any]:
        """As columns of a row."""
        facts = asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")}
        del facts["device"]
        return facts


def _arguments(shape: Shape, **settings: Any) -> dict[str, Any]:
    """Of a layer of either method."""
    config = PoetConfig(block_size=shape.block_size, init="normalized", **settings)
    sizes = {"in_features": shape.in_features, "out_features": shape.out_features, "bias": False}
    return sizes | {"config": config, "name": "bench", "device": shape.device, "dtype": shape.dtype}


def poet_layer(shape: Shape, mode: str, **settings: Any) -> PoetLinear:
    """A layer whose rotations are not the identity: angles of a few tenths, from a fixed seed."""
    layer = PoetLinear(**_arguments(shape, mode=mode, **settings))
    with torch.no_grad():
        for skew in layer.rotations:
            skew.normal_(std=0.15 / shape.block_size**0.5, generator=torch.Generator(shape.device).manual_seed(0))
    return layer


def _linear(shape: Shape) -> nn.Module:
    return nn.Linear(shape.in_features, shape.out_features, bias=False, device=shape.device, dtype=shape.dtype)


def _single_step(shape: Shape, **settings: Any) -> SingleStepLinear:
    layer = SingleStepLinear(**_arguments(shape, method="single-step", mode="fast", **settings))
    vars(layer)["trained_by"] = POETX(nn.Sequential(layer))  # where backward adds to, for as long as it lives
    return layer


#: Who takes part: a name, and what builds the module from a :class:`Shape`. A module with ``rotations`` has to have
#: ``dense_weight()`` as well, differentiable in them, for the gate. The first one is what the others are compared with.
CONTESTANTS: dict[str, Callable[[Shape], nn.Module]] = {
    "linear": _linear,
    "original": lambda shape: poet_layer(shape, "weight"),  # POET's own, weight-centric way
    "fast": lambda shape: poet_layer(shape, "fast"),
    "mem": lambda shape: poet_layer(shape, "mem"),
    "fast-contiguous": lambda shape: poet_layer(shape, "fast", permutation="contiguous"),
    "mem-contiguous": lambda shape: poet_layer(shape, "mem", permutation="contiguous"),
    "single-step": lambda shape: _single_step(shape, update="rotation"),
    "single-step-free": lambda shape: _single_step(shape, update="free"),
}


def check(name: str, module: nn.Module, x: Tensor, g: Tensor) -> None:
    """Output, input gradient and rotation gradients against the dense weight in float64, on a GPU in float32.

    Raises:
        UserError: one of them is wrong.
    """
    named = zip(("skew_in", "skew_out"), getattr(module, "rotations", ()), strict=False)
    skews = [(side, skew) for side, skew in named if skew.numel()]  # a side of one feature cannot be rotated
    wide = torch.float64 if x.device.type == "cpu" else torch.float32
    weight: Any = getattr(module, "dense_weight", lambda: module.weight)()
    y = module(x)
    y.backward(g)  # not torch.autograd.grad: single-step layers accumulate
    x_wide, g_wide, W = x.detach().to(wide), g.to(wide), weight.detach().to(wide)
    dW = g_wide.T @ x_wide
    pairs: list[tuple[str, Any, Tensor]] = [("output", y, x_wide @ W.T), ("input gradient", x.grad, g_wide @ W)]
    if skews:
        wanted = torch.autograd.grad(weight, [skew for _, skew in skews], dW.to(weight.dtype))
        pairs += [(f"gradient of {side}", skew.grad, want) for (side, skew), want in zip(skews, wanted, strict=True)]
    if isinstance(module, SingleStepLinear):
        assert module.momentum is not None
        gradient_of = map_gradient if module.config.update == "free" else skew_gradient
        momenta, blocks = module.momentum, (module.block_size_in, module.block_size_out)
        for side, got, block_size in zip(
            ("in", "out"), (momenta.momentum_in, momenta.momentum_out), blocks, strict=True
        ):
            pairs.append((side, got, gradient_of(W, dW, side, block_size)))
    for what, got, want in pairs:
        gate(f"{name}: {what}", got, want.to(wide), x.dtype)
    x.grad = None
    module.zero_grad()


def bench_layer(
    shape: Shape,
    *,
    contestants: Sequence[str] = ("linear", "original", "fast", "mem"),
    repeats: int = 20,
    parts: bool = True,
    compiled: bool = False,
) -> Iterator[dict[str, Any]]:
    """One row a contestant (forward, backward and both, ms and peak memory), then one row a part.

    ``ratio`` is the median of both passes over that of the first contestant. ``queued_ms`` is what a GPU alone takes,
    its host's launches not counted (:func:`poetx.bench.timing.interleaved`); None elsewhere. Parts are timed on their
    own, as the operators of the *fast* layer run on activations: their sum is not its time.

    Raises:
        UserError: an unknown contestant, or one that computes something else.
    """
    for name in contestants:
        if name not in CONTESTANTS:
            raise UserError(f"{name!r}: no such contestant{nearest(name, list(CONTESTANTS))}")
    generator = torch.Generator(shape.device).manual_seed(1)
    draw: dict[str, Any] = {"generator": generator, "device": shape.device, "dtype": shape.dtype}
    x = torch.randn(shape.tokens, shape.in_features, **draw).requires_grad_()
    g = torch.randn(shape.tokens, shape.out_features, **draw)
    calls: dict[str, Callable[[], object]] = {}
    forwards: dict[str, Callable[[], object]] = {}
    for name in contestants:
        module = CONTESTANTS[name](shape)
        check(name, module, x, g)
        forward: Any = torch.compile(module) if compiled else module
        leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
        forwards[name] = lambda forward=forward: forward(x)
        calls[name] = partial(_both_passes, forward, x, g, leaves)
    times = interleaved(calls, repeats=repeats, device=shape.device)
    alone = interleaved(forwards, repeats=repeats, device=shape.device)
    on_gpu = shape.device.type == "cuda"
    queued = interleaved(calls, repeats=repeats, device=shape.device, queued=True) if on_gpu else None
    base = median(times[contestants[0]])
    common = shape.facts() | {"compiled": compiled, "repeats": repeats} | provenance(shape.device)
    for name in contestants:
        both, forward_ms = median(times[name]), median(alone[name])
        yield {
            "benchmark": "layer",
            "contestant": name,
            "ms": both,
            "forward_ms": forward_ms,
            "backward_ms": round(both - forward_ms, 4),
            "ratio": round(both / base, 3),
            "queued_ms": queued and median(queued[name]),
            "queued_ratio": queued and round(median(queued[name]) / median(queued[contestants[0]]), 3),
            "peak_bytes": peak_bytes(calls[name], shape.device),
        } | common
    if parts:
        linear = median((queued or times)[contestants[0]])
        for part, (values, count) in _part_times(shape, x.detach(), g, repeats).items():
            ms = median(values)
            yield {
                "benchmark": "layer-part",
                "part": part,
                "ms_each": ms,
                "count": count,
                "ms": round(ms * count, 4),
                "share_of_linear": round(ms * count / linear, 3),
            } | common


def _both_passes(forward: Callable[[Tensor], Tensor], x: Tensor, g: Tensor, leaves: Sequence[Tensor]) -> None:
    """As training does them: what is accumulated in backward, a gradient or a momentum, is made in it."""
    for leaf in leaves:
        leaf.grad = None
    forward(x).backward(g)


def _part_times(shape: Shape, x: Tensor, g: Tensor, repeats: int) -> dict[str, tuple[list[float], int]]:
    """Milliseconds of every part and how often one forward and backward takes it; the indented are within others."""
    layer = poet_layer(shape, "fast")
    weight, perm_in, perm_out = layer.base_weight, layer.perm_in, layer.perm_out

    def both_sides() -> list[Tensor]:
        return [cayley(s.packed, size=s.size, block_size=s.block_size, order=layer.order) for s in layer.sides]

    kept = both_sides()
    grads = [torch.randn_like(G) for G in kept]
    G_in, G_out = (G.detach().to(x.dtype) for G in kept)
    scratch = x.clone()  # the backward may overwrite the gradient it is given
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "products": (lambda: (x @ weight.T, g @ weight), 1),
        "cnp": (both_sides, 1),
        "cnp backward": (lambda: torch.autograd.grad(kept, layer.rotations, grads, retain_graph=True), 1),
        "gather + rotate": (lambda: rotations.gather_rotate(x, perm_in, G_in), 1),
        "rotate + scatter": (lambda: rotations.rotate_scatter(g, G_out, perm_out), 1),
        "gather + rotate, backward": (
            lambda: rotations.gather_rotate_backward(x, perm_in, G_in, scratch, True),
            1,
        ),
        "rotate + scatter, backward": (lambda: rotations.rotate_scatter_backward(g, G_out, perm_out, g), 1),
        "  permutation": (lambda: rotations.gather(x, perm_in), 5),
        "  block product": (lambda: rotations.rotate(x, G_in), 4),
        "  block outer product": (lambda: rotations.block_outer_products(x, x, shape.block_size), 2),
    }
    queued = shape.device.type == "cuda"
    alone = {name: call for name, (call, _) in calls.items()}
    times = interleaved(alone, repeats=repeats, device=shape.device, queued=queued)
    return {name: (times[name], count) for name, (_, count) in calls.items()}
