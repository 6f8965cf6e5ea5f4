"""POETX: maps near the identity folded into the weight at every step, on converted layers or on an ordinary model.

Folding at every step (T_m = 1) makes the rotations the identity whenever forward runs, so a layer stays a plain
matrix product and only the step is special. For W ← R·W·P with R = G(Q_out), P = G(Q_in), the gradients at Q = 0 are
``2 (M − Mᵀ)`` with M_out = dW·Wᵀ and M_in = Wᵀ·dW, restricted to blocks, so a block-diagonal momentum of b(m+n)/2
numbers stands where AdamW keeps 2mn. The fold is the exact Cayley transform in float32, and ‖W‖ is held (method,
sections 4 and 7). Maps I + E that need not be rotations, the default, have the gradients M, of twice as many numbers.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from poetx.distributed.checksum import check_alike
from poetx.distributed.ranks import maximum_, on_any_rank, rank_count
from poetx.distributed.sharded import is_sharded
from poetx.errors import UserError, nearest
from poetx.layers.walk import single_step_layers
from poetx.one_rate import OneRate
from poetx.optim.gradient_release import hand_over_gradient
from poetx.optim.saved_kinds import check_saved, kind_of
from poetx.optim.settings import check_numbers
from poetx.optim.single_step import model_zero_grad
from poetx.optim.single_step.given import check_dense, check_groups, read_model, refuse_sharded_since, refuse_tied
from poetx.optim.single_step.matrix import Matrix
from poetx.optim.single_step.saved_state import current_entries, state_from_groups, state_into_groups
from poetx.optim.single_step.together import batches
from poetx.optim.single_step.turn import Ahead
from poetx.optimizer_restart import fresh_is_zero

#: Steps between comparisons of the rotated matrices over the ranks of a process group.
_CHECK_EVERY = 100


class POETX(torch.optim.Optimizer):
    """Rotates matrices by a small angle at every step, and trains everything else with AdamW, in one optimizer.

    The optimizer of ``method="single-step"``, and of plain models; ``method="poet-x"`` takes any optimizer and
    :func:`poetx.merge_every`. What it keeps of a matrix: :class:`poetx.optim.single_step.matrix.Matrix`.

    Args:
        model: a model converted with ``PoetConfig(method="single-step")``, whose layers feed the momentum in backward
            and decide block_size, update, momentum_dtype and seed, each for itself; or an ordinary model, whose
            ``nn.Linear`` and ``Conv1D`` weights are rotated from their full gradients, by the rules of
            :func:`poetx.convert_`; or parameter groups, of which those with ``"rotate": True`` hold matrices [m, n], or
            stacks of them [e, m, n]; or parameters, with or without names.
        lr: of the rest; None: the dense optimizer's own, 1e-3 without one.
        angle: radians that a step turns each plane of a written block by, half: Q = −angle · direction. It is the
            ``lr`` of the rotated group, so learning-rate schedulers scale it; those that set rates (``OneCycleLR``,
            ``CyclicLR``) take a list, one for each group, or the angle becomes the others' rate.
        block_size: b, 256 unless the layers say; a side shorter than b is one block.
        update: ``"free"``, any map near the identity, with ‖W‖ held, unless the layers say; or ``"rotation"``, with
            half the momentum, which keeps the singular values.
        norm_growth: g lets ‖W‖² grow by g times its first value a step, as it does under additive optimizers. 0: held.
            With ``"rotation"`` all singular values grow by the same factor.
        momentum: of the rotated matrices, by group.
        nesterov: likewise.
        momentum_dtype: ``"float32"`` or ``"bfloat16"``, which is rounded stochastically.
        release_gradients: of an ordinary model: drop each matrix's gradient as soon as backward has it; clipping does
            not see it.
        weight_decay: of the matrices of the rest; None: the dense optimizer's own, 0 without one.
        dense_optimizer: makes the optimizer of the rest from parameter groups, instead of AdamW; what it sets itself
            holds where neither a group nor an argument here says otherwise. Its state must be by parameter.
        target_modules: as in :class:`poetx.PoetConfig`; with an ordinary model only.
        exclude_modules: likewise.
        seed: of the rounding of bfloat16 weights and momenta.

    A matrix that got no gradient since the last step, on any rank, stays as it is, and so does a block of one; a matrix
    of zeros is left to the dense optimizer. ‖W‖ is held as it is at the first step, or as it was written from outside
    since the last one, in whatever way; a change of less than 1 % counts as the same weight put back, and is undone.
    Converted layers feed the momentum while a plain backward runs (``inputs=`` leaves them out): gradient clipping does
    not reach it (the direction does not depend on its size), and a gradient that is not finite counts as zero. In a
    process group their momenta are averaged over the ranks, once a step, and every 100 steps a checksum tells whether
    all ranks hold the same matrices. Layers may be sharded by ``fully_shard`` before the optimizer is built: each rank
    folds its own rows and sends those of blocks that straddle ranks, none where the ranks' rows are whole blocks. An
    exception inside :meth:`step` leaves each matrix as before or stepped; its ``step`` in the state says which.

    To skip a step call :meth:`snapshot` before its backward, and after it :meth:`discard` or ``zero_grad()``: without a
    snapshot that cannot take back what backward has added to the momentum of converted layers, or of released
    gradients, and warns.

    Raises:
        UserError: a value outside its range, nothing to rotate, a float16 matrix, a sharded one without a layer, layers
            that another POETX trains or that are of ``method="poet-x"``, a gradient scaler, a group added later.
    """

    _step_supports_amp_scaling = True  # so that a gradient scaler shows itself to step(), which refuses it

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        lr: float | None = None,
        *,
        angle: float = 0.012,
        block_size: int | None = None,
        update: str | None = None,
        norm_growth: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        momentum_dtype: str | None = None,
        release_gradients: bool = False,
        weight_decay: float | None = None,
        dense_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
        target_modules: str | tuple[str, ...] = "all-linear",
        exclude_modules: str | tuple[str, ...] = ("lm_head",),
        seed: int | None = None,
        **older: Any,
    ) -> None:
        update, dense_optimizer = _older_arguments(older, update, dense_optimizer)
        if not (dense_optimizer is None or callable(dense_optimizer)):
            raise UserError(
                f"POETX: dense_optimizer={dense_optimizer!r}: must be a function that makes an optimizer of parameter "
                "groups, such as torch.optim.AdamW"
            )
        numbers = {"lr": lr, "angle": angle, "momentum": momentum, "norm_growth": norm_growth}
        check_numbers(numbers | {"weight_decay": weight_decay})
        settings = {"block_size": block_size, "update": update, "rotation_dtype": momentum_dtype, "seed": seed}
        modules = {"target_modules": target_modules, "exclude_modules": exclude_modules}
        given = read_model(model, settings, modules, angle, weight_decay)
        check_groups(given.groups, given.layers, own_optimizer=dense_optimizer is not None)
        lr = 1e-3 if lr is None and dense_optimizer is None else lr
        for group in given.groups:
            if group.get("rotate"):
                group.setdefault("lr", angle)
                group.setdefault("momentum", momentum)
            elif lr is not None:
                group.setdefault("lr", lr)
        self._unchecked = 0
        self._ahead = Ahead()
        self._model = weakref.ref(model) if isinstance(model, nn.Module) else lambda: None
        self._matrices: list[Matrix] | None = None
        self._dense: torch.optim.Optimizer | None = None
        self._make_dense = dense_optimizer or functools.partial(torch.optim.AdamW, weight_decay=weight_decay or 0.0)
        super().__init__(given.groups, {"rotate": False})
        self.defaults |= {"momentum": momentum, "lr": angle if lr is None else lr}  # schedulers ask for them here
        rotated = [p for group in self.param_groups if group["rotate"] for p in group["params"]]
        self._matrices = [
            Matrix(
                p,
                index=index,
                name=given.names.get(p, f"rotated parameter {index} {tuple(p.shape)}"),
                config=layer.config if layer else given.config,
                look_ahead=nesterov,
                growth=norm_growth,
                layer=layer,
                transposed=p in given.transposed,
            )
            for index, p in enumerate(rotated)
            for layer in [given.layers.get(p)]
        ]
        for matrix in self._matrices:
            if matrix.layer is not None:
                matrix.take_gradients_of_other_terms()
            elif release_gradients:
                matrix.handle = hand_over_gradient(matrix.parameter, matrix.released)
            self.state[matrix.parameter] = matrix.fresh_state()
            matrix.attach(self.state[matrix.parameter])
        self._share()
        if isinstance(model, nn.Module):
            model_zero_grad.put_on(model, self._drop_gradients)
        self._rate = OneRate(*self._parted(), "the rotated matrices, their angle,")

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The rotated parameters."""
        return tuple(self._matrices or ())

    def _parted(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The groups that are rotated, and the others."""
        rotated = [group for group in self.param_groups if group["rotate"]]
        return rotated, [group for group in self.param_groups if not group["rotate"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._matrices is not None:
            raise UserError("POETX: groups cannot be added later; give all of them when it is built")
        super().add_param_group(param_group)

    def __reduce__(self) -> Any:
        raise UserError(
            "POETX cannot be copied or pickled: its layers feed one optimizer; save its state_dict(), and keep it out "
            "of a module that is copied (make it in configure_optimizers, say)"
        )

    def _share(self) -> None:
        """Let the dense optimizer hold the groups that are not rotated and the state, as objects, not as copies."""
        rest = [group for group in self.param_groups if not group["rotate"]]
        if rest and self._dense is None:
            self._dense = self._make_dense(rest)
            check_dense(self._dense, rest)
            made = {id(p): group for group in self._dense.param_groups for p in group["params"]}
            for group in rest:  # its own settings, where it did not write them into the group itself
                group |= made[id(group["params"][0])] | group if group["params"] else {}
        if self._dense is not None:
            self._dense.param_groups, self._dense.state = rest, self.state

    @property
    def dense_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer of what is not rotated, for hooks; :meth:`step` steps it."""
        return self._dense

    @property
    def base(self) -> torch.optim.Optimizer | None:
        """Older name of :attr:`dense_optimizer`."""
        return self._dense

    def close(self) -> None:
        """Let go of the model, for another optimizer: gradients are no longer released, and converted layers feed none.

        An optimizer of an ordinary model that is deleted lets go by itself.
        """
        self._ahead = Ahead()
        for matrix in self._matrices or ():
            matrix.release()
            if matrix.layer is not None and matrix.layer.trainer is not None and matrix.layer.trainer() is matrix:
                matrix.layer.momentum = matrix.layer.trainer = None
        if (model := self._model()) is not None:
            model_zero_grad.take_off(model, self._drop_gradients)

    def plain_state_dict(self) -> dict[str, Any]:
        """All state under ``"state"``, as in torch."""
        self._settle()
        return super().state_dict()

    def state_dict(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As in torch, but the state of weights that require no gradient is in their group, ``"rotations"``, by name.

        ``torch.distributed.checkpoint.state_dict`` restores it from there. Before the first step the dense optimizer's
        state is made, if zeros are its beginning, so that there is something to load into.
        """
        self._start_dense()
        plain = self.plain_state_dict()
        groups = zip(plain["param_groups"], self.param_groups, self._names(), strict=True)
        frozen = [
            {
                index: name
                for index, p, name in zip(saved["params"], group["params"], names, strict=True)
                if group["rotate"] and not p.requires_grad
            }
            for saved, group, names in groups
        ]
        return state_into_groups(plain, frozen)

    def _names(self) -> list[list[str]]:
        """Names of the parameters of every group; numbers of those that are not rotated."""
        of = {matrix.parameter: matrix.name for matrix in self._matrices or ()}
        return [[of.get(p, str(i)) for i, p in enumerate(group["params"])] for group in self.param_groups]

    def _start_dense(self) -> None:
        """Make the dense optimizer's state as it is before its first step."""
        if self._dense is None or not fresh_is_zero(self._dense) or any(m.step for m in self._matrices or ()):
            return
        for group in self._dense.param_groups:
            for p in group["params"]:
                if p.requires_grad and not self.state.get(p):
                    twin = torch.zeros_like(p.detach(), requires_grad=True)
                    twin.grad = torch.zeros_like(twin)
                    made = self._make_dense([{**group, "params": [twin]}])
                    made.step()
                    self.state[p] = {
                        key: value.zero_() if isinstance(value, Tensor) else type(value)(0)
                        for key, value in made.state[twin].items()
                    }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; every tensor keeps its dtype, where torch would cast it to the weight's.

        Raises:
            UserError: it was saved by another optimizer or dense optimizer, with momenta of other shapes or another
                dtype, or lacks what was saved.
        """
        assert self._matrices is not None
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if group["rotate"] != saved.get("rotate"):
                raise UserError(
                    "POETX: this state was saved by another optimizer, or with other matrices rotated; build the one "
                    "that saved it, or start anew"
                )
        state_dict = state_from_groups(state_dict, self._names())
        dense = kind_of(self._dense)
        check_saved(state_dict, [(None if g["rotate"] else dense, g) for g in self.param_groups], "POETX")
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        index_of = dict(zip((p for group in self.param_groups for p in group["params"]), saved, strict=False))
        # Before anything is replaced: a state that does not fit must leave this one as it was.
        states = {}
        for matrix in self._matrices:
            matrix.check_attached()
            fresh, entries = matrix.fresh_state("meta"), state_dict["state"].get(index_of.get(matrix.parameter), {})
            if entries:  # older versions had none before the first gradient
                states[matrix.index] = current_entries(entries, fresh, matrix.name)
        super().load_state_dict(state_dict)
        for p, index in index_of.items():
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and key != "step":
                    self.state[p][key] = value.to(p.device, copy=True)
        for matrix in self._matrices:
            self.state[matrix.parameter] = state = matrix.fresh_state()
            matrix.attach(state, states.get(matrix.index, {}))
        for group in self.param_groups:
            if group["rotate"]:
                group.setdefault("momentum", self.defaults["momentum"])
        self._share()

    @torch.no_grad()
    def snapshot(self) -> None:
        """Make :meth:`discard` possible until the next step; call it before the step's first backward.

        It keeps the momentum that converted layers and released gradients are added to, without what the look-ahead
        keeps anyway: half of it.
        """
        self._settle()
        for matrix in self._matrices or ():
            if matrix.layer is not None or matrix.handle is not None:
                matrix.snapshot()

    @torch.no_grad()
    def discard(self) -> None:
        """Forget all gradients since the last step, to the bit: those of a step that is skipped.

        Raises:
            UserError: a momentum holds some, and there is no :meth:`snapshot`.
        """
        self._ahead = Ahead()
        for matrix in self._matrices or ():
            matrix.discard()
        super().zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; after :meth:`snapshot` as :meth:`discard`. Without, a warning tells what stays.

        The model's own ``zero_grad`` does the same.
        """
        self._drop_gradients()
        super().zero_grad(set_to_none)

    def _drop_gradients(self) -> None:
        left = [matrix for matrix in self._matrices or () if matrix.touched and matrix.moves]
        if left and all(matrix.can_discard for matrix in left):
            self.discard()
        elif left:
            warnings.warn(
                f"POETX: zero_grad() before step() leaves the gradient of {len(left)} matrices, {left[0].name} among "
                "them, in their momentum, where backward has added it; call snapshot() before a backward that is to be "
                "dropped (the generator's through a discriminator, a skipped step), or requires_grad_(False) on the "
                "layers for it",
                stacklevel=3,
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step. A closure is called once, before it, and its loss returned. Gradient scalers are refused."""
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            raise UserError("POETX does not work with a gradient scaler; train in bfloat16, which needs none")
        for matrix in self._matrices or ():
            if matrix.layer is not None and matrix.layer.made_dense:
                raise UserError(
                    f"POETX: {matrix.name} was made dense by to_dense_; build a new optimizer for the model"
                )
        for group in self.param_groups:
            if group["rotate"] and not 0 <= group["lr"] < 0.5:
                raise UserError(
                    f"POETX: lr={float(group['lr']):g} of the rotated group is its angle, between 0 and 0.5; give a "
                    "scheduler that sets rates, such as OneCycleLR, one for each group"
                )
        self._rate.check(*self._parted())
        if self._unchecked == 0 and (model := self._model()) is not None:
            refuse_tied(model, dict(single_step_layers(model)))
            refuse_sharded_since(model, self.param_groups)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ahead, self._ahead = self._ahead, Ahead()
        if self._dense is not None:  # first: what it refuses is said before a matrix has turned
            self._dense.step()
        try:
            for angle, momentum, moving in self._moving():
                for batch in batches(moving):
                    ahead.take_(batch, angle, momentum)
        finally:
            self._settle()
        self._unchecked += 1
        if self._unchecked == _CHECK_EVERY:
            self._unchecked = 0
            # Of a sharded matrix no two ranks have the same rows, but all turn them by the same momentum.
            tensors = (m.state["momentum_in"] if is_sharded(m.parameter) else m.parameter for m in self._matrices or ())
            names = (m.name for m in self._matrices or ())
            dense = (p for group in self._parted()[1] for p in group["params"])
            rest = ((f"dense parameter {index} {tuple(p.shape)}", p) for index, p in enumerate(dense))
            check_alike([*zip(names, tensors, strict=True), *rest], f"after {_CHECK_EVERY} more steps")
        return loss

    def _settle(self) -> None:
        """Wait for weights and states that are on their way to host memory; after a step there are none.

        Whoever interrupts that wait itself may leave some, so that it comes again before a state is read.
        """
        for matrix in self._matrices or ():
            if matrix.layer is not None and matrix.layer.host is not None:
                matrix.layer.host.settle()

    @torch.no_grad()
    def prepare(self) -> None:
        """Do of the next :meth:`step` what writes nothing, for a caller that is about to wait for a number (the loss).

        A GPU then computes while the host waits, and the host has less to do afterwards. Of converted layers in one
        process; anything else is left to the step. Gradients, rates or states that change until then undo it.
        """
        self._ahead = Ahead()
        if rank_count() > 1:  # whose gradients are averaged first
            return
        for angle, momentum, moving in self._moving():
            self._ahead.prepare(moving, angle, momentum)

    def _moving(self) -> Iterator[tuple[float, float, list[Matrix]]]:
        """Of every rotated group: angle, momentum, and the matrices that got a gradient on any rank, and its mean.

        Without a gradient nothing moves and nothing is counted, as in any optimizer of torch: the stale momentum would
        turn by the full angle.
        """
        assert self._matrices is not None
        moves = [matrix.moves for matrix in self._matrices]
        local = [i for i, m in enumerate(self._matrices) if m.layer is not None or m.handle is not None]
        if local and rank_count() > 1:
            flags = on_any_rank([moves[i] for i in local], self._matrices[local[0]].device)
            for i, flag in zip(local, flags, strict=True):
                moves[i] = flag
                if flag:
                    self._matrices[i].average()
            maximum_([peak for i in local if moves[i] for peak in self._matrices[i].peaks.values()])
        matrices = zip(self._matrices, moves, strict=True)
        for group in self.param_groups:
            if group["rotate"]:
                here = [next(matrices) for _ in group["params"]]
                yield group["lr"], group["momentum"], [matrix for matrix, moves in here if moves]


def _older_arguments(older: dict[str, Any], update: str | None, dense_optimizer: Any) -> tuple[str | None, Any]:
    """Arguments under the names of older versions. Raises :class:`UserError` where one is given under two names."""
    older = {name: value for name, value in older.items() if value is not None}
    new = {"update": update, "dense_optimizer": dense_optimizer}
    renamed = {"spectrum": "update", "base": "dense_optimizer", "betas": "dense_optimizer", "eps": "dense_optimizer"}
    for old, name in renamed.items():
        if old in older and (new[name] is not None or (old in ("betas", "eps") and "base" in older)):
            raise UserError(f"POETX: {old} and {name} are both given, and one would undo the other; give {name} alone")
    if "spectrum" in older:
        update = {"fixed": "rotation"}.get(older["spectrum"], older["spectrum"])
    if "base" in older:
        dense_optimizer = older["base"]
    elif "betas" in older or "eps" in older:
        options = {name: older[name] for name in ("betas", "eps") if name in older}
        dense_optimizer = functools.partial(torch.optim.AdamW, weight_decay=0.0, **options)
    for old, name in renamed.items():
        if older.pop(old, None) is not None:
            warnings.warn(f"POETX: {old} is {name} now", DeprecationWarning, stacklevel=3)
    if older.get("partitions") == 1:
        del older["partitions"]
    gone = {
        "partitions": "one contiguous partition is all there is; a larger block_size did better at equal state",
        "partition_kind": "one contiguous partition is all there is",
        "resample_every": "one contiguous partition is all there is",
        "rule": "the orthogonalized momentum is all there is",
        "alternate": "sides are written in turn",
    }
    for name, value in older.items():
        if name not in gone:
            guess = nearest(name, inspect.signature(POETX).parameters)
            raise TypeError(f"POETX() got an unexpected keyword argument {name!r}{guess}")
        raise UserError(f"POETX: {name}={value!r} is gone: {gone[name]}; leave it out")
    return update, dense_optimizer
