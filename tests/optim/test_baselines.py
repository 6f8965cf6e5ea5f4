"""The rivals against float64 references of their papers' formulas, written here from scratch with NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from builders import descend, llama
from poetx.errors import UserError
from poetx.ops.random import stream
from poetx.optim import param_groups
from poetx.optim.baselines.base import MatrixOptimizer
from poetx.optim.baselines.hyperball import MuonHyperball
from poetx.optim.baselines.low_rank import Apollo, GaLore
from poetx.optim.baselines.muon import Muon
from poetx.optim.baselines.normalized import RACS, RMNP, Scale, SinkGD
from poetx.optim.baselines.rules import RULES, matrices_and_rest
from poetx.optim.gradient_release import release_gradients
from poetx.optim.settings import MATRIX_OPTIMIZERS, WITH_ENDS

Array = Any
STEPS, LR = 7, 0.02


def rms(x: Array, axis: int) -> Array:
    return np.sqrt(np.mean(x**2, axis=axis, keepdims=True))


def limited(u: Array, memory: dict[str, Any], key: str = "norm") -> Array:
    norm = np.linalg.norm(u)
    if key in memory and norm > 1.01 * memory[key]:
        u, norm = u * (1.01 * memory[key] / norm), 1.01 * memory[key]
    memory[key] = norm
    return u


def adam(r: Array, memory: dict[str, Any], t: int, eps: float) -> Array:
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * r
    memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * r**2
    return memory["m"] / (1 - 0.9**t) / (np.sqrt(memory["v"] / (1 - 0.999**t)) + eps)


def scale(w: Array, g: Array, memory: dict[str, Any], t: int) -> Array:
    return w - LR * g / rms(g, 1)


def scale_columns(w: Array, g: Array, memory: dict[str, Any], t: int) -> Array:
    return w - LR * g / rms(g, 0)


def scale_momentum(w: Array, g: Array, memory: dict[str, Any], t: int) -> Array:
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    return w - LR * memory["m"] / rms(memory["m"], 1)


def sinkgd(w: Array, g: Array, memory: dict[str, Any], t: int) -> Array:
    x = g
    for _ in range(5):
        x = np.sqrt(x.shape[1]) * x / np.linalg.norm(x, axis=1, keepdims=True)
        x = np.sqrt(x.shape[0]) * x / np.linalg.norm(x, axis=0, keepdims=True)
    return w - LR * 0.05 * x


def racs(w: Array, g: Array, memory: dict[str, Any], t: int) -> Array:
    s, q = np.ones(len(g)), np.ones(len(g[0]))
    for _ in range(5):
        s = np.array([sum(g[i] ** 2 * q) for i in range(len(s))]) / sum(q**2)
        q = np.array([sum(g[:, j] ** 2 * s) for j in range(len(q))]) / sum(s**2)
    for name, value in (("s", s), ("q", q)):
        memory[name] = 0.9 * memory.get(name, 0) + 0.1 * value
    s, q = (memory[name] / (1 - 0.9**t) for name in ("s", "q"))
    return w - LR * 0.05 * limited(g / np.sqrt(np.outer(s, q)), memory)


def rmnp(w: Array, g: Array, memory: dict[str, Any], t: int) -> Array:
    memory["m"] = 0.95 * memory.get("m", 0) + 0.05 * g
    return (1 - LR * 0.1) * w - LR * 0.2 * memory["m"] / rms(memory["m"], 1)


def newton_schulz(x: Array) -> Array:
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def muon(w: Array, g: Array, memory: dict[str, Any], t: int) -> Array:
    memory["m"] = 0.95 * memory.get("m", 0) + 0.05 * g
    u = 0.05 * g + 0.95 * memory["m"]
    u = newton_schulz(u) if len(u) <= len(u[0]) else newton_schulz(u.T).T
    return (1 - LR * 0.1) * w - LR * 0.2 * np.sqrt(max(w.shape)) * u


def hyperball(w: Array, g: Array, memory: dict[str, Any], t: int) -> Array:
    c = memory.setdefault("c", np.linalg.norm(w))
    memory["m"] = 0.95 * memory.get("m", 0) + 0.05 * g
    u = 0.05 * g + 0.95 * memory["m"]
    u = newton_schulz(u) if len(u) <= len(u[0]) else newton_schulz(u.T).T
    v = w - LR * c * u / np.linalg.norm(u)
    return c * v / np.linalg.norm(v)


def low_rank(w: Array, g: Array, memory: dict[str, Any], t: int, *, fira: bool = False) -> Array:
    tall = len(g) > len(g[0])
    g = g.T if tall else g
    if (t - 1) % 3 == 0:
        p = np.linalg.svd(g)[0][:, :4]
        memory["p"] = p * np.sign([column[np.argmax(abs(column))] for column in p.T])
    p = memory["p"]
    r = p.T @ g
    n = adam(r, memory, t, 1e-8)
    u = p @ n
    if fira:
        u = u + limited((g - p @ r) * np.linalg.norm(n, axis=0) / np.linalg.norm(r, axis=0), memory)
    return w - LR * 0.25 * (u.T if tall else u)


def fira(w: Array, g: Array, memory: dict[str, Any], t: int) -> Array:
    return low_rank(w, g, memory, t, fira=True)


def apollo(w: Array, g: Array, memory: dict[str, Any], t: int, *, rank: int = 4, by_channel: bool = True) -> Array:
    tall = len(g) > len(g[0])
    g = g.T if tall else g
    draw = stream(5, "0", (t - 1) // 3, "sketch")
    p = torch.randn(rank, len(g), generator=draw, dtype=torch.float64).numpy() / np.sqrt(rank)
    r = p @ g
    n = adam(r, memory, t, 1e-6)
    s = np.linalg.norm(n, axis=0) / np.linalg.norm(r, axis=0) if by_channel else np.linalg.norm(n) / np.linalg.norm(r)
    u = limited(g * s, memory)
    return w - LR * np.sqrt(1.0 if by_channel else 128.0) * (u.T if tall else u)


def apollo_mini(w: Array, g: Array, memory: dict[str, Any], t: int) -> Array:
    return apollo(w, g, memory, t, rank=1, by_channel=False)


FORMULAS: dict[str, tuple[Callable[..., Array], Callable[..., MatrixOptimizer]]] = {
    "scale": (scale, lambda p: Scale(p, LR)),
    "scale, embedding": (scale_columns, lambda p: Scale(p, LR, over=0)),
    "scale, head": (scale_momentum, lambda p: Scale(p, LR, momentum=0.9)),
    "sinkgd": (sinkgd, lambda p: SinkGD(p, LR)),
    "racs": (racs, lambda p: RACS(p, LR)),
    "rmnp": (rmnp, lambda p: RMNP(p, LR, weight_decay=0.1)),
    "muon": (muon, lambda p: Muon(p, LR, weight_decay=0.1)),
    "muon-hyperball": (hyperball, lambda p: MuonHyperball(p, LR)),
    "galore": (low_rank, lambda p: GaLore(p, LR, rank=4, subspace_gap=3)),
    "fira": (fira, lambda p: GaLore(p, LR, rank=4, subspace_gap=3, residual=True)),
    "apollo": (apollo, lambda p: Apollo(p, LR, rank=4, sketch_gap=3, seed=5)),
    "apollo-mini": (
        apollo_mini,
        lambda p: Apollo(p, LR, rank=1, sketch_gap=3, scale=128.0, by_channel=False, seed=5),
    ),
}


def gradients(shape: tuple[int, int]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) * 10 ** (i % 3 - 1) for i in range(STEPS)]


@pytest.mark.parametrize("shape", [(6, 11), (12, 7)], ids=["wide", "tall"])
@pytest.mark.parametrize("name", FORMULAS)
def test_the_formula_of_the_paper(name: str, shape: tuple[int, int]) -> None:
    formula, make = FORMULAS[name]
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameter, w, memory = nn.Parameter(start.clone()), start.numpy().copy(), {}
    optimizer = make([parameter])
    for t, g in enumerate(gradients(shape), start=1):
        parameter.grad = g.clone()
        optimizer.step()
        w = formula(w, g.numpy(), memory, t)
        assert np.allclose(parameter.detach().numpy(), w, rtol=1e-9, atol=1e-11), t
        if t == 3:  # saved, loaded into a new one, and continued
            state = optimizer.state_dict()
            optimizer = make([parameter])
            optimizer.load_state_dict(state)


@pytest.mark.parametrize("name", FORMULAS)
def test_bfloat16_moves_by_small_steps_and_nothing_finite_gives_nan(name: str) -> None:
    parameter = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    optimizer = FORMULAS[name][1]([parameter])
    small = optimizer.param_groups[0].get("scale", 1.0) < 1
    optimizer.param_groups[0]["lr"] = 2e-3 if small else 1e-4  # 1/40 of a step of bfloat16 at 1
    optimizer.param_groups[0]["weight_decay"] = 0.0
    moved = 0
    for scale in (1.0, 1e-30, 0.0, 1e30, 1e-3, 0.0):
        before = parameter.detach().clone()
        parameter.grad = scale * torch.randn(8, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
        optimizer.step()
        assert parameter.isfinite().all(), scale
        moved += int((before != parameter).sum())
    assert moved
    state = {key: value for key, value in optimizer.state[parameter].items() if isinstance(value, torch.Tensor)}
    assert all(value.isfinite().all() for value in state.values())


def test_muon_goes_on_from_the_state_of_torch() -> None:
    weights = []
    for follow in (torch.optim.Muon, Muon):
        parameter = nn.Parameter(torch.randn(12, 7, generator=torch.Generator().manual_seed(0)))
        optimizer = torch.optim.Muon([parameter], LR, adjust_lr_fn="match_rms_adamw")
        for t, g in enumerate(gradients((12, 7))):
            if t == 3:
                state = optimizer.state_dict()
                optimizer = follow([parameter], LR)
                optimizer.load_state_dict(state)
                before = parameter.detach().clone()
            parameter.grad = g.float()
            optimizer.step()
        weights.append(parameter.detach() - before)
    assert (weights[0] - weights[1]).norm() < 0.03 * weights[0].norm()  # torch iterates in bfloat16


@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize("name", ["galore", "fira", "apollo", "racs", "scale"])
def test_released_gradients_give_the_same_steps(name: str, passes: int) -> None:
    """Public releases of GaLore step at each of four micro-batches, which is another method."""
    x = torch.randn(4, passes, 3, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights = []
    for release in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 12, bias=False), nn.Tanh(), nn.Linear(12, 5, bias=False)).double()
        optimizer = FORMULAS[name][1](model.parameters())
        if release:
            release_gradients(optimizer, list(model.parameters()), accumulation_steps=passes)
        for parts in x:
            for part in parts[:-1]:
                model(part).square().sum().backward()
            descend(model(parts[-1]).square().sum(), optimizer)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
@pytest.mark.parametrize("tied", [False, True])
def test_which_matrices_each_steps(name: str, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    groups = param_groups(model, lr=1e-3, poet_lr=1e-3, weight_decay=0.1)
    rates = {"lr": 1e-3, "matrix_lr": None, "end_lr": 5e-3 if name in WITH_ENDS else None}
    optimizer = matrices_and_rest(model, groups, name, **rates, weight_decay=0.1, rest={})
    mine = {id(p): g for g in optimizer.param_groups if g["optimizer"] == 0 for p in g["params"]}
    for label, p in model.named_parameters():
        end = "head" if "lm_head" in label or (tied and "embed" in label) else "embedding" if "embed" in label else ""
        assert (id(p) in mine) == (p.ndim == 2 and (not end or end in RULES[name].ends)), label
        if id(p) in mine:
            group = mine[id(p)]
            assert group["lr"] == (5e-3 if end else RULES[name].lr or 1e-3)
            assert group["weight_decay"] == (0.0 if name == "muon-hyperball" else 0.1)
            if name == "scale":
                assert (group["over"], group["momentum"]) == {"": (1, 0), "embedding": (0, 0), "head": (1, 0.9)}[end]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


def test_refusals() -> None:
    matrix, vector = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3))
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: SinkGD([vector]), r"SinkGD: a parameter of shape \(3,\) is no matrix"),
        (lambda: MuonHyperball([matrix], weight_decay=0.1), "weight_decay=0.1: has no effect where the norm is held"),
        (lambda: GaLore([matrix], rank=0), "rank=0: must be a whole number of at least 1"),
        (lambda: Apollo([matrix], sketch_gap=1.5), "sketch_gap=1.5"),  # type: ignore[arg-type]
        (lambda: RACS([matrix], racs_beta=1.0), "racs_beta=1.0: must be at least 0 and below 1"),
        (lambda: Scale([matrix], over=2), "over=2: must be 1, for rows, or 0"),
    ]
    for make, words in cases:
        with pytest.raises(UserError, match=words):
            make()
    saved = RMNP([matrix]).state_dict()
    with pytest.raises(UserError, match="this state was saved by RMNP, and here SinkGD steps"):
        SinkGD([matrix]).load_state_dict(saved)


def test_a_gradient_of_nan_is_passed_on_as_in_any_optimizer():
    for build in (lambda p: GaLore(p, rank=2), lambda p: GaLore(p, rank=9, residual=True)):
        weight = nn.Parameter(torch.ones(4, 6))
        optimizer = build([weight])
        weight.grad = torch.full((4, 6), float("nan"))
        optimizer.step()
        assert weight.isnan().all()


def test_the_hyperball_holds_the_norm_that_was_written_last_and_takes_no_zeros():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 4))
    optimizer = MuonHyperball([weight])
    for factor in (1.0, 0.25, 8.0, 1.001):
        with torch.no_grad():
            weight.mul_(factor)
        wanted = weight.norm().item()
        for _ in range(3):
            weight.grad = torch.randn(6, 4)
            optimizer.step()
        assert weight.norm().item() == pytest.approx(wanted, rel=2e-3)
    with pytest.raises(UserError, match=r"shape \(3, 2\) is all zeros, and would stay so"):
        MuonHyperball([nn.Parameter(torch.zeros(3, 2))])


def test_the_hyperball_leaves_a_matrix_of_zeros_of_a_model_to_adamw():
    model = llama()
    zero = model.model.layers[0].mlp.down_proj.weight
    nn.init.zeros_(zero)
    groups = param_groups(model, lr=1e-3, poet_lr=1e-3)
    optimizer = matrices_and_rest(model, groups, "muon-hyperball", lr=1e-3, matrix_lr=None, weight_decay=0.0, rest={})
    descend(model(input_ids=torch.arange(9)[None]).logits.square().mean(), optimizer)
    assert zero.any()
