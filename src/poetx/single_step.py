"""POETX: rotations folded into the weight at every step, as an optimizer for ordinary, unconverted models.

Folding at every step (T_m = 1) makes the rotations the identity whenever forward runs, so a layer stays a plain
matrix product and only the step is special. For W ← R·W·P with R = G(Q_out), P = G(Q_in), the gradients at Q = 0 are

    M_out = dW·Wᵀ,  M_in = Wᵀ·dW  (restricted to blocks),   ∂L/∂Q = 2 (M − Mᵀ)

so a block-diagonal momentum of b(m+n)/2 numbers stands where AdamW keeps 2mn. The fold is the exact Cayley transform
in float32, and ‖W‖ is held (method, sections 4 and 7).

With blocks smaller than the layer, one partition of the coordinates mixes only what shares a block. Several fixed
partitions, each with its own momentum, are updated at every step and written one (side, partition) at a time, in turn.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from poetx.config import PoetConfig
from poetx.convert import find_targets
from poetx.errors import UserError, nearest
from poetx.layer import stream
from poetx.ops.cayley import pack_skew, packed_size, unpack_skew
from poetx.ops.fold import full_precision_products, left_rotate, stochastic_round_
from poetx.ops.rotate import add_block_outer_

RULES = ("ortho", "adam")
# Five steps of the quintic Newton-Schulz iteration with the coefficients of Muon (Jordan et al. 2024): every singular
# value ends near 1, between 0.7 and 1.2. Odd polynomials of a skew-symmetric matrix are skew-symmetric.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class _Move(NamedTuple):
    """One (side, partition) of one matrix: where its momentum is, and which coordinates its blocks hold."""

    side: str  # "in": columns of the matrix, "out": rows
    index: int
    size: int
    block_size: int

    @property
    def key(self) -> str:
        return f"{self.side}_{self.index}"


def orthogonalise(X_KBB: Tensor) -> Tensor:
    """The nearest skew-symmetric orthogonal-like matrices: five Newton–Schulz steps, antisymmetrised again."""
    a, b, c = _NEWTON_SCHULZ
    X = X_KBB / X_KBB.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    for _ in range(5):
        A = torch.bmm(X, X.transpose(1, 2))
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X - X.transpose(1, 2)) / 2


def partition(kind: str, index: int, size: int, block_size: int, *, seed: int, name: str, draw: int) -> Tensor:
    """Order of the coordinates [size], int64; blocks are ``block_size`` neighbours in it, the last one shorter.

    ``"structured"``: partition 0 is contiguous, 1 is strided (coordinates k, k + r, k + 2r, … for r blocks), further
    ones are random. ``"random"``: all are, from (seed, name, index, draw).

    With a contiguous and a strided partition and b ≥ r, any two coordinates are connected through at most two blocks.
    """
    blocks = -(-size // block_size)
    coordinates = torch.arange(size)
    if kind == "structured" and index == 0:
        return coordinates
    if kind == "structured" and index == 1:
        return torch.cat([coordinates[start::blocks] for start in range(blocks)])
    return torch.randperm(size, generator=stream(seed, name, draw, f"partition-{index}"), device="cpu")


class POETX(torch.optim.Optimizer):
    """Rotates the matrices of an ordinary model and trains everything else with AdamW, in one optimizer.

    Args:
        model: a model (its ``nn.Linear`` and ``Conv1D`` weights are rotated, by the rules of :func:`poetx.convert_`),
            or parameter groups, of which those with ``"rotate": True`` hold matrices [m, n], or stacks of them
            [e, m, n], and have ``lr`` as their angle.
        lr: of AdamW on the rest.
        angle: radians that a step turns each plane of a written block by, half: Q = −angle · direction. It is the
            ``lr`` of the rotated group, so learning-rate schedulers scale it.
        block_size: b; a side shorter than b is one block.
        partitions: how many of them each side has. ``partition_kind``: ``"structured"`` or ``"random"``.
        resample_every: draw random partitions anew after so many steps, with their momentum reset. None: never.
        rule: ``"ortho"`` (orthogonalised Nesterov momentum) or ``"adam"`` (elementwise).
        alternate: write one (side, partition) a step, in turn. False: all of them at every step.
        momentum: of ``"ortho"``. betas, eps, weight_decay: of AdamW, and betas and eps of ``"adam"``.
        target_modules, exclude_modules: as in :class:`poetx.PoetConfig`; with a model only.
        seed: of the partitions and of the rounding of bfloat16 weights.

    State: ``b(m+n)/2`` float32 numbers a partition for a matrix (twice that for ``"adam"``).

    Raises:
        UserError: a value outside its range, nothing to rotate, or a float16 matrix.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        angle: float = 0.012,
        block_size: int = 256,
        partitions: int = 2,
        partition_kind: str = "structured",
        resample_every: int | None = None,
        rule: str = "ortho",
        alternate: bool = True,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        target_modules: str | tuple[str, ...] = "all-linear",
        exclude_modules: str | tuple[str, ...] = ("lm_head",),
        seed: int = 0,
    ) -> None:
        for name, value, choices in (
            ("rule", rule, RULES),
            ("partition_kind", partition_kind, ("structured", "random")),
        ):
            if value not in choices:
                raise UserError(f"{name}={value!r}: must be one of {', '.join(choices)}{nearest(str(value), choices)}")
        for name, value in (("partitions", partitions), ("resample_every", resample_every)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UserError(f"{name}={value!r}: must be a whole number of at least 1")
        if resample_every is not None and partition_kind != "random":
            raise UserError("resample_every: structured partitions are fixed; use partition_kind='random' with it")
        if not 0 <= momentum < 1:
            raise UserError(f"momentum={momentum!r}: must be at least 0 and below 1")
        if not 0 < angle < 0.5:
            raise UserError(f"angle={angle!r}: radians a step, between 0 and 0.5 (0.012 is usual)")
        config = PoetConfig(
            block_size=block_size, target_modules=target_modules, exclude_modules=exclude_modules, seed=seed
        )
        self._rule, self._alternate, self._momentum = rule, alternate, momentum
        self._partitions, self._kind, self._resample = partitions, partition_kind, resample_every
        self._block_size, self._seed = block_size, seed
        groups = _model_groups(model, config, angle) if isinstance(model, nn.Module) else list(model)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rotate": False}
        super().__init__(groups, defaults)
        if not any(group["rotate"] for group in self.param_groups):
            raise UserError("POETX: no group has 'rotate': True, so nothing would be rotated; use torch.optim.AdamW")
        for group in self.param_groups:
            for p in group["params"] if group["rotate"] else ():
                if p.ndim not in (2, 3) or p.dtype not in (torch.float32, torch.bfloat16, torch.float64):
                    raise UserError(
                        f"POETX: cannot rotate a parameter of shape {tuple(p.shape)} and {p.dtype}; matrices (or "
                        "stacks of them) in float32 or bfloat16 only"
                    )
        self._share()

    def _share(self) -> None:
        """AdamW over the other groups, with these very groups and this very state."""
        rest = [group for group in self.param_groups if not group["rotate"]]
        self._adamw = torch.optim.AdamW(rest) if rest else None
        if self._adamw is not None:
            self._adamw.param_groups, self._adamw.state = rest, self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; momentum keeps its float32, where torch would cast it to the weight's dtype."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, params, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point() and key != "step":
                    self.state[p][key] = value.to(p.device, copy=True)
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step. Closures are refused: a fold cannot be taken back."""
        if closure is not None:
            raise UserError("POETX.step() takes no closure: it would have to undo a fold to evaluate twice")
        if self._adamw is not None:
            self._adamw.step()
        number = 0
        for group in self.param_groups:
            if not group["rotate"]:
                continue
            names = {p: f"{number + i}" for i, p in enumerate(group["params"])}
            number += len(names)
            self._rotate(group, names)

    def _rotate(self, group: dict[str, Any], names: dict[Tensor, str]) -> None:
        moving = [p for p in group["params"] if p.grad is not None]
        for p in moving:
            self._begin(p)
            for move in self._moves(p):
                self._accumulate(p, move, self._order(p, move, names[p]), group["betas"])
        turns = list(range(2 * self._partitions))
        for turn in turns:
            written: dict[int, list[tuple[Tensor, _Move]]] = {}
            for p in moving:
                if self._alternate and turn != (self.state[p]["step"] - 1) % len(turns):
                    continue
                move = self._moves(p)[turn]
                written.setdefault(move.block_size, []).append((p, move))
            for block_size, entries in written.items():
                self._write(entries, block_size, group, names)

    def _moves(self, p: Tensor) -> list[_Move]:
        m, n = p.shape[-2:]
        return [
            _Move(side, index, size, min(self._block_size, size))
            for index in range(self._partitions)
            for side, size in (("in", n), ("out", m))
        ]

    def _order(self, p: Tensor, move: _Move, name: str) -> Tensor:
        step = self.state[p]["step"] - 1
        draw = step // self._resample if self._resample else 0
        order = partition(
            self._kind, move.index, move.size, move.block_size, seed=self._seed, name=f"{name}/{move.side}", draw=draw
        )
        return order.to(p.device)

    def _begin(self, p: Tensor) -> None:
        state = self.state[p]
        dtype = torch.promote_types(p.dtype, torch.float32)
        if not state:
            state["step"] = 0
            state["norm"] = torch.linalg.vector_norm(p, dim=(-2, -1), dtype=torch.float64)
            for move in self._moves(p):
                blocks = -(-move.size // move.block_size) * _matrices(p).shape[0]
                shape = (blocks, packed_size(move.block_size))
                state[move.key] = torch.zeros(shape, dtype=dtype, device=p.device)
                if self._rule == "adam":
                    state[f"{move.key}_square"] = torch.zeros(shape, dtype=dtype, device=p.device)
        elif self._resample and state["step"] % self._resample == 0:
            for move in self._moves(p):
                state[move.key].zero_()
                if self._rule == "adam":
                    state[f"{move.key}_square"].zero_()
        state["step"] += 1

    def _accumulate(self, p: Tensor, move: _Move, order: Tensor, betas: tuple[float, float]) -> None:
        """Add this step's skew gradient to the momentum of one (side, partition)."""
        state = self.state[p]
        assert p.grad is not None
        gradient = torch.cat(
            [
                skew_gradient(W, dW, move.side, order, move.block_size)
                for W, dW in zip(_matrices(p), _matrices(p.grad), strict=True)
            ]
        )
        beta = self._momentum if self._rule == "ortho" else betas[0]
        state[move.key].lerp_(gradient, 1 - beta)
        if self._rule == "ortho":
            state["last_" + move.key] = gradient  # Nesterov looks one gradient ahead; dropped when written
        else:
            state[f"{move.key}_square"].lerp_(gradient.square(), 1 - betas[1])

    def _directions(self, entries: list[tuple[Tensor, _Move]], block_size: int, group: dict[str, Any]) -> list[Tensor]:
        """Q of every entry [K, B, B]: all blocks of one size go through one batched iteration."""
        if self._rule == "ortho":
            ahead = [
                self.state[p][mv.key].lerp(self.state[p]["last_" + mv.key], 1 - self._momentum) for p, mv in entries
            ]
            Q = orthogonalise(torch.cat([unpack_skew(q, 0, block_size) for q in ahead]))
        else:
            ahead = [self._adam_direction(self.state[p], mv, group) for p, mv in entries]
            Q = torch.cat([unpack_skew(q, 0, block_size) for q in ahead])
        return list(Q.mul_(-group["lr"]).split([q.shape[0] for q in ahead]))

    def _adam_direction(self, state: dict[str, Any], move: _Move, group: dict[str, Any]) -> Tensor:
        steps = (state["step"] - 1) % self._resample + 1 if self._resample else state["step"]
        first, second = (1 - beta**steps for beta in group["betas"])
        return (state[move.key] / first) / ((state[f"{move.key}_square"] / second).sqrt() + group["eps"])

    def _write(
        self, entries: list[tuple[Tensor, _Move]], block_size: int, group: dict[str, Any], names: dict[Tensor, str]
    ) -> None:
        for (p, move), Q in zip(entries, self._directions(entries, block_size, group), strict=True):
            state, name = self.state[p], names[p]
            order = self._order(p, move, name)
            noise = stream(self._seed, name, state["step"], f"rounding-{move.key}", p.device)
            matrices = _matrices(p)
            for W, norm, Q_KBB in zip(matrices, state["norm"].reshape(-1), Q.chunk(matrices.shape[0]), strict=True):
                stochastic_round_(W, turned(W, Q_KBB, move.side, order, norm=norm), noise)
            for key in [key for key in state if key.startswith("last_")]:
                if self._alternate or key == "last_" + move.key:
                    del state[key]


def _model_groups(model: nn.Module, config: PoetConfig, angle: float) -> list[dict[str, Any]]:
    rotated = [module.weight for module in find_targets(model, config).layers.values()]
    ids = {id(p) for p in rotated}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    groups: list[dict[str, Any]] = [{"name": "rotated", "params": rotated, "lr": angle, "rotate": True}]
    groups.append({"name": "decay", "params": [p for p in rest if p.ndim >= 2]})
    groups.append({"name": "no_decay", "params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _matrices(p: Tensor) -> Tensor:
    """[m, n] as a stack of one; a stack as it is."""
    return p.unsqueeze(0) if p.ndim == 2 else p


def skew_gradient(W: Tensor, dW: Tensor, side: str, order: Tensor, block_size: int) -> Tensor:
    """∂L/∂q at Q = 0, packed [K, P], from a weight [m, n] and its gradient: ``2 (M − Mᵀ)`` above the diagonal.

    ``side="out"``: M = dW·Wᵀ for W ← R·W. ``side="in"``: M = Wᵀ·dW for W ← W·P. Accumulated in float32 (float64 for
    float64) before antisymmetrising.
    """
    first, second = (W, dW) if side == "in" else (dW.T, W.T)
    size = first.shape[1]
    blocks = -(-size // block_size)
    dtype = torch.promote_types(W.dtype, torch.float32)
    M = torch.zeros(blocks, block_size, block_size, dtype=dtype, device=W.device)
    with full_precision_products():
        add_block_outer_(M, first.index_select(1, order), second.index_select(1, order))
    return pack_skew(M, size).mul_(2)


def turned(W: Tensor, Q_KBB: Tensor, side: str, order: Tensor, *, norm: Tensor | None = None) -> Tensor:
    """``R·W`` (``side="out"``) or ``W·P`` (``"in"``) with the exact Cayley transform of Q, float32 or float64.

    Scaled to Frobenius norm ``norm`` where that is given.
    """
    dtype = torch.promote_types(W.dtype, torch.float32)
    Q = Q_KBB.to(dtype)
    identity = torch.eye(Q.shape[-1], dtype=dtype, device=Q.device)
    with full_precision_products():
        E = torch.linalg.solve(identity - Q, 2 * Q)
        rows = W.to(dtype) if side == "out" else W.to(dtype).T
        moved = left_rotate(rows.index_select(0, order), E.transpose(1, 2) if side == "out" else E)
    result = torch.empty_like(rows)
    result[order] = moved
    if norm is not None:
        now = torch.linalg.vector_norm(result, dtype=torch.float64)
        result *= torch.where(now > 0, norm / now, 1.0)
    return result if side == "out" else result.T
