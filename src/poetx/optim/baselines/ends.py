"""AdamW for vectors, and SCALE's rule for embedding and head, whose state would else be larger than all rotations'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from poetx.distributed.sharded import refuse_sharded
from poetx.optim.baselines.base import matrix_shapes
from poetx.optim.baselines.normalized import Scale
from poetx.optim.baselines.rules import stored_as
from poetx.optim.build import build_optimizer
from poetx.optim.saved_kinds import Kind, Shapes, kind_of


class ScaledEnds(torch.optim.Optimizer):
    """SCALE (arXiv 2506.16659) on embedding and head, AdamW on the rest, in whatever groups both come.

    An embedding keeps nothing, a head one momentum. Their step is ``lr`` times a direction whose columns (an
    embedding's, over the vocabulary) or rows (a head's) have a root mean square of one. State is by parameter.

    Args:
        groups: parameter groups; :class:`poetx.POETX` hands out its own, which are kept as they are.
        ends: :class:`Scale`'s settings of the parameters that it steps, by their ids.
        ratio: of the rate of these to their groups'.
        rest: settings of AdamW, for :func:`poetx.optim.build_optimizer`; ``state_dtype`` is the head's momentum's, too.

    Raises:
        UserError: a sharded parameter, or what AdamW and SCALE refuse.
    """

    fresh_is_zero = False  # which of the two has a parameter is not seen from its twin

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        ends: Mapping[int, Mapping[str, Any]],
        rest: Mapping[str, Any],
        ratio: float = 1.0,
    ) -> None:
        self._ends = {key: {"state_dtype": stored_as(rest), **settings} for key, settings in ends.items()}
        self._ratio = ratio
        refuse_sharded((p for group in groups for p in group["params"]), "optimizer.name=scale")
        own, others = self._parted(groups)
        self._scale = Scale(own) if own else None
        self._rest = build_optimizer(others, "adamw", **rest) if others else None
        made = self._rest.defaults if self._rest is not None else {}
        super().__init__(list(groups), {"lr": rest.get("lr", 1e-3), "weight_decay": 0.0} | made | {"ends": "scale"})

    @property
    def kind(self) -> Kind:
        """What states it saves: those of AdamW, and a momentum."""
        of_rest = kind_of(self._rest)

        def shapes(parameter: Tensor) -> Shapes:
            more = of_rest.shapes(parameter) if of_rest is not None else {}
            return matrix_shapes(parameter, "momentum") | more

        return Kind("AdamW with ends by SCALE", "ends", shapes)

    def _parted(self, groups: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """What SCALE steps, a group each, and the groups of the rest."""
        own, others = [], []
        for group in groups:
            for parameter in group["params"]:
                if (settings := self._ends.get(id(parameter))) is not None:
                    rate = {"lr": group["lr"] * self._ratio} if "lr" in group else {}
                    decay = {"weight_decay": group.get("weight_decay", 0.0)}
                    own.append({"params": [parameter], "over": 1, "momentum": 0.0} | rate | decay | dict(settings))
            if left := [p for p in group["params"] if id(p) not in self._ends]:
                others.append({key: value for key, value in group.items() if key != "ends"} | {"params": left})
        return own, others

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Released gradients replace param_groups while they step one parameter.
        for optimizer, groups in zip((self._scale, self._rest), self._parted(self.param_groups), strict=True):
            if optimizer is not None and groups:
                optimizer.param_groups, optimizer.state = groups, self.state
                optimizer.step()
        return loss
