"""POETX: rotations folded into the weight at every step, on converted layers or on an ordinary model.

Folding at every step (T_m = 1) makes the rotations the identity whenever forward runs, so a layer stays a plain
matrix product and only the step is special. For W ← R·W·P with R = G(Q_out), P = G(Q_in), the gradients at Q = 0 are
``2 (M − Mᵀ)`` with M_out = dW·Wᵀ and M_in = Wᵀ·dW, restricted to blocks, so a block-diagonal momentum of b(m+n)/2
numbers stands where AdamW keeps 2mn. The fold is the exact Cayley transform in float32, and ‖W‖ is held (method,
sections 4 and 7).

With blocks smaller than the layer, one partition of the coordinates mixes only what shares a block. Several fixed
partitions, each with its own momentum, are updated at every step and written one (side, partition) at a time, in turn.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from poetx.distributed.ranks import average_, maximum_, on_any_rank
from poetx.errors import UserError
from poetx.layers.poet import stream
from poetx.layers.single_step import SingleStepLinear
from poetx.layers.walk import single_step_layers
from poetx.ops.cayley import packed_size, unpack_skew
from poetx.ops.fold import full_precision_products
from poetx.ops.single_step import (
    Sinks,
    add_to_,
    block_count,
    block_peaks,
    fold_side_,
    map_gradient,
    small_cayley_delta,
)
from poetx.optim.orthogonalize import LARGEST_SINGULAR_VALUE, Finished, Move, Ortho, batches, orthogonalize
from poetx.optim.partitions import Orders
from poetx.optim.poetx_settings import check, check_state, model_groups, settings
from poetx.optim.release_weight_gradients import release

#: A block whose gradient since the last step is smaller than this beside its momentum counts as one without gradient.
_NEGLIGIBLE = 2.0**-20
#: Weights whose ‖W‖ differs by less count as those of the last fold: stochastic rounding of bfloat16 moves it by 0.8 %.
_SAME_NORM = 0.01


class POETX(torch.optim.Optimizer):
    """Rotates matrices by a small angle at every step, and trains everything else with AdamW, in one optimizer.

    Args:
        model: one of
            a model converted with ``PoetConfig(method="single-step")``, whose layers feed the momentum in backward and
            decide block_size, partitions, partition_kind and seed;
            an ordinary model, whose ``nn.Linear`` and ``Conv1D`` weights are rotated from their full gradients, by
            the rules of :func:`poetx.convert_`;
            parameter groups, of which those with ``"rotate": True`` hold matrices [m, n], or stacks of them
            [e, m, n], and have ``lr`` as their angle (``angle`` if they set none).
        lr: of the rest; None: the base's own, 1e-3 without one.
        angle: radians that a step turns each plane of a written block by, half: Q = −angle · direction. It is the
            ``lr`` of the rotated group, so learning-rate schedulers scale it.
        block_size: b, 256 unless the layers say; a side shorter than b is one block.
        partitions: how many of them each side has, 2 unless the layers say. ``partition_kind``: ``"structured"`` or
            ``"random"``.
        spectrum: ``"fixed"`` (rotations) or ``"free"`` (any map near the identity, with ‖W‖ held); the layers decide,
            if any.
        norm_growth: g lets ‖W‖² grow by g times its first value a step, as it does under additive optimizers. 0: held.
        resample_every: draw random partitions anew after so many steps, with their momentum reset. None: never.
        momentum, nesterov: of the rotated matrices. betas, eps: of AdamW. weight_decay: of the
            matrices of the rest, vectors having none; None: the base's own, 0 without one.
        momentum_dtype: ``"float32"`` or ``"bfloat16"``, which is rounded stochastically; for an ordinary model, the
            layers' ``rotation_dtype`` decides otherwise.
        release_gradients: of an ordinary model: drop each matrix's gradient as soon as backward has it. Gradient
            accumulation stays exact, because a momentum is linear; clipping does not see those gradients. See
            :meth:`close` before another optimizer takes over.
        base: makes the optimizer of the rest from parameter groups, instead of AdamW; what it sets itself holds where
            neither a group nor an argument here says otherwise. :func:`poetx.optim.build_optimizer` for bfloat16.
        target_modules, exclude_modules: as in :class:`poetx.PoetConfig`; with an ordinary model only.
        seed: of random partitions and of the rounding of bfloat16 weights and momenta. Only what a converted layer's
            backward adds is rounded with torch's global generator: ranks average it before they use it.

    State of a matrix: ``b(m+n)/2`` numbers a partition, and half of the largest of them again for ``nesterov``.
    In a process group, what converted layers added is averaged over its ranks, and so are gradients that are
    released: before ``DistributedDataParallel`` could do that.

    ‖W‖ is held as it is at the first step. Weights written from outside later (a checkpoint loaded; not through
    ``.data``, which torch does not count) are seen, and theirs is held from then on.

    Converted layers feed the momentum while backward runs: gradient clipping does not reach it (the orthogonalized
    direction does not depend on its size), a gradient that is not finite is left out, and ``zero_grad`` does not take
    anything back. A matrix that got no gradient since the last step, on any rank, stays as it is; one that was left
    out counts as none where the host sees it, on a CPU without a compiler, and as zero elsewhere.

    Raises:
        UserError: a value outside its range, nothing to rotate, a float16 matrix, a gradient scaler, a group
            added later.
    """

    _step_supports_amp_scaling = True  # so that a gradient scaler shows itself to step(), which refuses it

    def __init__(
        self,
        model: nn.Module | Iterable[dict[str, Any]],
        lr: float | None = None,
        *,
        angle: float = 0.012,
        block_size: int | None = None,
        partitions: int | None = None,
        partition_kind: str | None = None,
        spectrum: str | None = None,
        norm_growth: float = 0.0,
        resample_every: int | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        momentum_dtype: str | None = None,
        release_gradients: bool = False,
        base: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
        target_modules: str | tuple[str, ...] = "all-linear",
        exclude_modules: str | tuple[str, ...] = ("lm_head",),
        seed: int | None = None,
    ) -> None:
        layers = dict(single_step_layers(model)) if isinstance(model, nn.Module) else {}
        given: dict[str, Any] = {"block_size": block_size, "partitions": partitions, "seed": seed, "spectrum": spectrum}
        given |= {"partition_kind": partition_kind, "rotation_dtype": momentum_dtype}
        self._config = settings(layers, given, target_modules, exclude_modules)
        check(resample_every, momentum, angle, norm_growth, self._config)
        self._resample, self._growth = resample_every, norm_growth
        self._rule = Ortho(momentum, nesterov)
        self._free = self._config.spectrum == "free"
        self._moves = [Move(side, i) for i in range(self._config.partitions) for side in ("in", "out")]
        self._layers: dict[Tensor, SingleStepLinear] = {
            layer.weight: layer for layer in layers.values() if not layer.frozen
        }
        self._fed: Counter[Tensor] = Counter()  # full gradients since the last step
        self._released: dict[Tensor, RemovableHandle] = {}
        self._peaks: dict[tuple[Tensor, str], Tensor] = {}
        self._seen: dict[Tensor, tuple[int, int]] = {}  # versions of layers' momenta after the last step
        self._folded: dict[Tensor, int] = {}  # versions of weights after their last fold
        self._orders = Orders(self._config, resample_every)
        lr = 1e-3 if lr is None and base is None else lr
        self._make_base = base or (
            lambda rest: torch.optim.AdamW(rest, betas=betas, eps=eps, weight_decay=weight_decay or 0.0)
        )
        self._transposed: set[Tensor] = set()
        if isinstance(model, nn.Module):
            groups, self._transposed = model_groups(model, layers, self._config, angle, weight_decay)
        else:
            groups = [dict(group) for group in model]
        if not any(group.get("rotate") for group in groups):
            raise UserError("POETX: no group has 'rotate': True, so nothing would be rotated; use torch.optim.AdamW")
        for group in groups:
            if group.get("rotate") or lr is not None:
                group.setdefault("lr", angle if group.get("rotate") else lr)
        self._names: dict[Tensor, str] = {}
        super().__init__(groups, {"rotate": False})
        self._base: torch.optim.Optimizer | None = None
        for _, p in self._rotated():
            if p.ndim not in (2, 3) or p.dtype not in (torch.float32, torch.bfloat16, torch.float64):
                raise UserError(
                    f"POETX: cannot rotate a parameter of shape {tuple(p.shape)} and {p.dtype}; matrices (or stacks of "
                    "them) in float32 or bfloat16 only"
                )
            self._names[p] = str(len(self._names))
            if p in self._layers:
                self._begin(p)
                self._attach(p)
            elif release_gradients:
                self._released[p] = release(p, self._absorb)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._names:
            raise UserError("POETX: groups cannot be added later; give all of them when it is built")
        super().add_param_group(param_group)

    def __reduce__(self) -> Any:
        raise UserError("POETX cannot be copied or pickled: its layers feed one optimizer; save its state_dict()")

    def _rotated(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        return ((group, p) for group in self.param_groups if group["rotate"] for p in group["params"])

    def _share(self) -> None:
        """The base optimizer over the other groups, with these very groups and this very state."""
        rest = [group for group in self.param_groups if not group["rotate"]]
        if rest and self._base is None:
            self._base = self._make_base(rest)
            made = {id(p): group for group in self._base.param_groups for p in group["params"]}
            for group in rest:  # the base's own settings, where it did not write them into the group itself
                group |= made[id(group["params"][0])] | group if group["params"] else {}
        if self._base is not None:
            self._base.param_groups, self._base.state = rest, self.state

    @property
    def base(self) -> torch.optim.Optimizer | None:
        """The optimizer of what is not rotated, for hooks; :meth:`step` steps it."""
        return self._base

    def close(self) -> None:
        """Let go of the model, for another optimizer: gradients are no longer released, and converted layers feed none.

        An optimizer of an ordinary model that is deleted lets go by itself.
        """
        while self._released:
            self._released.popitem()[1].remove()
        for p, layer in self._layers.items():
            if layer.sinks is not None and layer.sinks.sink_in is self.state[p]["momentum_in"]:
                layer.sinks = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; every tensor keeps its dtype, where torch would cast it to the weight's.

        Raises:
            UserError: it was saved with momenta of other shapes or another dtype.
        """
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        rotated = {p for _, p in self._rotated()}
        # Before anything is replaced: a state that does not fit must leave this one as it was.
        for index, p in zip(saved, params, strict=False):
            entries = state_dict["state"].get(index, {})
            if p in rotated and (entries or p in self._layers):
                check_state(entries, self._zeros(p, "meta"))
        super().load_state_dict(state_dict)
        self._folded.clear()
        self._peaks.clear()
        for index, p in zip(saved, params, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and key != "step":
                    self.state[p][key] = value.to(p.device, copy=True)
        for p in self._layers:
            self._attach(p)
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step. Closures and gradient scalers are refused: a fold, and a momentum, cannot be taken back."""
        if closure is not None:
            raise UserError("POETX.step() takes no closure: it would have to undo a fold to evaluate twice")
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            raise UserError("POETX does not work with a gradient scaler; train in bfloat16, which needs none")
        if self._base is not None:
            self._base.step()
        for _, p in self._rotated():
            if p.grad is not None:
                self._absorb(p)
        fed = self._gather()
        for group in self.param_groups:
            if group["rotate"]:
                self._rotate([p for p in group["params"] if p in fed], group["lr"])
        self._fed.clear()

    def _rotate(self, moving: list[Tensor], angle: float) -> None:
        for p in moving:
            self._measure(p)
            self.state[p]["step"] += 1
        for move in self._moves:
            written = [p for p in moving if move in self._written(self.state[p]["step"] - 1)]
            blocks = {p: (self._sides(p, move.side)[1], self._sink_shape(p, move.side)[1]) for p in written}
            for batch in batches(blocks):
                self._write(batch, move, angle)
        fresh = [p for p in moving if self._resample and self.state[p]["step"] % self._resample == 0]
        for p in fresh:
            self._rule.restart(self.state[p])
            for move in self._moves:
                self._order(p, move)
        now = [(p, self.state[p]) for p in moving]
        self._rule.finish([Finished(s, self._written(s["step"]), partial(self._noise, p)) for p, s in now])
        self._folded |= {p: p._version for p in moving}
        for p, side in itertools.product(moving, ("in", "out")):
            self._peaks_of(p, side).zero_()
        self._seen |= {p: self._versions(p) for p in moving if p in self._layers}

    def _written(self, steps: int) -> list[Move]:
        """What is written in the step after so many."""
        return [self._moves[steps % len(self._moves)]]

    def _sides(self, p: Tensor, side: str) -> tuple[int, int]:
        """Size and block size of one side."""
        size = p.shape[-1] if (side == "in") != (p in self._transposed) else p.shape[-2]
        return size, min(self._config.block_size, size)

    def _matrices(self, p: Tensor, values: Tensor | None = None) -> Tensor:
        """p, or values of its shape, as matrices [e, out, in]: a view."""
        values = p.detach() if values is None else values
        values = values.mT if p in self._transposed else values
        return values if values.ndim == 3 else values.unsqueeze(0)

    def _sink_shape(self, p: Tensor, side: str) -> tuple[int, ...]:
        """[partitions, blocks, P], or [partitions, blocks, b, b] for maps that need not be rotations."""
        size, block_size = self._sides(p, side)
        blocks = block_count(size, block_size) * (p.shape[0] if p.ndim == 3 else 1)
        entries = (block_size, block_size) if self._free else (packed_size(block_size),)
        return self._config.partitions, blocks, *entries

    def _zeros(self, p: Tensor, device: torch.device | str) -> dict[str, Tensor]:
        """The rule's state of one matrix before its first step."""
        dtype = torch.float64 if p.dtype == torch.float64 else getattr(torch, self._config.rotation_dtype)
        shapes = {f"{name}_{side}": self._sink_shape(p, side) for side in ("in", "out") for name in self._rule.entries}
        return {key: torch.zeros(shape, dtype=dtype, device=device) for key, shape in shapes.items()}

    def _begin(self, p: Tensor) -> None:
        state = self.state[p]
        state |= {"step": 0, **self._zeros(p, p.device)}
        self._rule.expect(state, self._written(0))

    def _peaks_of(self, p: Tensor, side: str) -> Tensor:
        """[K, blocks]: the largest entry that was added to each block since the last step."""
        key = (p, side)
        if key not in self._peaks:
            momentum = self.state[p][f"momentum_{side}"]
            dtype = torch.promote_types(momentum.dtype, torch.float32)
            self._peaks[key] = torch.zeros(momentum.shape[:2], dtype=dtype, device=momentum.device)
        return self._peaks[key]

    def _measure(self, p: Tensor) -> None:
        """Take the ‖W‖ to hold at the first step, and again where the weight was written since the last fold.

        Other weights are told from the same ones, put back after a while or loaded to continue, by their norm.
        """
        if self._folded.get(p) == p._version:
            return
        state = self.state[p]
        norm = torch.linalg.vector_norm(self._matrices(p), dim=(-2, -1), dtype=torch.float64)
        # [1] or [e]. What a fold adds to ‖W‖, by rounding or a free spectrum, the next one takes away by this factor.
        scale = state.get("scale", torch.ones_like(norm))
        first = norm / self._grown(p)
        held = state.get("norm", first)
        same = (first * scale / held - 1).abs() < _SAME_NORM
        state["norm"] = torch.where(same, held, first)
        state["scale"] = torch.where(same, scale, 1.0)

    def _grown(self, p: Tensor) -> float:
        """‖W‖ as it should be after so many steps, over the first one."""
        return math.sqrt(1 + self._growth * self.state[p]["step"])

    def _attach(self, p: Tensor) -> None:
        """Have the layer's backward add to this optimizer's momentum."""
        state, layer = self.state[p], self._layers[p]
        indices = range(self._config.partitions)
        orders = {side: tuple(self._order(p, Move(side, i)) for i in indices) for side in ("in", "out")}
        anchor = torch.zeros((), device=p.device, requires_grad=True)
        peaks = (self._peaks_of(p, side) for side in ("in", "out"))
        layer.sinks = Sinks(state["momentum_in"], state["momentum_out"], *peaks, orders["in"], orders["out"], anchor)
        self._seen[p] = self._versions(p)

    def _versions(self, p: Tensor) -> tuple[int, int]:
        """Grow with every write: how the host knows, without waiting for the device, that backward added something."""
        state = self.state[p]
        return state["momentum_in"]._version, state["momentum_out"]._version

    def _order(self, p: Tensor, move: Move) -> Tensor:
        size, block_size = self._sides(p, move.side)
        return self._orders.get(move, size, block_size, self._names[p], self.state[p]["step"], p.device)

    @torch.no_grad()
    def _absorb(self, p: Tensor) -> None:
        """Add a full gradient's share to the momentum, as a converted layer does in backward."""
        if not self.state[p]:
            self._begin(p)
        assert p.grad is not None
        count = self._fed[p]
        pairs = list(zip(self._matrices(p), self._matrices(p, p.grad), strict=True))
        for move in self._moves:
            order = self._order(p, move)
            order = order if order.numel() else None
            block_size = self._sides(p, move.side)[1]
            M = torch.cat([map_gradient(W, dW, move.side, order, block_size) for W, dW in pairs])
            sink, noise = self.state[p][f"momentum_{move.side}"][move.index], None
            if sink.dtype == torch.bfloat16:
                noise = self._noise(p, f"gradient-{move.side}-{move.index}-{count}")
            if add_to_(sink, self._peaks_of(p, move.side)[move.index], M, self._sides(p, move.side)[0], noise):
                self._fed[p] = count + 1

    def _gather(self) -> set[Tensor]:
        """Which matrices got a gradient on any rank, after making the mean over the ranks of what backward added.

        A momentum is linear, and all ranks had the same one before this step's share. Without a gradient nothing
        moves and nothing is counted, as in any optimizer of torch: the stale momentum would turn by the full angle.
        """
        local = [*self._layers, *self._released]
        flags = [p in self._fed or (p in self._layers and self._versions(p) != self._seen[p]) for p in local]
        if local:
            flags = on_any_rank(flags, local[0].device)
        arrived = [p for p, flag in zip(local, flags, strict=True) if flag]
        for p in arrived:
            if not self.state[p]:
                self._begin(p)
        for p, side in itertools.product(arrived, ("in", "out")):
            average_(self.state[p][f"momentum_{side}"], partial(self._noise, p, f"ranks-{side}"))
            maximum_(self._peaks_of(p, side))
        return {*self._fed, *arrived}

    def _write(self, batch: list[Tensor], move: Move, angle: float) -> None:
        """Fold one (side, partition) of every matrix of the batch."""
        direction = self._rule.direction([self.state[p] for p in batch], move)
        # A block without a gradient stays as it is, whatever its momentum still holds.
        size, floor = block_peaks(direction), torch.finfo(direction.dtype).tiny
        touched = torch.cat([self._peaks_of(p, move.side)[move.index] for p in batch]) > (size * _NEGLIGIBLE)
        touched &= size >= floor
        direction = direction.masked_fill_(~touched.view(-1, *[1] * (direction.ndim - 1)), 0.0)
        if not self._free:
            direction = unpack_skew(direction, 0, self._sides(batch[0], move.side)[1])
        direction = orthogonalize(direction, skew=not self._free)
        counts = [self._sink_shape(p, move.side)[1] for p in batch]
        with full_precision_products():
            Q = direction.mul_(-angle)
            E = Q.mul_(2) if self._free else small_cayley_delta(Q, LARGEST_SINGULAR_VALUE * angle)
            pieces = zip(batch, E.split(counts), touched.split(counts), strict=True)
            squares = [self._fold(p, move, E_KBB, touched_K) for p, E_KBB, touched_K in pieces]
        norms = torch.cat([self.state[p]["norm"] * self._grown(p) for p in batch])
        ratios = norms / torch.stack([square for matrices in squares for square in matrices]).sqrt()
        scales = torch.where(ratios.isfinite() & (ratios > 0), ratios, 1.0)  # a matrix of zeros stays one
        for p, scale in zip(batch, scales.split([len(matrices) for matrices in squares]), strict=True):
            self.state[p]["scale"] = scale

    def _noise(self, p: Tensor, purpose: str) -> torch.Generator:
        return stream(self._config.seed, self._names[p], self.state[p]["step"], purpose, p.device)

    def _fold(self, p: Tensor, move: Move, E_KBB: Tensor, touched_K: Tensor) -> list[Tensor]:
        """Fold the blocks of one matrix, or stack of e; the new ‖W‖² of each."""
        state, order, matrices, noise = self.state[p], self._order(p, move), self._matrices(p), None
        if p.dtype == torch.bfloat16:
            noise = self._noise(p, f"rounding-{move.side}-{move.index}")
        touched = touched_K.view(len(matrices), -1)
        if self._growth:  # ‖W‖ grows by the part of the matrix that is trained
            share, step = touched.double().mean(1), state["step"]
            state["norm"] *= ((1 + self._growth * (step - 1 + share)) / (1 + self._growth * step)).sqrt()
        scales = torch.where(touched, state["scale"][:, None], 1.0)
        return [
            fold_side_(W, E, move.side, order, scale=scale, generator=noise)
            for W, E, scale in zip(matrices, E_KBB.chunk(len(matrices)), scales, strict=True)
        ]
