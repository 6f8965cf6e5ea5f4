"""On which matrices of a model each rival runs, with which settings; AdamW takes the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from poetx.errors import UserError
from poetx.optim.baselines.hyperball import MuonHyperball
from poetx.optim.baselines.low_rank import Apollo, GaLore
from poetx.optim.baselines.muon import Muon
from poetx.optim.baselines.normalized import RACS, RMNP, Scale, SinkGD
from poetx.optim.build import build_optimizer
from poetx.optim.combined import CombinedOptimizer
from poetx.optim.settings import LOW_RANK
from poetx.targets import has_values

Groups = list[dict[str, Any]]


class Rule(NamedTuple):
    """A rival: its name for people, what makes it of parameter groups, its usual rate, and which ends it takes.

    Attributes:
        lr: None: that of everything else, whose size its steps have. SinkGD's is our choice (1e-3 is told beside its
            scale of 0.05, which moves a weight by 5e-5 a step), and so is the hyperball's angle; the others are the
            papers'.
        ends: of embedding and head, which it steps, too; AdamW steps the others.
        decays: whether weight decay acts on the matrices; if not, their norm is held, and AdamW has those of zeros.
        moments: whether it keeps any that ``state_dtype`` is for.
    """

    title: str
    make: Callable[[Groups], torch.optim.Optimizer]
    lr: float | None = None
    ends: tuple[str, ...] = ()
    decays: bool = True
    moments: bool = True


RULES: dict[str, Rule] = {
    "muon": Rule("Muon", Muon),
    "muon-hyperball": Rule("Muon on the hyperball", MuonHyperball, lr=0.012, decays=False),
    "rmnp": Rule("RMNP", RMNP),
    "scale": Rule("SCALE", Scale, lr=1e-3, ends=("embedding", "head")),
    "sinkgd": Rule("SinkGD", SinkGD, lr=0.02, moments=False),
    "racs": Rule("RACS", RACS, lr=0.02, ends=("embedding",), moments=False),
    "galore": Rule("GaLore", GaLore, lr=0.01),
    "fira": Rule("Fira", lambda groups: GaLore(groups, residual=True), lr=0.01),
    "apollo": Rule("APOLLO", Apollo, lr=0.01),
    "apollo-mini": Rule("APOLLO-Mini", lambda groups: Apollo(groups, rank=1, scale=128.0, by_channel=False), lr=0.01),
}
#: Settings of a group for an end of the model.
OF_ENDS: dict[tuple[str, str], dict[str, Any]] = {
    ("scale", "embedding"): {"over": 0},
    ("scale", "head"): {"momentum": 0.9},
}


def matrices_and_rest(
    model: nn.Module,
    groups: Groups,
    name: str,
    *,
    lr: float,
    matrix_lr: float | None,
    weight_decay: float,
    rest: dict[str, Any],
    end_lr: float | None = None,
    rank: int | None = None,
    gap: int | None = None,
) -> torch.optim.Optimizer:
    """The rule ``name`` of :data:`RULES` on the matrices between embedding and head, AdamW on everything else.

    Args:
        groups: of :func:`poetx.param_groups`. lr: of AdamW. matrix_lr: of the rule; None: what is usual.
        end_lr: of embedding and head where the rule steps them; None: that of the matrices.
        rest: further settings of AdamW, for :func:`poetx.optim.build_optimizer`; ``state_dtype`` is the rule's, too.
        rank, gap: of the low-rank rules; None: a quarter of each matrix's smaller side, as published, and 200 steps.
            A matrix smaller than that is not projected.

    Raises:
        UserError: a rank that is larger than every matrix.
    """
    rule = RULES[name]
    matrix_lr = matrix_lr or rule.lr or lr
    ends = ends_of(model)
    usual = {"lr": matrix_lr, "weight_decay": weight_decay if rule.decays else 0.0}
    usual |= {"state_dtype": stored_as(rest)} if rule.moments else {}
    own: dict[Any, dict[str, Any]] = {}
    for parameter in (p for group in groups for p in group["params"] if p.ndim == 2):
        end = ends.get(id(parameter))
        if end is not None and end not in rule.ends:
            continue
        if not rule.decays and has_values(parameter) and not parameter.any():  # a held norm of zero
            continue
        settings = dict(OF_ENDS.get((name, end), {})) if end else {}
        if end and end_lr is not None:
            settings["lr"] = end_lr
        if name in LOW_RANK:
            settings = {"rank": rank or max(1, min(parameter.shape) // 4)}
            settings |= {} if gap is None else {"sketch_gap" if name == "apollo" else "subspace_gap": gap}
        label = end if settings and end else "matrices"
        key = (label, *settings.items())
        own.setdefault(key, {"name": label, "params": [], **usual, **settings})["params"].append(parameter)
    if rank is not None and name in LOW_RANK and own:
        widest = max(min(p.shape) for group in own.values() for p in group["params"])
        if rank > widest:
            raise UserError(
                f"rank={rank}: no matrix has a smaller side of more than {widest}, so {name} would project nothing; "
                "use a quarter of it or less"
            )
    taken = {id(p) for group in own.values() for p in group["params"]}
    left = [group | {"params": [p for p in group["params"] if id(p) not in taken]} for group in groups]
    left = [group for group in left if group["params"]]
    if not own:
        return build_optimizer(left, "adamw", **rest)
    first = rule.make(list(own.values()))
    return CombinedOptimizer(first, build_optimizer(left, "adamw", **rest)) if left else first


def stored_as(settings: Mapping[str, Any]) -> str:
    """The ``state_dtype`` of settings for :func:`poetx.optim.build_optimizer`, as the rules know it."""
    kind = settings.get("state_dtype", "auto")
    return "same" if kind == "auto" else kind


def with_matrix_rate(model: nn.Module, groups: Groups, matrix_lr: float) -> Groups:
    """``groups`` with the matrices between embedding and head in groups of their own, of rate ``matrix_lr``."""
    ends, parted = ends_of(model), []
    for group in groups:
        inner = [p for p in group["params"] if p.ndim == 2 and id(p) not in ends]
        other = [p for p in group["params"] if p.ndim != 2 or id(p) in ends]
        parted.append(group | {"name": "matrices", "params": inner, "lr": matrix_lr})
        parted.append(group | {"params": other})
    return [group for group in parted if group["params"]]


def ends_of(model: nn.Module) -> dict[int, str]:
    """Embedding and head by the identity of their weights; a tied one is the head."""
    found = {}
    for name, getter in (("embedding", "get_input_embeddings"), ("head", "get_output_embeddings")):
        end: Any = getattr(model, getter, lambda: None)()
        if end is not None:
            found[id(end.weight)] = name
    return found
