"""``poetx memory``: what a training run will take, on any laptop."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from poetx.config import WEIGHT_FORMATS
from poetx.errors import UserError

if TYPE_CHECKING:
    from poetx.planner.batch_limit import BatchLimit
    from poetx.planner.estimate import MemoryEstimate
    from poetx.planner.setup import TrainingSetup

_COLOURS = {
    "frozen": "blue",
    "trainable": "cyan",
    "gradient": "magenta",
    "optimizer": "yellow",
    "activations": "green",
    "temporary": "red",
}
_EPILOG = (
    "Examples: poetx memory --model llama-8b | poetx memory --model llama-8b --compare adamw,fast,mem,int8 --gpu 24 | "
    "poetx memory --model path/to/config.json --mode mem --stack --json"
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="memory", epilog=_EPILOG)(memory)


def memory(
    model: Annotated[
        str, typer.Option(help="Shape (llama-60m … llama-13b, llama-3.1-8b), config.json, or its directory.")
    ] = "llama-1b",
    mode: Annotated[
        str,
        typer.Option(
            help="mem, fast, single-step, single-step-mem, adamw, adamw-mixed, adamw-8bit, muon, adafactor, lora, or a "
            "--weight-format."
        ),
    ] = "mem",
    compare: Annotated[str | None, typer.Option(help="Several modes, separated by commas.")] = None,
    block_size: Annotated[int, typer.Option(help="Of POET-X.")] = 256,
    partitions: Annotated[int, typer.Option(help="Of single-step.")] = 2,
    spectrum: Annotated[str, typer.Option(help="Of single-step: fixed or free.")] = "fixed",
    weight_format: Annotated[
        str | None, typer.Option(help="Of mem's frozen weight: int8, int4, nf4, fp8, bipolar-int2 … bipolar-int8.")
    ] = None,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale in such a format.")] = 128,
    weight_extra_bits: Annotated[
        bool, typer.Option("--weight-residual", help="4 more bits in such a format, 8 in bfloat16, for merging.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Sequences in one backward pass.")] = 1,
    seq_len: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 1024,
    dtype: Annotated[str, typer.Option(help="Of weights and arithmetic: bfloat16 or float32.")] = "bfloat16",
    rotation_dtype: Annotated[
        str, typer.Option(help="Of packed rotations: float32, or bfloat16 (the papers').")
    ] = "float32",
    optimizer_state: Annotated[str, typer.Option(help="Of AdamW: same, bfloat16 or int8.")] = "same",
    base_optimizer: Annotated[
        str, typer.Option(help="For embeddings and head: adamw, adafactor, smmf or hfac.")
    ] = "adamw",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Keep only each decoder layer's input.")
    ] = False,
    chunked_loss: Annotated[bool, typer.Option("--chunked-loss", help="Never the full logits.")] = False,
    release_gradients: Annotated[
        bool, typer.Option("--release-gradients", help="Update embeddings and head during backward.")
    ] = False,
    recompute: Annotated[
        str, typer.Option(help="Inside checkpointed layers: fast (one product fewer), mem (smaller), or auto.")
    ] = "auto",
    stack: Annotated[
        bool, typer.Option("--stack", help="All savings: the last three, 8-bit state, bfloat16 rotations.")
    ] = False,
    reserved: Annotated[
        bool,
        typer.Option("--reserved", help="Also what the process will hold: the caching allocator's segments. Slower."),
    ] = False,
    gpu: Annotated[float | None, typer.Option(help="Card's memory in GB (2^30 bytes): find the largest batch.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart here (.png, .svg or .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Predict the peak memory of one training step, without a GPU."""

    settings: dict[str, Any] = {
        "block_size": block_size,
        "partitions": partitions,
        "spectrum": spectrum,
        "weight_format": weight_format,
        "group_size": group_size,
        "weight_extra_bits": weight_extra_bits,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "dtype": dtype,
        "rotation_dtype": rotation_dtype,
        "activation_checkpointing": checkpointing or stack,
        "recompute": recompute,
        "chunked_loss": chunked_loss or stack,
        "release_gradients": release_gradients or stack,
    }
    if stack:
        settings["rotation_dtype"] = "bfloat16"
        optimizer_state = "int8" if optimizer_state == "same" else optimizer_state
    modes = [mode] if compare is None else [name.strip() for name in compare.split(",") if name.strip()]
    if not modes:
        raise UserError(f"compare={compare}: names no mode; for example --compare adamw,mem")
    setups = [_setup(name, settings, optimizer_state, base_optimizer, alone=len(modes) == 1) for name in modes]
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"plot={plot}: must end in .png, .svg or .pdf")
    if gpu is not None and not 0 < gpu < math.inf:
        raise UserError(f"gpu={gpu}: must be a positive, finite number of GB")
    _run(model, setups, gpu=gpu, plot=plot, as_json=as_json, reserved=reserved)


def _setup(
    method: str, settings: dict[str, Any], optimizer_state: str, base_optimizer: str, *, alone: bool
) -> TrainingSetup:
    """In a comparison, what a method has no use for is left out instead of refused."""
    from poetx.planner.setup import POET_METHODS, TrainingSetup

    if method in WEIGHT_FORMATS:
        if alone and settings["weight_format"] not in (None, method):
            raise UserError(
                f"weight_format={settings['weight_format']}: mode={method} is another format; use one of them"
            )
        method, settings = "mem", settings | {"weight_format": method}
    elif method != "mem" and not alone:
        kept = {"weight_extra_bits": settings["weight_extra_bits"] and method in POET_METHODS}
        settings = settings | {"weight_format": None} | kept
    setup = TrainingSetup(method=method, **settings)
    if alone or setup.uses_own_adamw:
        setup = setup.replace(optimizer_state=optimizer_state)
    if alone or method in POET_METHODS:
        setup = setup.replace(base_optimizer=base_optimizer)
    return setup


def _run(
    model: str, setups: list[TrainingSetup], *, gpu: float | None, plot: Path | None, as_json: bool, reserved: bool
) -> None:
    from rich.console import Console

    from poetx.planner.batch_limit import largest_batch
    from poetx.planner.estimate import estimate_memory

    console = Console()
    estimates, limits = [], []
    for setup in setups:
        with Console(stderr=True).status(f"{setup.label}: one step of {model} on fake tensors"):
            estimates.append(estimate_memory(model, setup, card_gib=math.inf if reserved else None))
            if gpu is not None:
                limits.append(largest_batch(model, setup, gpu))
    if plot is not None:
        draw(plot, model, estimates)
    if as_json:
        print(json.dumps(_document(model, estimates, limits, gpu), indent=1))
        return
    _show_table(console, model, estimates)
    for line in advice(limits, gpu):
        console.print(line, highlight=False, soft_wrap=True)
    if plot is not None:
        console.print(f"wrote {plot}", highlight=False, soft_wrap=True)


def _document(
    model: str, estimates: list[MemoryEstimate], limits: list[BatchLimit], gpu: float | None
) -> dict[str, Any]:
    document: dict[str, Any] = {"model": model, "estimates": [estimate.to_dict() for estimate in estimates]}
    if gpu is not None:
        document["gpu_gib"] = gpu
        document["largest_batch"] = {limit.at_limit.setup.label: limit.batch_size for limit in limits}
    return document


def _show_table(console: Any, model: str, estimates: list[MemoryEstimate]) -> None:
    from rich.table import Table

    from poetx.memory.tracker import CATEGORIES
    from poetx.planner.estimate import GIB

    setup = estimates[0].setup
    title = f"{model}, batch {setup.batch_size} x {setup.seq_len}, {setup.dtype}: peak of one step, GB (2^30 bytes)"
    console.print(title, highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("", no_wrap=True)
    for estimate in estimates:
        table.add_column(estimate.setup.label, justify="right", no_wrap=True)
    for name in CATEGORIES:
        table.add_row(f"[{_COLOURS[name]}]■[/] {name}", *(f"{e.categories[name] / GIB:.2f}" for e in estimates))
        if name in ("trainable", "gradient", "optimizer") and any(sum(e.rotations.values()) for e in estimates):
            table.add_row("    of rotations", *(f"{e.rotations[name] / GIB:.2f}" for e in estimates), style="dim")
    table.add_section()
    table.add_row("peak", *(f"{e.gib:.2f}" for e in estimates), style="bold")
    table.add_row("when", *(e.phase for e in estimates))
    if estimates[0].reserved is not None:
        table.add_row("held by the allocator", *(f"{(e.reserved or 0) / GIB:.2f}" for e in estimates))
    table.add_row("trained parameters", *(f"{e.trainable / 1e6:.1f}M" for e in estimates))
    console.print(table)
    width = max(20, min(60, console.width - 24))
    largest = max(e.peak for e in estimates)
    for estimate in estimates:
        console.print(f"{estimate.setup.label:12} {bar(estimate.categories, width / largest)} {estimate.gib:.1f}")


def bar(categories: dict[str, int], scale: float) -> str:
    """Coloured blocks, ``scale`` characters a byte; what is left of one category's block goes to the next."""
    drawn, total, text = 0, 0, ""
    for name, size in categories.items():
        total += size
        blocks = round(total * scale) - drawn
        drawn += blocks
        text += f"[{_COLOURS[name]}]{'█' * blocks}[/]" if blocks else ""
    return text


def advice(limits: list[BatchLimit], gpu: float | None) -> list[str]:
    """What fits on the card, one line a method, and the batch at which AdamW is left behind."""
    lines = []
    for limit in limits:
        method, setup = limit.at_limit.setup.label, limit.at_limit.setup
        if limit.batch_size:
            what = f"fits, up to batch {limit.batch_size} x {setup.seq_len} ({limit.at_limit.gib:.1f} GB)"
        else:
            what = f"does not fit: one sequence takes {limit.at_limit.gib:.1f} GB"
        lines.append(f"{method} on {gpu:g} GB: {what}")
    dense = [limit for limit in limits if limit.at_limit.setup.method.startswith("adamw")]
    best = max((limit for limit in limits if limit.at_limit.setup.is_poet), key=lambda x: x.batch_size, default=None)
    for limit in dense:
        if best is not None and best.batch_size > limit.batch_size:
            ours, theirs = best.at_limit.setup.label, limit.at_limit.setup.label
            lines.append(
                f"from batch {limit.batch_size + 1} to {best.batch_size} {ours} still fits where {theirs} does not"
            )
    return lines


def draw(path: Path, model: str, estimates: list[MemoryEstimate]) -> None:
    """One stacked bar a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from poetx.memory.tracker import CATEGORIES
    from poetx.planner.estimate import GIB

    setup = estimates[0].setup
    figure, axes = plt.subplots(figsize=(7, 1.4 + 0.5 * len(estimates)), layout="constrained")
    names = [re.sub("^(fast|mem)$", r"POET-X \1", estimate.setup.label) for estimate in estimates]
    left = [0.0] * len(estimates)
    for category in CATEGORIES:
        sizes = [estimate.categories[category] / GIB for estimate in estimates]
        axes.barh(names, sizes, left=left, label=category, color=f"tab:{_plain(_COLOURS[category])}")
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="GB (2³⁰ bytes)", title=f"{model}, batch {setup.batch_size} × {setup.seq_len}: predicted peak")
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.35), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _plain(colour: str) -> str:
    return {"magenta": "pink", "yellow": "olive"}.get(colour, colour)
