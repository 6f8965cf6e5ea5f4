"""Predicted peak memory against every published cell, the table of targets, and a sweep of the sequence length.

    python -m benchmarks.memory published targets batches sequences --out benchmarks/results/memory.jsonl
    python -m benchmarks.memory measured --out benchmarks/results/memory.jsonl   (needs a GPU: real steps of some cells)
    python -m benchmarks.memory render --out benchmarks/results/memory.jsonl     (docs/memory.md and its plot)

Appends one JSON line a prediction or measurement, so that an interrupted run keeps what it has; ``render`` takes the
newest line of each cell. Only ``measured`` needs a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, append, provenance
from poetx.bench.timing import milliseconds
from poetx.planner import GIB, estimate_memory, largest_batch
from poetx.recipe import load_recipe

DOCS = Path(__file__).parent.parent / "docs"
SIZES = ("llama-3b", "llama-8b", "llama-13b")
LENGTHS = (512, 1024, 2048)
#: Peak GB (2³⁰ bytes) of one 80 GB H100 at batch 1 (arXiv 2603.05500), by method and block size: for each model the
#: three lengths; None is out of memory.
PUBLISHED: dict[tuple[str, int], tuple[float | None, ...]] = {
    ("adamw", 0): (28.74, 28.78, 31.43, 78.89, 76.34, 78.69, None, None, None),
    ("muon", 0): (18.62, 19.27, 21.82, 50.30, 53.46, 54.98, 76.32, 77.02, None),
    ("lora", 0): (13.60, 16.79, 22.68, 27.90, 33.63, 43.78, 42.48, 49.78, 63.50),
    ("fast", 256): (13.41, 16.31, 21.49, 28.65, 33.14, 43.08, 42.77, 48.95, 61.87),
    ("fast", 512): (17.77, 20.75, 26.06, 36.08, 41.94, 50.81, 53.11, 59.12, 71.88),
    ("mem", 256): (11.96, 13.28, 15.47, 25.94, 27.87, 31.74, 35.65, 41.62, 47.21),
    ("mem", 512): (16.31, 18.33, 20.48, 32.93, 35.94, 40.44, 49.63, 53.26, 59.02),
}


def settings(method: str, *, seq_len: int = 1024, batch: int = 1, more: str = "") -> list[str]:
    """Overrides of a recipe: one method in the setting of the papers' tables, everything in bfloat16."""
    rotations = " poet.rotation_dtype=bfloat16" if method in ("mem", "fast", "int8", "int4", "single-step-mem") else ""
    state = "optimizer.state_dtype=same " if "state_dtype" not in more and method != "adamw-8bit" else ""
    sizes = f"data.seq_len={seq_len} train.batch_size={batch} train.micro_batch_size={batch}"
    return f"method={method} {sizes}{rotations} {state}{more}".split()


_SAVING = "model.gradient_checkpointing=true train.chunked_loss=true"
_RELEASED = "optimizer.release_gradients=true optimizer.clip=null"
_STACK = f"{_SAVING} {_RELEASED} optimizer.state_dtype=int8"
_NARROW = "optimizer.state_dtype=bfloat16"  # rounded stochastically: torch's own AdamW loses by rounding (stack)
_REAL = "model.num_key_value_heads=8 data.vocab_size=128256"
#: By cell: a recipe, its settings, and what it may take at most; None: there to compare with.
TARGETS: dict[str, tuple[str, list[str], float | None]] = {
    "8B, 1 × 1024, AdamW, full stack": ("llama-8b", settings("adamw-8bit", more=f"{_SAVING} {_RELEASED}"), None),
    "8B, 1 × 1024, mem, no checkpointing": ("llama-8b", settings("mem", more=_NARROW), 25.5),
    "the same, checkpointing and chunked loss": ("llama-8b", settings("mem", more=f"{_SAVING} {_NARROW}"), 20.5),
    "the same, 8-bit state and released gradients": ("llama-8b", settings("mem", more=_STACK), 18.5),
    "13B, 1 × 2048, full stack": ("llama-13b", settings("mem", seq_len=2048, more=_STACK), 32.0),
    "Llama-3.1-8B shape, 2 × 2048, full stack": (
        "llama-8b",
        settings("mem", seq_len=2048, batch=2, more=f"{_STACK} {_REAL}"),
        22.0,
    ),
    "8B, 1 × 1024, int8, full stack": ("llama-8b", settings("int8", more=_STACK), 12.5),
    "8B, 1 × 1024, int4, full stack": ("llama-8b", settings("int4", more=_STACK), 9.0),
    "13B, 1 × 2048, int8, full stack": ("llama-13b", settings("int8", seq_len=2048, more=_STACK), 22.0),
    "Llama-3.1-8B shape, 2 × 2048, int8, full stack": (
        "llama-8b",
        settings("int8", seq_len=2048, batch=2, more=f"{_STACK} {_REAL}"),
        16.0,
    ),
    # At most what mem takes with the same stack, the third row.
    "8B, 1 × 1024, single-step, full stack": (
        "llama-8b",
        settings("single-step-mem", more=f"{_STACK} poet.update=rotation"),
        18.14,
    ),
    "8B, 1 × 1024, single-step, free spectrum, b=128, full stack": (
        "llama-8b",
        settings("single-step-mem", more=f"{_STACK} poet.update=free poet.block_size=128"),
        18.14,
    ),
}
BATCHES: dict[str, list[str]] = {
    "AdamW mixed": settings("adamw-mixed"),
    "AdamW bf16": settings("adamw"),
    "POET-X fast": settings("fast"),
    "POET-X mem": settings("mem", more=_NARROW),
    "POET-X mem, 8-bit state": settings("mem", more="optimizer.state_dtype=int8"),
    "AdamW mixed, chunked loss": settings("adamw-mixed", more="train.chunked_loss=true"),
    "AdamW bf16, chunked loss": settings("adamw", more="train.chunked_loss=true"),
    "POET-X mem, chunked loss": settings("mem", more=f"train.chunked_loss=true {_NARROW}"),
    "AdamW mixed, checkpointing and chunked loss": settings("adamw-mixed", more=_SAVING),
    "AdamW bf16, checkpointing and chunked loss": settings("adamw", more=_SAVING),
    "AdamW bf16, full stack": settings("adamw-8bit", more=f"{_SAVING} {_RELEASED}"),
    "POET-X mem, checkpointing and chunked loss": settings("mem", more=f"{_SAVING} {_NARROW}"),
    "the same, fast inside checkpointed layers": settings("mem", more=f"{_SAVING} {_NARROW} model.recompute=fast"),
    "POET-X mem, full stack": settings("mem", more=_STACK),
}
SWEEP = tuple(2048 << i for i in range(7))
SWEEP_SETTINGS = {"mem": "", "mem, checkpointing and chunked loss": _SAVING}


def predict(kind: str, name: str, recipe: str, overrides: list[str]) -> dict[str, Any]:
    started, worked = time.perf_counter(), time.process_time()
    estimate = estimate_memory(recipe, overrides)
    return {
        "benchmark": f"memory-{kind}",
        "cell": name,
        "model": recipe,
        "predicted_gib": round(estimate.gib, 3),
        "phase": estimate.phase,
        "gib": {key: round(value / GIB, 3) for key, value in estimate.categories.items()},
        "rotations_gib": {key: round(value / GIB, 3) for key, value in estimate.rotations.items()},
        "parameters": estimate.parameters,
        "trainable": estimate.trainable,
        "settings": overrides,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),
    }


def published(done: set[str]) -> Iterator[dict[str, Any]]:
    for (method, block_size), cells in PUBLISHED.items():
        for index, reported in enumerate(cells):
            model, seq_len = SIZES[index // 3], LENGTHS[index % 3]
            name = f"{method} {block_size or ''}".strip() + f" {model} {seq_len}"
            if name not in done:
                row = predict("published", name, model, _published_settings(method, block_size, seq_len))
                yield row | {"published_gib": reported, "error_percent": _error(row["predicted_gib"], reported)}


def _published_settings(method: str, block_size: int, seq_len: int) -> list[str]:
    more = f"poet.block_size={block_size}" if block_size else "lora.rank=160" if method == "lora" else ""
    return settings(method, seq_len=seq_len, more=more)


def _error(predicted: float | None, reported: float | None) -> float | None:
    return None if predicted is None or reported is None else round(100 * (predicted / reported - 1), 1)


def targets(done: set[str]) -> Iterator[dict[str, Any]]:
    for name, (recipe, overrides, limit) in TARGETS.items():
        if name not in done:
            yield predict("target", name, recipe, overrides) | {"at_most_gib": limit}


def batches(done: set[str]) -> Iterator[dict[str, Any]]:
    for name, overrides in BATCHES.items():
        if name in done:
            continue
        limit = largest_batch("llama-1b-12l", 24, overrides)
        yield {
            "benchmark": "memory-batch",
            "cell": name,
            "model": "llama-1b-12l",
            "budget_gib": 24,
            "largest_batch": limit.batch_size,
            "predicted_gib": round(limit.at_limit.gib, 3),
            "settings": overrides,
        }


def sequences(done: set[str]) -> Iterator[dict[str, Any]]:
    for name, more in SWEEP_SETTINGS.items():
        for seq_len in SWEEP:
            if f"{name} {seq_len}" not in done:
                overrides = settings("mem", seq_len=seq_len, more=more)
                row = predict("sequence", f"{name} {seq_len}", "llama-8b", overrides)
                yield row | {"seq_len": seq_len, "line": name}


#: Cells whose step is taken for real, in this order: (kind, cell).
MEASURED: tuple[tuple[str, str], ...] = (
    ("target", "the same, 8-bit state and released gradients"),
    ("target", "8B, 1 × 1024, mem, no checkpointing"),
    ("published", "mem 256 llama-8b 1024"),
    ("published", "fast 256 llama-8b 1024"),
    ("target", "8B, 1 × 1024, single-step, free spectrum, b=128, full stack"),
    ("target", "8B, 1 × 1024, int8, full stack"),
    ("published", "adamw llama-8b 1024"),
    ("target", "8B, 1 × 1024, AdamW, full stack"),
    ("target", "Llama-3.1-8B shape, 2 × 2048, full stack"),
    ("target", "8B, 1 × 1024, single-step, full stack"),
    ("target", "8B, 1 × 1024, int4, full stack"),
    ("target", "the same, checkpointing and chunked loss"),
    ("published", "lora llama-8b 1024"),
    ("published", "mem 256 llama-8b 2048"),
    ("published", "mem 256 llama-3b 1024"),
    ("published", "muon llama-3b 1024"),
)


def _cell_settings(kind: str, cell: str) -> tuple[str, list[str]]:
    """The recipe of a cell of :data:`MEASURED` and its settings."""
    if kind == "target":
        return TARGETS[cell][:2]
    for method, block_size in PUBLISHED:
        label = f"{method} {block_size or ''}".strip()
        if cell.startswith(f"{label} llama-"):
            model, seq_len = cell.removeprefix(f"{label} ").split()
            return model, _published_settings(method, block_size, int(seq_len))
    raise KeyError(cell)


def measured(done: set[str]) -> Iterator[dict[str, Any]]:
    """Peak of the allocator in a step after one that made the optimizer's state and tuned the kernels."""
    from poetx.bench.step import build_run, from_dense

    device = torch.device("cuda", torch.cuda.current_device())
    for kind, cell in MEASURED:
        name = f"{kind}: {cell}"
        if name in done:
            continue
        model, overrides = _cell_settings(kind, cell)
        started = time.perf_counter()
        recipe = from_dense(load_recipe(model, overrides, text=False))
        row: dict[str, Any] = {"benchmark": "memory-measured", "cell": name, "model": model, "settings": overrides}
        row |= {"of": f"memory-{kind}", "of_cell": cell, "measured_gib": None}
        run = ids = None
        try:
            run = build_run(recipe, device)
            built = time.perf_counter() - started
            ids = torch.randint(recipe.data.vocab_size, (recipe.train.micro_batch, recipe.data.seq_len)).to(device)
            first = run.step(ids)
            torch.cuda.reset_peak_memory_stats(device)
            ms = milliseconds(partial(run.step, ids), device)
            peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
            row |= {"measured_gib": round(peak / GIB, 3), "reserved_gib": round(reserved / GIB, 3)}
            row |= {"step_ms": round(ms, 1), "build_s": round(built, 1), "loss": [first, run.step(ids)]}
        except torch.OutOfMemoryError:
            pass
        del run, ids
        gc.collect()
        torch.cuda.empty_cache()
        yield row | {"seconds": round(time.perf_counter() - started, 1)} | provenance(device)


KINDS = {"published": published, "targets": targets, "batches": batches, "sequences": sequences, "measured": measured}


class _AllBut(set[str]):
    """Contains what it was not given."""

    def __contains__(self, cell: object) -> bool:
        return not super().__contains__(cell)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="+", choices=[*KINDS, "render"])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines: appended to, or rendered")
    parser.add_argument("--only", nargs="*", help="these cells, of the kind named")
    parser.add_argument("--missing", action="store_true", help="leave out cells that the file has already")
    args = parser.parse_args()
    origin = provenance(torch.device("cpu"))
    for what in args.what:
        if what == "render":
            render(args.out)
            continue
        done: Any = {cell for cells in read(args.out).values() for cell in cells} if args.missing else set()
        if args.only:
            done = _AllBut(args.only)
        for row in KINDS[what](done):
            append(args.out, [origin | row])
            shown = (
                row.get("measured_gib"),
                row.get("predicted_gib"),
                row.get("published_gib") or row.get("at_most_gib"),
                row.get("largest_batch"),
            )
            print(row["cell"], *(value for value in shown if value is not None), flush=True)


def read(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The newest row of every cell, by kind."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["benchmark"], {})[row["cell"]] = row
    return rows


def render(path: Path) -> None:
    """``docs/memory.md`` between its markers, and the plot of the sweep."""
    rows = read(path)
    document = DOCS / "memory.md"
    text = document.read_text(encoding="utf-8")
    tables = {
        "published": _published_table,
        "targets": _target_table,
        "batches": _batch_table,
        "sequences": _sequence_table,
        "stack": _stack_table,
    }
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = before + start + table(rows) + end + after
    document.write_text(text, encoding="utf-8")
    _plot(rows.get("memory-sequence", {}))


def _published_table(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    found = rows.get("memory-published", {})
    lines = [
        "| | " + " | ".join(f"{model.removeprefix('llama-').upper()} {n}" for model in SIZES for n in LENGTHS) + " |"
    ]
    lines.append("|---" * 10 + "|")
    for method, block_size in PUBLISHED:
        label = f"{method} {block_size or ''}".strip()
        cells = [found.get(f"{label} {model} {seq_len}") for model in SIZES for seq_len in LENGTHS]
        if any(cells):
            lines.append(f"| {label} | " + " | ".join(_cell(row) for row in cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    predicted, reported = (
        "OOM" if row[name] is None else f"{row[name]:.2f}" for name in ("predicted_gib", "published_gib")
    )
    error = row["error_percent"]
    return f"{predicted} / {reported}" + ("" if error is None else f" ({error:+.1f} %)")


def _target_table(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    names = ("frozen", "trainable", "gradient", "optimizer", "activations", "temporary")
    lines = [f"| setting | at most | predicted | {' | '.join(names)} |", "|---" * 9 + "|"]
    for name in TARGETS:
        row = rows.get("memory-target", {}).get(name)
        if row is None:
            continue
        parts = " | ".join(f"{row['gib'][name]:.2f}" for name in names)
        lines.append(f"| {row['cell']} | {row['at_most_gib'] or '–'} | **{row['predicted_gib']:.2f}** | {parts} |")
    return "\n".join(lines) + "\n"


def _batch_table(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = ["| on 24 GB | largest batch | its peak |", "|---|---|---|"]
    for name in BATCHES:
        row = rows.get("memory-batch", {}).get(name)
        if row:
            lines.append(f"| {name} | {row['largest_batch']} | {row['predicted_gib']:.2f} |")
    return "\n".join(lines) + "\n"


def _sequence_table(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    found = rows.get("memory-sequence", {})
    lines = ["| tokens | " + " | ".join(SWEEP_SETTINGS) + " |", "|---" * (len(SWEEP_SETTINGS) + 1) + "|"]
    for seq_len in SWEEP:
        cells = [found.get(f"{name} {seq_len}") for name in SWEEP_SETTINGS]
        lines.append(f"| {seq_len} | " + " | ".join(f"{c['predicted_gib']:.2f}" if c else "–" for c in cells) + " |")
    return "\n".join(lines) + "\n"


def _stack_table(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    """From the rows of ``benchmarks.stack``, which lie next to ours: differences to the plain run of the same seed."""
    path = RESULTS / "stack.jsonl"
    losses: dict[tuple[int, str], dict[int, float]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        losses.setdefault((row.get("batch_size", 8), row["variant"]), {})[row["seed"]] = row["validation_loss"]
    lines = ["| batch | savings | loss | difference to plain, seed by seed | mean |", "|---|---|---|---|---|"]
    for (batch, name), found in sorted(losses.items(), key=lambda item: item[0][0]):
        plain = losses.get((batch, "plain"), {})
        differences = [loss - plain[seed] for seed, loss in sorted(found.items()) if seed in plain]
        if differences:
            shown = ", ".join(f"{difference:+.4f}" for difference in differences)
            loss, mean = (sum(values) / len(values) for values in (found.values(), differences))
            lines.append(f"| {batch} | {name} | {loss:.4f} | {shown} | **{mean:+.4f}** |")
    return "\n".join(lines) + "\n"


def _plot(found: dict[str, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in SWEEP_SETTINGS:
        points = [(r["seq_len"], r["predicted_gib"]) for r in found.values() if r["line"] == name]
        if points:
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, marker="o", label=name)
    axes.set(
        xlabel="tokens in the sequence", ylabel="predicted peak, GB (2³⁰ bytes)", title="Llama-8B, batch 1, bfloat16"
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(DOCS / "memory-seq.png", dpi=120)


if __name__ == "__main__":
    main()
