"""Write the tables of README and docs from the rows under ``benchmarks/results``.

    python -m benchmarks.tables

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; what is between them is replaced, so that no
number in it is typed by hand.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.record import LATER, RESULTS, by_setting, mean_loss, rows_in, setting
from benchmarks.roofline import predicted

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "docs/compare.md",
    "docs/data.md",
    "docs/fine-tuning.md",
    "docs/integrations.md",
    "docs/log.md",
    "docs/memory.md",
    "docs/reach.md",
    "docs/scaling.md",
    "docs/single-step.md",
    "docs/speed.md",
    "docs/stability.md",
    "docs/training.md",
)


def _rows(name: str) -> list[dict[str, Any]]:
    return rows_in(RESULTS / f"{name}.jsonl")


def _markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def integrations() -> str:
    """What holds in every loop and form, of the newest run of each."""
    from benchmarks.integrations import CHECKS, FORMS, LOOPS

    newest = {(row["loop"], row["form"]): row for row in _rows("integrations")}
    body = []
    for loop, (libraries, title) in LOOPS.items():
        rows = [newest[loop, form] for form in FORMS]
        cells = [", ".join(name if row[name] else f"**not: {name}**" for name in CHECKS) for row in rows]
        versions = rows[0]["versions"]
        body.append([title, *cells, ", ".join(f"{name} {versions[name]}" for name in libraries) or "torch"])
    return _markdown(["loop", *FORMS, "with"], body)


def fine_tuning() -> str:
    """The best rates of each method on conversations, and all that were tried."""
    trials = {row["trial"]: row for row in _rows("fine_tuning") if row["steps"] == 150}
    methods = {name.split()[0]: [] for name in trials}
    for name, row in trials.items():
        methods[name.split()[0]].append(row)
    body = []
    for method, tried in methods.items():
        best = min(tried, key=lambda row: row["after"])
        others = ", ".join(f"{row['trial'].partition(' ')[2]}: {row['after']:.3f}" for row in tried if row is not best)
        rates = best["trial"].partition(" ")[2]
        body.append([method, f"{best['before']:.3f}", f"**{best['after']:.3f}**", rates, others])
    return _markdown(
        ["method", "untouched", "trained", "its rates", "tried, too"], sorted(body, key=lambda row: row[2])
    )


def fine_tuning_memory() -> str:
    """Planned memory of fine-tuning models of a real size."""
    newest = {(row["model"], row["method"]): row for row in _rows("fine_tuning_memory")}
    body = []
    for (model, method), row in newest.items():
        fits = next((str(card) for card in (8, 12, 16, 24, 48, 80) if row["peak_gib"] <= 0.95 * card), "none")
        share = row["trainable"] / row["parameters"]
        body.append([model, method, f"{row['peak_gib']:.1f}", fits, f"{100 * share:.0f} %"])
    return _markdown(["model", "method", "peak, GB", "smallest card, GB", "trained"], body)


def loop_overhead() -> str:
    """Tokens a second of the training loop against a bare one, of the newest run of each recipe."""
    newest = {row["recipe"]: row for row in _rows("loop_overhead")}
    body = []
    for name, row in newest.items():
        cells = [f"{row[f'{clock}_ratio']:.3f}, {row[f'{clock}_ratio_of_totals']:.3f}" for clock in ("cpu", "wall")]
        body.append([name, str(row["steps"]), *cells])
    return _markdown(["recipe", "steps of each", "by CPU time: median, of totals", "by wall time"], body)


def prepare_speed() -> str:
    """What large texts took to tokenize, the newest row of each size."""
    newest = {row["megabytes"]: row for row in _rows("prepare_speed")}
    body = [
        [
            f"{size:,.0f} MB",
            f"{row['tokens'] / 1e6:,.1f}M",
            f"{row['seconds']:,.0f} s",
            f"{row['tokens_per_second']:,}",
            f"{row['tokens_per_cpu_second']:,}",
            f"{row['peak_mib']:,.0f} MiB",
        ]
        for size, row in sorted(newest.items())
    ]
    return _markdown(["text", "tokens", "wall time", "tokens/s", "a CPU second", "largest process"], body)


def host_peak() -> str:
    """Host memory while checkpoints were loaded for streaming."""
    newest = {
        (row["layers"], row["hidden_size"], row["in_files"], row.get("weights") or ""): row
        for row in _rows("host_peak")
    }
    body = [
        [
            f"{row['layers']} of {row['layer_mib']:,.0f} MiB",
            (row.get("weights") or "bfloat16") + (", in files" if row["in_files"] else ", in memory"),
            *(f"{row[f'{name}_mib'] / 1024:.2f}" for name in ("base", "card", "peak")),
            f"{row['more_than_held_in_layers']:.2f} layers",
        ]
        for _, row in sorted(newest.items())
    ]
    held = ["weights, GB", "on the stand-in's card, GB", "peak, GB"]
    return _markdown(["decoder layers", "weights", *held, "more than what stays"], body)


def stream_stress() -> str:
    """Steps of streamed tiny layers that were compared, to the bit."""
    newest = {(row["form"], row.get("in_files", False)): row for row in _rows("stream_stress")}
    body = []
    for (form, in_files), row in newest.items():
        counts = [f"{row[name]:,}" for name in ("steps", "stopped", "interrupted_steps", "loads", "missed", "writes")]
        place = "in files" if in_files else "in memory"
        body.append([form, place, *counts, "yes" if row["identical"] else "**no**"])
    head = ["form", "weights", "steps", "passes stopped", "steps interrupted", "loads", "not foreseen", "writes"]
    return _markdown([*head, "to the bit"], body)


def sharded_loops() -> str:
    """Differences from one process of the newest runs, both dtypes and plain and checkpointed side by side."""
    newest: dict[Any, dict[str, Any]] = {}
    for row in _rows("sharded_loops"):
        newest[row["form"], row["parallel"], row["ranks"], row["dtype"], row["checkpointed"]] = row
    body = []
    for form, parallel, ranks in sorted({key[:3] for key in newest}):
        rows = [newest.get((form, parallel, ranks, *kind)) for kind in product(("float64", "float32"), (False, True))]
        differences = [f"{row['largest_difference']:.1e}" if row else "not run" for row in rows]
        sent = [f"{rows[0][key] / 1e3:.1f} kB" if rows[0] else "" for key in ("step_bytes", "merge_bytes")]
        body.append([form, parallel, str(ranks), *differences, *sent])
    head = ["form", "parallel", "processes", "float64", "checkpointed", "float32", "checkpointed"]
    return _markdown([*head, "a step sends", "a merge sends"], body)


def rank_bytes() -> str:
    """What a step of the 3B shape sends beside AdamW's, of the newest rows."""
    newest = {(row["form"], row["dtype"]): row for row in _rows("rank_bytes") if row["benchmark"] == "bytes"}
    keys = ("bytes", "of_adamw", "of_ddp", "all_rows_of_ddp")
    body = [
        [form, dtype, f"{row['bytes'] / 1e9:.2f}", *(f"{row[key]:.3f}" for key in keys[1:])]
        for (form, dtype), row in newest.items()
    ]
    head = ["form", "weights", "GB a step", "of AdamW's", "of AdamW's under DDP", "the same, every row sent"]
    return _markdown(head, body)


def fsdp_bytes() -> str:
    """What a rank sends in a sharded step of the 3B shape, of the newest rows."""
    rows = [row for row in _rows("rank_bytes") if row["benchmark"] == "fsdp_bytes"]
    newest = {(row["ranks"], row["form"], row["dtype"]): row for row in rows}
    kinds = ("frozen, gathered", "folded rows", "trained, gathered", "trained, reduced")
    body = [
        [form, dtype, str(ranks), *(f"{row[kind] / 1e9:.2f}" for kind in kinds)]
        + [f"{row[key]:.3f}" for key in ("of_ddp", "all_rows_of_ddp")]
        for (ranks, form, dtype), row in newest.items()
    ]
    head = ["form", "weights", "processes", "frozen weights gathered, GB", "rows for folds", "what trains gathered"]
    return _markdown([*head, "and reduced", "of AdamW's under DDP", "the same, every row sent"], body)


def rank_memory() -> str:
    """Planned and tracked peaks of one rank, of the newest rows."""
    newest = {(row["form"], row["parallel"], row["ranks"]): row for row in _rows("rank_memory")}
    body = [
        [
            form,
            parallel,
            str(ranks),
            *(f"{row[key] / 1e6:.2f}" for key in ("planned", "tracked")),
            f"{row['error']:+.1%}",
        ]
        for (form, parallel, ranks), row in sorted(newest.items())
    ]
    return _markdown(["form", "parallel", "processes", "planned, MB", "tracked, MB", "off by"], body)


def rank_merges() -> str:
    """Processor seconds of a rank's merge or fold by the number of ranks, of the newest rows."""
    newest = {(row["form"], row["what"], row["width"]): row for row in _rows("rank_merges")}
    body = []
    for (form, what, width), row in newest.items():
        seconds = [f"{value:.2f}" for value in row["seconds"].values()]
        body.append([f"{form}, {what}", f"8 of {width} x {width}", *seconds, f"{row['from_2_to_4']:.2f}"])
    return _markdown(["form", "layers", "1 process, s", "2", "4", "2 over 4"], body)


def scaling_assumptions() -> str:
    """The constants of the model on paper."""
    from benchmarks.scaling import assumptions

    return _markdown(["constant", "value", "what it is"], assumptions())


def scaling_checked() -> str:
    """The model on paper beside what was published for 64 GPUs."""
    from benchmarks.scaling import checked

    head = ["model", "method", "tokens", "ms for tokens", "fixed", "sent", "a step"]
    return _markdown([*head, "predicted, k tokens/s", "published", "off by"], checked())


def scaling_planned() -> str:
    """What the model on paper says of other numbers of GPUs."""
    from benchmarks.scaling import GPUS, planned

    body = [[str(tokens), *row] for tokens in (512, 2048) for row in planned(tokens)]
    return _markdown(["tokens", "model", "method", "GB averaged", *(f"{gpus} GPUs" for gpus in GPUS)], body)


def reach_targets() -> str:
    """Plans that have a target, beside it."""
    from benchmarks.reach import TARGETS

    newest = {(row["model"], row["way"]): row for row in _rows("reach")}
    body = []
    for key, (device, host) in TARGETS.items():
        if (row := newest.get(key)) is not None:
            wanted = f"{device:g} GB" + (f", host {host:g}" if host else "")
            body.append([*key, wanted, f"{row['device_gib']:.1f}", f"{row['host_gib']:.1f}"])
    return _markdown(["model", "frozen weights", "at most", "card, GB", "host, GB"], body)


def reach_contexts() -> str:
    """Plans of the 8B by sequence length, and where what its decoder layers keep is."""
    newest = {(row["tokens"], row["way"]): row for row in _rows("reach_contexts")}
    ways = list(dict.fromkeys(way for _, way in sorted(newest)))
    words = {"None": "all on the card", "activations": "inputs away", "both": "and weights away"}
    titles = [words[way.removeprefix("offload=")] for way in ways]
    body = []
    for tokens in sorted({tokens for tokens, _ in newest}):
        cells = []
        for way in ways:
            row = newest.get((tokens, way))
            cells += ["", ""] if row is None else [f"{row['device_gib']:.1f}", f"{row['host_gib']:.1f}"]
        body.append([f"{tokens:,}", *cells])
    return _markdown(["tokens", *(f"{title}: {what}, GB" for title in titles for what in ("card", "host"))], body)


def reach_cards() -> str:
    """Every plan: what it takes, on which cards it fits, and what it costs."""
    from benchmarks.reach import MODELS, SINGLE, name_of
    from poetx.planner.reach import LINKS, WAYS

    names = [name_of(*way) for way in (*WAYS, *SINGLE)]
    cards = (8, 12, 16, 24, 48, 80)
    newest = {(row["model"], row["way"]): row for row in _rows("reach")}
    body = []
    for model, way in sorted(newest, key=lambda key: (MODELS.index(key[0]), names.index(key[1]))):
        row = newest[model, way]
        fits = next((f"{card}" for card in cards if row["device_gib"] <= 0.95 * card), "none")
        enough, speed = (
            " / ".join(f"{row[what][link]:,}" for link in LINKS) for what in ("enough_tokens", "tokens_per_second")
        )
        host = f"{row['host_gib']:.1f}" if row["host_gib"] else ""
        body.append([model, way, f"{row['device_gib']:.1f}", fits, host, speed, enough if host else ""])
    both = " / ".join(LINKS)
    head = ["model", "frozen weights", "card, GB", "fits", "host, GB", f"tokens/s, {both}", f"enough tokens, {both}"]
    return _markdown(head, body)


def compare_tiny() -> str:
    return _compared("tiny")


def compare_tiny_budgets() -> str:
    return _budgets("tiny")


def compare_tiny_low() -> str:
    """The same scale on other text, with gradients of large matrices released."""
    return _compared("tiny-low")


def compare_tiny_low_budgets() -> str:
    return _budgets("tiny-low", (0.05, 0.06, 0.1, 0.12, 0.16, 0.3, 0.55, 0.8, 1.0))


def compare_small() -> str:
    """Twice the width and 2.6 times the tokens, as far as it has been run."""
    return _compared("small")


def compare_small_budgets() -> str:
    return _budgets("small", (0.05, 0.06, 0.1, 0.3, 0.55, 0.8, 1.0))


def compare_5m_short() -> str:
    """Width 256, 300 of 5m.yaml's 1250 steps, by the rates that the search of small.yaml found; one seed."""
    return _compared("5m-short")


def compare_5m_short_budgets() -> str:
    return _budgets("5m-short", (0.05, 0.06, 0.1, 0.3, 0.55, 0.8, 1.0))


def _of_adamw(scale: str) -> int:
    """AdamW's bytes of state and gradient at this scale, or at the one it is named after: the same model."""
    rows = [row for row in _rows("compare") if row["method"] == "adamw"]
    own = [row for row in rows if row["scale"] == scale] or [r for r in rows if r["scale"] == scale.partition("-")[0]]
    return own[0]["state"] + own[0]["gradient"]


def _budgets(scale: str, shares: Sequence[float] = (0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)) -> str:
    """The lowest mean loss within each share of AdamW's state and gradient: of the forms of POET, and of the others."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in _rows("compare"):
        if row["scale"] == scale:
            found.setdefault(row["method"], []).append(row)
    of = {name: (rows[0]["state"] + rows[0]["gradient"], mean_loss(rows)) for name, rows in found.items()}
    base, body = _of_adamw(scale), []
    for budget in shares:
        cells = []
        for ours in (True, False):
            fits = [
                (loss, name)
                for name, (size, loss) in of.items()
                if name.startswith(("single-step", "poet-x", "oft")) == ours and size <= budget * base
            ]
            cells.append(min(fits, default=(math.inf, "")))
        best = min(cells)[0]
        shown = [f"{name} {loss:.3f}" if name else "none" for loss, name in cells]
        body.append(
            [
                f"{budget:g}",
                *(f"**{s}**" if loss == best and name else s for s, (loss, name) in zip(shown, cells, strict=True)),
            ]
        )
    return _markdown(["state + gradient, at most, of AdamW's", "best form of POET", "best other method"], body)


def _compared(scale: str) -> str:
    """A comparison as its page shows it, predicted bytes over measured ones in place of the two."""
    from poetx.compare.page import HEAD, table

    rows = [row for row in _rows("compare") if row["scale"] == scale]
    shown = [HEAD.index(name) for name in HEAD if name not in ("seeds", "peak, MiB", "predicted", "weights", "rates")]
    ratio = {r["method"]: r["predicted_peak"] / r["measured_peak"] for r in rows if r["measured_peak"]}
    share = HEAD.index("state + gradient, of AdamW's")
    kept = {row["method"]: (row["state"] + row["gradient"]) / _of_adamw(scale) for row in rows}
    body = []
    for line in table(rows):
        cells = [line[place] if place != share else f"{kept[line[0]]:.2f}" for place in shown]
        body.append([*cells, f"{ratio[line[0]]:.4f}", line[HEAD.index("rates")]])
    return _markdown([*(HEAD[place] for place in shown), "predicted / measured peak", "rates"], body)


def merges() -> str:
    """Gaussian weights after the most merges measured: one line a kind, both angles."""
    rows = [row for row in _rows("merges") if row.get("spectrum", "gaussian") == "gaussian" and row["size"] == 512]
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


def merges_spectra() -> str:
    """Median and largest change of singular values after the most merges: one line a spectrum, one column a kind."""
    names = {
        "float32": "float32",
        "bfloat16": "bfloat16",
        "residual": "bfloat16 + 8 bits",
        "int8": "int8",
        "int8-residual": "int8 + 4 bits",
    }
    rows = [row | {"fold": "merges"} for row in _rows("merges")]
    rows += [row | {"fold": "steps", "kind": row["dtype"]} for row in _rows("single_step_spectrum")]
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in sorted((row for row in rows if "spectrum" in row), key=lambda row: row[row["fold"]]):
        line = lines.setdefault((row["fold"], row["spectrum"], row["size"]), {})
        line["after"] = f"{row[row['fold']]} {'merges' if row['fold'] == 'merges' else 'single steps'}"
        line[row["kind"]] = f"{row['median_change']:.1e}, {row['largest_change']:.1e}"
    body = [
        [spectrum, f"{size}²", line["after"], *(line.get(kind, "") for kind in names)]
        for (_, spectrum, size), line in sorted(lines.items())
    ]
    return _markdown(["spectrum", "size", "after", *names.values()], body)


def layer() -> str:
    """Latest row of every shape, device and contestant; not those with a ``candidate``, from before ``poetx bench``."""
    rows = [r for r in _rows("layer") if r["benchmark"] == "layer" and "contestant" in r]
    sizes = ("tokens", "out_features", "in_features", "block_size", "dtype", "compiled")

    def title(row: dict[str, Any]) -> str:
        tokens, m, n, b, dtype, compiled = (row[key] for key in sizes)
        return f"{tokens} tokens, {m}×{n}, b={b}, {dtype}" + (", compiled" if compiled else "")

    rows.sort(key=lambda row: [row[key] for key in sizes])
    return _beside(
        "forward + backward",
        rows,
        title,
        "linear",
        lambda row: f"{row['ms']:.0f} ms",
        lambda row: f"{row['ratio']:.2f}",
    )


def step() -> str:
    """Latest row of every recipe, size, device and contestant."""

    def title(row: dict[str, Any]) -> str:
        size = f"{row['recipe']}, {row['batch_size']} × {row['seq_len']}, {row['dtype']}"
        return size + (", compiled" if row["compiled"] else "")

    return _beside(
        "whole training step",
        sorted(_rows("step"), key=lambda row: (row["recipe"], row["batch_size"])),
        title,
        "adamw",
        lambda row: f"{row['ms']:.0f} ms, {row['tokens_per_second']:.0f} tokens/s",
        lambda row: f"{1 / row['speed_ratio']:.2f}",
    )


def gpu_layer() -> str:
    """Layers on a GPU: milliseconds of ``nn.Linear`` and multiples of it, each with the host's launches and without.

    The first and the newest of each size.
    """
    rows = [row for row in _rows("gpu/layer") if "contestant" in row]
    newest = {(row["tokens"], row["out_features"]): row["commit"] for row in rows}  # as they came
    rows = [row for row in rows if row["commit"] in (rows[0]["commit"], newest[row["tokens"], row["out_features"]])]

    def title(row: dict[str, Any]) -> str:
        return f"{row['tokens']} tokens, {row['out_features']}×{row['in_features']}, commit {row['commit']}"

    oldest = rows[0]["commit"]
    rows.sort(key=lambda row: (row["commit"] != oldest, row["out_features"], row["tokens"]))
    return _beside(
        f"forward + backward, b={rows[0]['block_size']}, {rows[0]['dtype']}",
        rows,
        title,
        "linear",
        lambda row: f"{row['ms']:.2f}, {row['queued_ms']:.2f} ms",
        lambda row: f"{row['ratio']:.2f}, {row['queued_ratio']:.2f}",
    )


def roofline() -> str:
    """The least time of a layer's kernels on an H200, and what was measured there last with the queue full."""
    measured: dict[tuple[int, int, int], dict[str, float]] = {}
    for row in (row for row in _rows("gpu/layer") if "H200" in row["device"]):
        key = row["out_features"], row["in_features"], row["tokens"]
        measured.setdefault(key, {})[row["contestant"]] = row["queued_ms"]
    names = ("linear", "fast", "fast-contiguous", "mem", "mem-contiguous", "single-step-free")
    body = []
    for (m, n, tokens), seen in sorted(measured.items()):
        line = [f"{tokens} tokens, {m}×{n}"]
        sizes = {"out_features": m, "in_features": n, "tokens": tokens, "block_size": 256, "dtype": "bfloat16"}
        least = {name: predicted({"contestant": name} | sizes) or 0.0 for name in names}
        for name in names:
            ratio = "" if name == "linear" else f" ({least[name] / least['linear']:.2f} ×)"
            line.append(f"{least[name]:.2f}{ratio}" + (f" / {seen[name]:.2f}" if name in seen else ""))
        body.append(line)
    return _markdown(
        ["predicted (of linear) / measured, ms", *(name.replace("-contiguous", ", contiguous") for name in names)], body
    )


def gpu_step() -> str:
    """Whole steps of a recipe on a GPU, merges included: tokens a second, the allocator's peak; the newest of each."""
    rows, graphs = _rows("gpu/step"), "train.cuda_graphs=true"

    def what(row: dict[str, Any]) -> str:
        words = row.get("overrides", [])
        step = f"{row['recipe']}, {row['batch_size']} × {row['seq_len']}"
        return step + ", checkpointed" * ("model.gradient_checkpointing=true" in words) + ", graphs" * (graphs in words)

    def alike(row: dict[str, Any], *, without: str = "") -> tuple[Any, ...]:
        words = tuple(word for word in row.get("overrides", []) if word != without)
        return row["recipe"], row["batch_size"], row["commit"], words

    adamws = {alike(row): row["ms"] for row in rows if row["contestant"] == "adamw"}
    newest = {(what(row), row["contestant"]): row for row in rows}  # as they came
    body = [
        [
            step,
            f"{row['device'].split()[1]}, {row['commit']}",
            method,
            f"{row['ms']:.0f}",
            f"{row['tokens_per_second']:.0f}",
            f"{(adamws.get(alike(row)) or adamws[alike(row, without=graphs)]) / row['ms']:.2f}",
            f"{row['merge_ms']:.0f}",
            f"{row['peak_bytes'] / 2**30:.1f}",
        ]
        for (step, method), row in sorted(newest.items())
    ]
    return _markdown(["step", "on, commit", "method", "ms", "tokens/s", "of AdamW's", "ms a merge", "peak, GiB"], body)


def gpu_routes() -> str:
    """Pieces of a layer at 8192 tokens, every way of computing them, beside the card's ceilings."""
    rows = [row for row in _rows("gpu/routes") if row["piece"] == "ceiling" or row.get("tokens") == 8192]
    body = [
        [row["piece"], row["way"], f"{row['ms']:.3f}", f"{row['tb_per_s']:.2f}", f"{row['tflop_per_s'] or 0:.0f}"]
        for row in rows
    ]
    return _markdown(["piece", "way", "ms", "TB/s", "TFLOP/s"], body)


def memory_measured() -> str:
    """The allocator's peak in a real step beside what was predicted of it."""
    predicted = {(row["benchmark"], row["cell"]): row["predicted_gib"] for row in _rows("memory")}
    body = []
    for row in _rows("gpu/memory"):
        said, found = predicted[row["of"], row["of_cell"]], row["measured_gib"]
        where = row["cell"].partition(": ")[2]
        if where == "the same, 8-bit state and released gradients":
            where = "8B, 1 × 1024, mem, full stack"
        body.append(
            [where, f"{said:.2f}", f"{found:.2f}", f"{100 * (said / found - 1):+.1f} %", f"{row['reserved_gib']:.2f}"]
        )
    return _markdown(["setting", "predicted", "allocated", "error", "reserved"], body)


def _beside(
    head: str,
    rows: list[dict[str, Any]],
    title: Callable[[dict[str, Any]], str],
    first: str,
    absolute: Callable[[dict[str, Any]], str],
    relative: Callable[[dict[str, Any]], str],
) -> str:
    """One line for each title and device: the first contestant's time, the others' as multiples of it."""
    lines: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((title(row), row["device"]), {})[row["contestant"]] = row
    others = [name for name in dict.fromkeys(row["contestant"] for row in rows) if name != first]
    body = [
        [what, device, absolute(found[first])] + [relative(found[n]) if n in found else "" for n in others]
        for (what, device), found in lines.items()
    ]
    return _markdown([head, "on", first, *(f"{name}, ×" for name in others)], body)


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


def _stability(kind: str) -> str:
    """Validation loss by method and factor on its usual rate: mean over the seeds, and what went wrong on the way."""
    rows = [row for row in _rows("stability") if row["kind"] == kind]
    factors = sorted({row["factor"] for row in rows})
    body = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        by_factor = {factor: [row for row in mine if row["factor"] == factor] for factor in factors}
        best = min(mean_loss(same) for same in by_factor.values() if same)
        rate = next(f"{row['rate'] / row['factor']:g}" for row in mine)
        cells = []
        for same in by_factor.values():
            loss = mean_loss(same) if same else math.nan
            text = f"{loss:.2f}" if loss < 100 else f"{loss:.0e}"
            text = "not run" if not same else f"**{text}**" if loss == best else text
            troubles = {"diverged": "diverged", "spikes": "spikes", "skipped_steps": "skipped"}
            counts = [(name, sum(row[key] for row in same)) for key, name in troubles.items()]
            said = ", ".join(f"{name} {count}" for name, count in counts if count)
            cells.append(text + (f" ({said})" if said else ""))
        seeds = len({row["seed"] for row in mine})
        body.append([method, rate, str(seeds), *cells])
    return _markdown(["method", "rate at 1×", "seeds", *(f"{factor:g}×" for factor in factors)], body)


def stability_usual() -> str:
    """:func:`_stability` of the usual model."""
    return _stability("usual")


def stability_normless() -> str:
    """:func:`_stability` of the model that loses its norms."""
    return _stability("normless")


def stability_deep() -> str:
    """:func:`_stability` of 48 thin layers."""
    return _stability("deep")


def permutations() -> str:
    """Last validation loss of the demo as it was on 2026-11-22, by kind of permutation."""
    return _permutations([row for row in _rows("permutations") if row["date"] < "2026-11-23"])


def permutations_since() -> str:
    """The same of the demo as it is, by length, too."""
    return _permutations([row for row in _rows("permutations") if row["date"] >= "2026-11-23"])


def _permutations(rows: list[dict[str, Any]]) -> str:
    body = []

    def run(row: dict[str, Any]) -> tuple[int, str, str]:
        set_by_hand = "0.5" if "poet.init_scale=0.5" in row.get("settings", []) else "1"
        return row["steps"], str(row.get("init_scale", set_by_hand)), row["kind"]

    for steps, norm, kind in sorted(dict.fromkeys(map(run, rows)), key=lambda of: (of[0], -float(of[1]))):
        mine = sorted((row for row in rows if run(row) == (steps, norm, kind)), key=lambda r: r["seed"])
        losses = [r["loss"] for r in mine]
        shown = [f"{statistics.mean(losses):.4f}", ", ".join(f"{loss:.4f}" for loss in losses)]
        body.append([kind, str(steps), norm, str(mine[0]["merges"]), *shown])
    return _markdown(["permutations", "steps", "norm of rows", "merges", "validation loss, mean", "seeds"], body)


def single_step() -> str:
    """Every setting measured, best first within a budget: mean and range over its seeds."""
    return _single_step_lines(by_setting(_rows("single_step")))


def single_step_best() -> str:
    """Of every method at every budget the best setting, and every setting with several seeds."""
    best: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    several = []
    for rows in by_setting(_rows("single_step")):
        row = rows[0]
        key = (row["scale"], row["tokens"], row["method"], row["options"].get("spectrum"), row["merge_every"])
        if key not in best or mean_loss(rows) < mean_loss(best[key]):
            best[key] = rows
        if len(rows) > 1:
            several.append(rows)
    return _single_step_lines([*best.values(), *(rows for rows in several if rows not in best.values())])


def _single_step_lines(runs: list[list[dict[str, Any]]]) -> str:
    body = []
    for rows in sorted(runs, key=lambda rows: (rows[0]["scale"], rows[0]["tokens"], mean_loss(rows))):
        row = rows[0]
        losses = [r["loss"] for r in rows if r["loss"] is not None]
        spread = f"{min(losses):.3f} to {max(losses):.3f}" if len(losses) > 1 else ""
        body.append(
            [
                _budget(row),
                row["method"],
                ", ".join(_settings(row)),
                "diverged" if math.isinf(mean_loss(rows)) else f"{mean_loss(rows):.3f}",
                spread,
                str(len(rows)),
                f"{row['matrix_state_bytes'] / 1e6:.1f}",
                _weights(rows),
            ]
        )
    head = ["model, tokens", "method", "settings", "validation loss", "range", "seeds", "MB of state for the matrices"]
    head.append("effective rank and RMS of the matrices, at the start and after training")
    return _markdown(head, body)


def single_step_rates() -> str:
    """Seed 0 along one rate with all else equal, wherever three or more values of it were run; the best in bold."""
    rows = [LATER | row for row in _rows("single_step") if row["seed"] == 0]
    lines: dict[tuple[str, ...], dict[float, dict[str, Any]]] = {}
    for row in rows:
        for rate in ("lr", "matrix_lr") if row["method"] != "adamw" else ("lr",):
            hidden = {"lr", "matrix_lr"} if row["method"] == "adamw" else {rate}
            name = "base rate" if rate == "lr" else "angle" if row["method"] == "single-step" else "matrix rate"
            what = (_budget(row), row["method"], ", ".join(_settings(row, without=rate)), name)
            lines.setdefault((*what, setting(row, *hidden)), {})[row[rate]] = row
    body = []
    for (budget, method, others, rate, _), found in sorted(lines.items()):
        if len(found) >= 3:
            best = min(mean_loss([row]) for row in found.values())
            values = [(at, _shown(row), row["loss"] == best) for at, row in sorted(found.items())]
            cells = ", ".join(f"**{at:g}: {loss}**" if won else f"{at:g}: {loss}" for at, loss, won in values)
            body.append([budget, method, others, rate, cells])
    return _markdown(["model, tokens", "method", "settings", "varied", "validation loss at each value"], body)


#: One setting of the single step at each budget that others are compared with.
_CENTRES = (
    ("small", 400, {"matrix_lr": 0.012, "block_size": 64, "norm_growth": 0.0}),
    ("small", 1000, {"matrix_lr": 0.006, "block_size": 128, "norm_growth": 8}),
    ("wide", 1000, {"matrix_lr": 0.006, "block_size": 192, "norm_growth": 8}),
    ("5m", 1250, {"matrix_lr": 0.009, "block_size": 128, "norm_growth": 8}),
)


def single_step_changes() -> str:
    """What one change does to each of ``_CENTRES``, the seeds being the same."""
    rows = [LATER | row for row in _rows("single_step") if row["method"] == "single-step"]
    start = {"lr": 0.012, "init_scale": 0.5, "out_scale": 0.25, "init": "normalized"}
    body = []
    for scale, steps, settings in _CENTRES:
        there = [row for row in rows if (row["scale"], row["steps"]) == (scale, steps)]
        options = {"spectrum": "free", "partitions": 1}
        centre = {
            row["seed"]: row
            for row in there
            if row["options"] == options
            and all(row[name] == value for name, value in (start | settings).items())
            and (row["embed_std"], row["beta2"], row["matrix_decay"]) == (0.02, 0.95, 0.0)
        }
        changed: dict[str, list[dict[str, Any]]] = {}
        if 0 not in centre:
            continue
        for row in there:
            if difference := _difference(centre[0], row):
                changed.setdefault(difference, []).append(row)
        losses = ", ".join(_shown(row) for _, row in sorted(centre.items()))
        body.append([_budget(centre[0]), "**" + _said(settings) + "**", losses, ""])
        lines = []
        for difference, found in changed.items():
            seeds = {row["seed"]: row for row in found if row["seed"] in centre}
            delta = statistics.mean(mean_loss([row]) - mean_loss([centre[seed]]) for seed, row in seeds.items())
            shown = ", ".join(_shown(row) for _, row in sorted(seeds.items()))
            lines.append((delta, [_budget(centre[0]), difference, shown, f"{delta:+.3f}"]))
        body += [line for _, line in sorted(lines)]
    return _markdown(["model, tokens", "changed", "validation loss (seeds 0, 1, 2)", "difference, same seeds"], body)


def _difference(centre: dict[str, Any], row: dict[str, Any]) -> str:
    """Which settings differ, if it is one change: one setting, the rule with its angle, or what belongs together."""
    sides = []
    for r in (centre, row):
        key = LATER | json.loads(r["key"])
        sides.append({n: v for n, v in (key | key["options"]).items() if n not in ("seed", "compile", "options")})
    names = [name for name in {**sides[0], **sides[1]} if sides[0].get(name) != sides[1].get(name)]
    belongs = [{"rule", "matrix_lr"}, {"alternate", "matrix_lr"}, {"partition_kind", "resample_every"}]
    belongs += [{"partition_kind", "partitions"}, {"nesterov", "momentum"}, {"lr", "norm_growth"}]
    if len(names) == 1 or set(names) in belongs:
        return _said({name: sides[1].get(name) for name in names})
    return ""


def _shown(row: dict[str, Any]) -> str:
    return "diverged" if row["loss"] is None else f"{row['loss']:.3f}"


def _said(settings: dict[str, Any]) -> str:
    words = {"matrix_lr": "angle", "lr": "base lr"}
    return ", ".join(f"{words.get(name, name)} {value}" for name, value in settings.items())


def _budget(row: dict[str, Any]) -> str:
    return f"{row['scale']}, {row['tokens'] / 1e6:.1f}M"


def _weights(rows: list[dict[str, Any]]) -> str:
    """Of the first seed for which it was recorded."""
    weights = next((row["weights"] for row in rows if "weights" in row and row["weights"]["end"]), None)
    if weights is None:
        return ""
    rank, rms = ([weights[when][what] for when in ("start", "end")] for what in ("effective_rank", "rms"))
    return f"{rank[0]:.2f} → {rank[1]:.2f}, {rms[0]:.3f} → {rms[1]:.3f}"


def _settings(row: dict[str, Any], without: str | None = None) -> list[str]:
    """The rates, but for one of them, and what differs from the usual."""
    rates = [] if without == "lr" else [f"lr {row['lr']:g}"]
    if row["method"] != "adamw" and without != "matrix_lr":
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
    others = {name: row[name] for name, value in (usual | LATER).items() if row[name] != value} | dict(
        sorted(row["options"].items())
    )
    return rates + [
        f"{name} {value:g}" if type(value) is float else f"{name} {value}" for name, value in others.items()
    ]


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
    reach_targets,
    reach_cards,
    reach_contexts,
    host_peak,
    stream_stress,
    loop_overhead,
    prepare_speed,
    compare_tiny,
    compare_tiny_budgets,
    compare_tiny_low,
    compare_tiny_low_budgets,
    compare_small,
    compare_small_budgets,
    compare_5m_short,
    compare_5m_short_budgets,
    integrations,
    fine_tuning,
    fine_tuning_memory,
    sharded_loops,
    rank_bytes,
    fsdp_bytes,
    rank_memory,
    rank_merges,
    scaling_assumptions,
    scaling_checked,
    scaling_planned,
    merges,
    merges_spectra,
    layer,
    step,
    gpu_layer,
    roofline,
    gpu_step,
    gpu_routes,
    memory_measured,
    continuity,
    stability_usual,
    stability_normless,
    stability_deep,
    permutations,
    permutations_since,
    single_step,
    single_step_best,
    single_step_rates,
    single_step_changes,
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
