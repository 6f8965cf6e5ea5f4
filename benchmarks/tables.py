"""Write the tables of README and docs from the rows under ``benchmarks/results``.

    python -m benchmarks.tables

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; what is between them is replaced, so that no
number in it is typed by hand.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import LATER, RESULTS, by_setting, mean_loss

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/log.md")


def _rows(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def merges() -> str:
    """After the most merges measured: one line a kind, both angles."""
    rows = _rows("merges")
    last = max(row["merges"] for row in rows)
    names = {
        "float32": "float32",
        "bfloat16": "bfloat16, stochastic rounding",
        "residual": "bfloat16 + 8-bit residual",
        "naive": "naive bfloat16",
    }
    angles = sorted({row["angle"] for row in rows})
    body = []
    for kind, title in names.items():
        cells = [title]
        for angle in angles:
            (row,) = [r for r in rows if (r["kind"], r["angle"], r["merges"]) == (kind, angle, last)][-1:]
            cells += [f"{row['median_change']:.1e}", f"{row['norm_ratio']:.6g}"]
        body.append(cells)
    head = [f"fold, {last} merges"]
    for angle in angles:
        head += [f"median change of singular values, θ = {angle:g}", f"‖W‖ after / before, θ = {angle:g}"]
    return _markdown(head, body)


def layer() -> str:
    """Latest row of every shape and contestant; rows from before ``poetx bench`` had a ``candidate`` and stay out."""
    rows = [r for r in _rows("layer") if r["benchmark"] == "layer" and "contestant" in r]
    sizes = ("tokens", "out_features", "in_features", "block_size", "dtype", "compiled")
    latest = {(*(r[key] for key in sizes), r["contestant"]): r for r in rows}
    body = []
    for (tokens, m, n, b, dtype, compiled, contestant), row in sorted(latest.items(), key=lambda item: item[0][:6]):
        what = f"{tokens} tokens, {m}×{n}, b={b}, {dtype}" + (", compiled" if compiled else "")
        body.append([what, contestant, f"{row['ms']:.1f}", f"{row['ratio']:.2f}"])
    device = next(reversed(latest.values()))["device"]
    return _markdown([f"forward + backward on {device}", "layer", "ms", "× nn.Linear"], body)


def step() -> str:
    """Latest row of every recipe, size and contestant."""
    latest = {
        (r["recipe"], r["seq_len"], r["batch_size"], r["dtype"], r["compiled"], r["contestant"]): r
        for r in _rows("step")
    }
    body = [
        [
            f"{recipe}, {batch} × {length}, {dtype}" + (", compiled" if compiled else ""),
            contestant,
            f"{row['ms']:.0f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['speed_ratio']:.2f}",
        ]
        for (recipe, length, batch, dtype, compiled, contestant), row in latest.items()
    ]
    device = next(reversed(latest.values()))["device"]
    return _markdown(
        [f"whole steps on {device}", "method", "ms", "tokens a second, merges included", "× AdamW's"], body
    )


def continuity() -> str:
    """Loss before and after one merge."""
    body = [
        [
            str(r["order"]),
            r["dtype"],
            f"{r['largest_angle']:.2f}",
            f"{r['loss_before']:.5f}",
            f"{r['relative_jump']:.1e}",
        ]
        for r in _rows("continuity")
    ]
    return _markdown(["order", "dtype", "largest angle folded", "loss before", "relative change at the merge"], body)


def stability() -> str:
    """Mean final loss and divergences by factor on the best rates."""
    rows = _rows("stability")
    best = {
        method: min(
            (r for r in rows if r["method"] == method and r["factor"] is None), key=lambda r: r["loss"] or float("inf")
        )
        for method in dict.fromkeys(r["method"] for r in rows)
    }
    body = []
    for method, base in best.items():
        for factor in sorted({r["factor"] for r in rows if r["factor"] is not None}):
            mine = [r for r in rows if r["method"] == method and r["factor"] == factor]
            finite = [r["loss"] for r in mine if r["loss"] is not None]
            rate = f"{base['lr'] * factor:g}" + (f" / {base['poet_lr'] * factor:g}" if base["poet_lr"] else "")
            spread = f"{min(finite):.3f} to {max(finite):.3f}" if finite else ""
            mean = f"{statistics.mean(finite):.3f}" if finite else "not finite"
            diverged = f"{sum(r['diverged'] for r in mine)} of {len(mine)}"
            body.append([method, f"{factor:g}×", rate, mean, spread, diverged])
    head = ["method", "factor", "lr / rotation lr", "validation loss, mean", "range over seeds", "diverged"]
    return _markdown(head, body)


def permutations() -> str:
    """Last validation loss of the demo by kind of permutation, seed by seed."""
    rows = _rows("permutations")
    body = []
    for kind in dict.fromkeys(r["kind"] for r in rows):
        mine = sorted((r for r in rows if r["kind"] == kind), key=lambda r: r["seed"])
        losses = [r["loss"] for r in mine]
        body.append([kind, f"{statistics.mean(losses):.4f}", ", ".join(f"{loss:.4f}" for loss in losses)])
    return _markdown(["permutations", "validation loss, mean", "seeds"], body)


def single_step() -> str:
    """Every setting measured, best first within a budget: mean and range over its seeds."""
    body = []
    runs = by_setting(_rows("single_step"))
    for rows in sorted(runs, key=lambda rows: (rows[0]["scale"], rows[0]["tokens"], mean_loss(rows))):
        row = rows[0]
        losses = [r["loss"] for r in rows if r["loss"] is not None]
        spread = f"{min(losses):.3f} to {max(losses):.3f}" if len(losses) > 1 else ""
        body.append(
            [
                f"{row['scale']}, {row['tokens'] / 1e6:.1f}M",
                row["method"],
                _settings(row),
                f"{mean_loss(rows):.3f}",
                spread,
                str(len(rows)),
                f"{row['matrix_state_bytes'] / 1e6:.1f}",
                _weights(rows),
            ]
        )
    head = ["model, tokens", "method", "settings", "validation loss", "range", "seeds", "MB of state for the matrices"]
    head.append("effective rank and RMS of the matrices, at the start and after training")
    return _markdown(head, body)


def _weights(rows: list[dict[str, Any]]) -> str:
    """Of the first seed for which it was recorded."""
    weights = next((row["weights"] for row in rows if "weights" in row), None)
    if weights is None:
        return ""
    rank, rms = ([weights[when][what] for when in ("start", "end")] for what in ("effective_rank", "rms"))
    return f"{rank[0]:.2f} → {rank[1]:.2f}, {rms[0]:.3f} → {rms[1]:.3f}"


def _settings(row: dict[str, Any]) -> str:
    """What differs from the usual, after the rates."""
    rates = [f"lr {row['lr']:g}"]
    if row["method"] != "adamw":
        rates.append(("angle" if row["method"] == "single-step" else "matrix lr") + f" {row['matrix_lr']:g}")
    usual = {
        "weight_decay": 0.0,
        "beta2": 0.95,
        "clip": 1.0,
        "init": "normalized" if row["method"] in ("single-step", "poet-x") else "default",
        "init_scale": 1.0,
        "out_scale": 1.0,
        "embed_std": 0.02,
        "block_size": 64,
        "merge_every": None,
        "precision": "bf16",
    }
    row = LATER | row
    others = {name: row[name] for name, value in (usual | LATER).items() if row[name] != value} | row["options"]
    return ", ".join(rates + [f"{name} {value}" for name, value in others.items()])


def _quantised(kind: str) -> list[dict[str, Any]]:
    return [row for row in _rows("quantised") if row["benchmark"] == f"quantised-{kind}"]


def quantised_merges() -> str:
    """Error against a float32 layer with the same rotations, as merges go on."""
    body = []
    for row in _quantised("merges"):
        error = row["error_after"]
        cells = [f"{error[key]:.3f}" if key in error else "" for key in ("1", "10", "75", "300")]
        cells += [f"{row['mean_norm_ratio']:.5f}", f"{row['median_singular_value_change']:.1e}"]
        body.append([f"{row['format']}, {row['kind']}", f"{row['angle']:g}", *cells])
    head = ["requantisation", "θ a merge", *(f"error after {n}" for n in (1, 10, 75, 300))]
    return _markdown([*head, "mean ‖W‖ ratio", "median change of singular values"], body)


def quantised_quality() -> str:
    """Validation loss of every seed, and how far it is from the bfloat16 base's of the same seed and interval."""
    rows = _quantised("quality")
    loss = {(r["format"], r["kind"], r["merge_every"], r["seed"]): r["validation_loss"] for r in rows}
    seeds = sorted({r["seed"] for r in rows})
    body = []
    for name, kind, every in dict.fromkeys((r["format"], r["kind"], r["merge_every"]) for r in rows):
        mine = {seed: loss[name, kind, every, seed] for seed in seeds if (name, kind, every, seed) in loss}
        base = {seed: loss.get(("bfloat16", "stochastic", every, seed)) for seed in mine}
        cells = [f"{mine[seed]:.4f}" if seed in mine else "" for seed in seeds]
        gaps = [f"{mine[seed] - value:+.4f}" for seed, value in base.items() if value is not None]
        is_base = (name, kind) == ("bfloat16", "stochastic")
        body.append([f"{name}, {kind}", str(every), *cells, "" if is_base else ", ".join(gaps)])
    return _markdown(["base", "merged every", *(f"seed {seed}" for seed in seeds), "against bfloat16"], body)


def quantised_speed() -> str:
    """Tokens a second of *mem*'s, of one layer and of a whole step of the demo."""
    rows = {row["cell"]: row for row in _quantised("speed")}.values()
    shapes = list(dict.fromkeys((r["out_features"], r["in_features"]) for r in rows))
    names = [name for name in dict.fromkeys(r["candidate"] for r in rows) if name != "mem"]
    find = {(r["candidate"], r["out_features"], r["in_features"]): r["tokens_per_second_of_mem"] for r in rows}
    steps = {row["contestant"]: f"{row['speed_ratio']:.2f}" for row in _quantised("step")}
    body = [[name, *(f"{find[name, m, n]:.2f}" for m, n in shapes), steps.get(name, "")] for name in names]
    return _markdown(["tokens/s against mem, 1024 tokens", *(f"{m}×{n}" for m, n in shapes), "demo step"], body)


def quantised_build() -> str:
    """Host memory of building a model on its quantised size."""
    body = [
        [row["cell"], *(f"{row[key]:.3f}" for key in ("converted_layers_in_bfloat16_gib", "finished_gib", "peak_gib"))]
        for row in _quantised("build")
    ]
    return _markdown(["GiB", "its linears in bfloat16", "finished model", "peak while building"], body)


_TABLES = (
    merges,
    layer,
    step,
    continuity,
    stability,
    permutations,
    single_step,
    quantised_merges,
    quantised_quality,
    quantised_speed,
    quantised_build,
)
TABLES: dict[str, Callable[[], str]] = {t.__name__: t for t in _TABLES}


def fill(text: str) -> str:
    """``text`` with every marked table written anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        path.write_text(fill(path.read_text()))


if __name__ == "__main__":
    main()
