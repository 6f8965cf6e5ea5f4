"""One rotated parameter: its blocks, the momentum that gradients are added to, and the step that is taken at once."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from poetx.config import PoetConfig
from poetx.distributed.ranks import average_, rank, sent_dtype
from poetx.distributed.sharded import compute_device, is_sharded, local, own_rows, shard_sum_, whole_blocks
from poetx.errors import UserError
from poetx.layers.base import RotatedWeight
from poetx.layers.single_step import SingleStepLinear
from poetx.layers.weights import HostWeight
from poetx.ops.cayley import packed_size
from poetx.ops.fold import without_autocast
from poetx.ops.random import stream, stream_seed
from poetx.ops.side import block_count
from poetx.ops.single_step import MomentumBuffers, add_to_, block_peaks, map_gradient
from poetx.ops.single_step_update import Shard, decayed, fold_, norm_and_scale
from poetx.ops.transaction import copy_at_once_
from poetx.optim.gradient_release import hand_over_gradient, is_handed_over

SIDES = ("in", "out")
#: A block whose gradient since the last step is smaller than this beside its direction counts as one without gradient.
_NEGLIGIBLE = 2.0**-20


class Matrix:
    """A parameter [m, n], or a stack [e, m, n], that :class:`poetx.POETX` rotates.

    Its state, in ``optimizer.state[parameter]``:
        momentum_in, momentum_out: [blocks of the side, P], or [.., b, b] for maps that need not be rotations.
        before: with look-ahead, the momentum of the side that the next step writes, flat, without its gradients.
        norm, scale [e], float64: the ‖W‖ to hold, and the factor that the next step takes its excess away by.
        step: int64.
    The momenta and ``before`` are views of one tensor, norm and scale of another, so that a step writes few.

    Args:
        index: place among the rotated parameters, which decides the noise. name: for messages.
        layer: whose backward feeds the momentum, or None: from full gradients.
        transposed: the parameter is stored [in, out].
    """

    def __init__(
        self,
        parameter: Tensor,
        *,
        index: int,
        name: str,
        config: PoetConfig,
        look_ahead: bool,
        growth: float,
        layer: SingleStepLinear | None,
        transposed: bool,
    ) -> None:
        self.parameter, self.index, self.name, self.layer = parameter, index, name, layer
        self.config, self.look_ahead, self.growth, self.transposed = config, look_ahead, growth, transposed
        self.free = config.update == "free"
        self.micro_batches = 0  # full gradients taken since the last step
        self.handle: RemovableHandle | None = None
        self.changes = 0  # what a step that was computed ahead is known to be stale by
        self._touched, self._counted = False, 0
        self._taken: int | None = None  # the step that is being taken
        self._snapshot: dict[str, Tensor] = {}

    # Blocks

    def sizes(self, side: str) -> tuple[int, int]:
        """Size and block size of one side."""
        size = self.parameter.shape[-1] if (side == "in") != self.transposed else self.parameter.shape[-2]
        return size, min(self.config.block_size, size)

    def blocks(self, side: str) -> int:
        """Blocks of one side, in all matrices of a stack."""
        return block_count(*self.sizes(side)) * (self.parameter.shape[0] if self.parameter.ndim == 3 else 1)

    def matrices(self, values: Tensor) -> Tensor:
        """Values of the parameter's shape as matrices [e, out, in]: a view."""
        values = values.mT if self.transposed else values
        return values if values.ndim == 3 else values.unsqueeze(0)

    @property
    def device(self) -> torch.device:
        """Where the step is computed: a layer's weight may be in host memory."""
        return self.layer.device if self.layer is not None and self.hosted else compute_device(self.parameter)

    @property
    def rounds_momenta(self) -> bool:
        """Whether they are rounded, so that somebody draws noise."""
        return self.momenta.dtype == torch.bfloat16

    @property
    def hosted(self) -> bool:
        """Whether the weight is in host memory."""
        return self.layer is not None and self.layer.host is not None

    def noise(self, purpose: str, step: int) -> torch.Generator:
        return stream(self.config.seed, str(self.index), step, purpose, self.device)

    def noise_seed(self, purpose: str, step: int) -> int:
        """What :meth:`noise` seeds its generator with."""
        return stream_seed(self.config.seed, str(self.index), step, purpose)

    # State

    def fresh_state(self, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """The state before the first step."""
        p, device = self.parameter, device or self.device
        dtype = torch.float64 if p.dtype == torch.float64 else getattr(torch, self.config.rotation_dtype)
        shapes = {}
        for side in SIDES:
            block_size = self.sizes(side)[1]
            entries = (block_size, block_size) if self.free else (packed_size(block_size),)
            shapes[f"momentum_{side}"] = torch.Size((self.blocks(side), *entries))
        if self.look_ahead:
            shapes["before"] = torch.Size((max(shape.numel() for shape in shapes.values()),))
        flat = torch.zeros(sum(shape.numel() for shape in shapes.values()), dtype=dtype, device=device)
        parts = flat.split([shape.numel() for shape in shapes.values()])
        state = {"step": torch.tensor(0)}
        state |= {key: part.view(shape) for (key, shape), part in zip(shapes.items(), parts, strict=True)}
        count = p.shape[0] if p.ndim == 3 else 1
        norms = torch.zeros(2, count, dtype=torch.float64, device=device)
        state["norm"], state["scale"] = norms
        state["scale"].fill_(1)
        return state

    def attach(self, state: dict[str, Any], saved: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Keep the momentum in ``state``, with what is in ``saved``, and have the layer's backward add to it."""
        for key, value in saved.items():
            if not value.is_meta:
                state[key].copy_(value)
        self.state, self.touched, self.micro_batches = state, False, 0
        self._snapshot = {}
        if self.look_ahead and saved and "before" not in saved:
            self.before(self.side).copy_(state[f"momentum_{self.side}"])
        momenta = [state[f"momentum_{side}"] for side in SIDES]
        self.momenta = first_elements(momenta[0], sum(q.numel() for q in momenta))
        wide = torch.promote_types(momenta[0].dtype, torch.float32)
        self.all_peaks, self._no_peaks = torch.zeros(2, sum(map(len, momenta)), dtype=wide, device=momenta[0].device)
        self.peaks: dict[str, Tensor] = dict(zip(SIDES, self.all_peaks.split([len(q) for q in momenta]), strict=True))
        self._noise = self._seed(self.step)
        if self.layer is not None:
            anchor = torch.zeros((), device="cpu", requires_grad=True)  # its gradient costs a GPU nothing there
            anchor.register_post_accumulate_grad_hook(partial(_touch, weakref.ref(self)))
            (momentum_in, momentum_out), (peak_in, peak_out) = momenta, self.peaks.values()
            self.layer.momentum = MomentumBuffers(momentum_in, momentum_out, peak_in, peak_out, self._noise, anchor)
            self.layer.trainer = weakref.ref(self)

    def check_attached(self) -> None:
        """Raise :class:`UserError` where the layer has another weight than the one that is turned."""
        if self.layer is not None and self.layer._parameters["weight"] is not self.parameter:
            raise UserError(
                f"{self.name}: its weight was replaced since POETX was built (load_state_dict(assign=True) does that); "
                "build POETX anew, then load its state"
            )

    def _seed(self, step: int) -> Tensor:
        """What the rounding in a layer's backward draws from until the next step."""
        return torch.tensor([self.noise_seed("backward", step), 0])

    @property
    def step(self) -> int:
        """Steps taken."""
        step = self.state["step"]
        return int(step) if type(step) is Tensor else self._counted  # tensors without values when memory is planned

    @property
    def side(self) -> str:
        """The side that the next step writes."""
        return SIDES[self.step % 2]

    def before(self, side: str) -> Tensor:
        """The look-ahead's copy of a side's momentum."""
        momentum = self.state[f"momentum_{side}"]
        return self.state["before"][: momentum.numel()].view_as(momentum)

    def momentum_of(self, momenta: Tensor, side: str) -> Tensor:
        """One side's momentum from both, flat: a view."""
        if momenta is self.momenta:
            return self.state[f"momentum_{side}"]
        sizes = [self.state[f"momentum_{side}"].numel() for side in SIDES]
        return momenta.split(sizes)[SIDES.index(side)].view_as(self.state[f"momentum_{side}"])

    # Gradients

    @property
    def touched(self) -> bool:
        """Whether the momentum holds gradients that no step has taken."""
        return self._touched and self._taken != self.step

    @touched.setter
    def touched(self, touched: bool) -> None:
        self._touched, self._taken = touched, None
        self.changes += 1

    @property
    def moves(self) -> bool:
        """Whether gradients came since the last step that was taken to its end."""
        if self.layer is not None and self.layer.frozen:
            return False
        return self.touched or (self.parameter.grad is not None and self.layer is None)

    def take_gradients_of_other_terms(self) -> None:
        """Take the full gradient of what a loss makes of a layer's weight beside its product, such as a penalty."""
        if isinstance(self.parameter, RotatedWeight) and not is_handed_over(self.parameter):  # not where it is sharded
            with self.parameter.for_autograd() as weight:
                weight.requires_grad_(True)
                self.handle = hand_over_gradient(weight, self.released)

    def release(self) -> None:
        """Take no more full gradients in backward."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        if isinstance(self.parameter, RotatedWeight):
            with self.parameter.for_autograd() as weight:
                weight.requires_grad_(False)

    def released(self, parameter: Tensor) -> None:
        """Take the full gradient, which is dropped then."""
        if parameter.grad is None or (self.layer is not None and self.layer.frozen):  # compiled models hand over None
            parameter.grad = None
            return
        if self.layer is not None and self.layer.host is not None:
            raise UserError(
                f"{self.name}: the loss has a term of the weight itself, which is in host memory, and its gradient "
                "would be, too; keep the layer on the device, or pull the weight back beside the loss, after step()"
            )
        with torch.no_grad():
            self._add(self.momenta, self.peaks)
        parameter.grad = None
        self.touched = True
        self.micro_batches += 1

    def _add(self, momenta: Tensor, peaks: dict[str, Tensor]) -> None:
        """Add the full gradient's share to momenta, as a converted layer does in backward."""
        assert self.parameter.grad is not None
        W, dW = (self.matrices(values) for values in (self.parameter.detach(), self.parameter.grad))
        for side in SIDES:
            size, block_size = self.sizes(side)
            with without_autocast():
                M = torch.cat([map_gradient(W_i, dW_i, side, block_size) for W_i, dW_i in zip(W, dW, strict=True)])
            momentum, noise = self.momentum_of(momenta, side), None
            if momentum.dtype == torch.bfloat16:
                noise = self.noise(f"gradient-{side}-0-{self.micro_batches}", self.step)
            add_to_(momentum, peaks[side], M, size, noise)

    def average(self) -> None:
        """Mean over the ranks of what they added: a momentum is linear, and all ranks had the same one before."""
        for side in SIDES:
            noise = partial(self.noise, f"ranks-{side}-{rank()}", self.step)
            average_(self.state[f"momentum_{side}"], noise, self.sent_dtype)

    @property
    def sent_dtype(self) -> torch.dtype:
        """What :meth:`average` sends momenta in."""
        return sent_dtype(self.momenta.dtype, self.parameter.dtype)

    @property
    def can_discard(self) -> bool:
        """Whether there is a :meth:`snapshot` to go back to."""
        return bool(self._snapshot)

    def snapshot(self) -> None:
        """Keep what :meth:`discard` needs besides the look-ahead's copy."""
        kept = self.side if self.look_ahead else None
        self._snapshot = {side: self.state[f"momentum_{side}"].clone() for side in SIDES if side != kept}

    def discard(self) -> None:
        """Put the momentum back as it was after the last step."""
        if self.touched:
            if not self._snapshot:
                raise UserError(f"POETX: {self.name}: nothing to go back to; call snapshot() before the first backward")
            for side in SIDES:
                before = self._snapshot[side] if side in self._snapshot else self.before(side)
                self.state[f"momentum_{side}"].copy_(before)
                self.peaks[side].zero_()
            self._noise[1] = 0
        self.touched, self.micro_batches, self._snapshot = False, 0, {}

    # The step

    def with_gradient(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Momenta, flat, and peaks with the full gradient's share, without writing to the state."""
        if self.layer is not None or self.parameter.grad is None:
            return self.momenta, self.peaks
        momenta, peaks = self.momenta.clone(), {side: peak.clone() for side, peak in self.peaks.items()}
        self._add(momenta, peaks)
        return momenta, peaks

    def take_step(self, momenta: Tensor, E_KBB: Tensor, touched_K: Tensor, factor: float) -> None:
        """W ← (I + E)·W or W·(I + E), and all that goes with it, in one call: as before or stepped, never between.

        Args:
            momenta: with this step's gradients, flat. E_KBB: of the written side's blocks. touched_K: which of them
                move. factor: what the momentum decays by.
        """
        state, side, step = self.state, self.side, self.step + 1
        host = None if self.layer is None else self.layer.host
        W, shard = self._to_fold(side)
        own = local(self.parameter.detach())
        weight = torch.empty_like(W if shard is None else own, device=self.device)
        seed = self.noise_seed(f"rounding-{side}-0", step)
        folding = {"touched": touched_K, "scale": state["scale"], "seed": seed, "shard": shard}
        squares = fold_(self.matrices(W), E_KBB, side, self.matrices(weight), **folding)
        squares = shard_sum_(squares, self.parameter)
        found = self._norm(W, shard) if step == 1 else None  # held for good, so in float64 throughout
        growing = {"step": step, "growth": self.growth, "found": found}
        norms = norm_and_scale(squares, touched_K, state["norm"], state["scale"], **growing)
        sizes = [state[f"momentum_{side}"].numel() for side in SIDES]
        seeds = [self.noise_seed(f"momentum-{side}", step) for side in SIDES]
        new = decayed(momenta, sizes, step % 2 if self.look_ahead else None, factor, seeds)
        targets = [
            own,
            first_elements(self.momenta, new.numel()),
            first_elements(state["norm"], norms.numel()),
            state["step"],
        ]
        values = [weight, new, norms.flatten(), torch.tensor(step)]
        targets += [self.all_peaks, self._noise]
        # zeros that are there already, unless somebody may still read them when this returns
        values += [self._no_peaks if host is None else torch.zeros_like(self.all_peaks), self._seed(step)]
        self._taken = step  # known before the one call that makes it so, wherever an exception comes
        if host is None:
            copy_at_once_(targets, values)
        else:
            host.write(targets, values, self.device)
        self._counted, self.micro_batches, self._snapshot = step, 0, {}
        self.touched = False

    def stepped(self, weight: Tensor, step: int) -> None:
        """Count a step whose weight and state the kernels have written; a weight that was brought goes back."""
        torch.autograd.graph.increment_version(self.parameter)  # graphs from before it are stale
        self._taken = step
        counters, values = [self.state["step"]], [torch.tensor(step)]
        if self.rounds_momenta:
            counters, values = [*counters, self._noise], [*values, self._seed(step)]
        host = None if self.layer is None else self.layer.host
        if host is None:
            copy_at_once_(counters, values)
        else:
            host.write([self.parameter.detach(), *counters], [weight, *values], self.device)
        self._counted, self.micro_batches, self._snapshot = step, 0, {}
        self.touched = False

    def _to_fold(self, side: str) -> tuple[Tensor, Shard | None]:
        """The weight on the device of the step; where it is sharded, the rows that this rank's fold reads."""
        weight = self.parameter.detach()
        if is_sharded(weight):
            block_size = self.sizes(side)[1] if side == "out" else 1  # W·(I + E) mixes no rows
            W, begin = whole_blocks(weight, block_size)
            return W.to(self.device), Shard(weight.shape[0], own_rows(weight), begin)
        if self.layer is not None and self.layer.host is not None:
            weight = cast(HostWeight, self.layer.frozen_weight).brought()
        return weight, None

    def _norm(self, W: Tensor, shard: Shard | None) -> Tensor:
        """‖W‖ in float64 [e], of what :meth:`_to_fold` gave."""
        if shard is None:
            return torch.linalg.vector_norm(self.matrices(W), dim=(-2, -1), dtype=torch.float64)
        own = W[shard.own.start - shard.begin : shard.own.stop - shard.begin]
        square = torch.linalg.vector_norm(own, dtype=torch.float64).square()
        return shard_sum_(square.view(1), self.parameter).sqrt()


def first_elements(first: Tensor, number: int) -> Tensor:
    """``number`` elements from the first one of ``first`` on, which several views of one tensor share; flat, a view."""
    return first.as_strided((number,), (1,), first.storage_offset())


def _touch(matrix: weakref.ref[Matrix], anchor: Tensor) -> None:
    """Backward has added to a layer's momentum."""
    anchor.grad = None
    found = matrix()
    if found is not None:
        found.touched = True


def touched_blocks(directions: Tensor, peaks: Tensor) -> Tensor:
    """Which blocks [K] move: those with a gradient since the last step, and a direction to move along."""
    size = block_peaks(directions)
    return (peaks > size * _NEGLIGIBLE) & (size >= torch.finfo(directions.dtype).tiny)
