"""``poetx memory``: what a training run will take, on any laptop."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from poetx.cli.bench import names_in
from poetx.cli.recipes import CommandWithSettings, say_idle
from poetx.errors import UserError
from poetx.files import unwritten

if TYPE_CHECKING:
    from poetx.planner.batch_limit import BatchLimit
    from poetx.planner.estimate import MemoryEstimate
    from poetx.recipe import Recipe

_COLOURS = {
    "frozen": "blue",
    "trainable": "cyan",
    "gradient": "magenta",
    "optimizer": "yellow",
    "gathered": "white",
    "activations": "green",
    "temporary": "red",
}
_WIDTH = 160  # that a table with a line for each method needs
_EPILOG = (
    "Examples: poetx memory llama-8b | poetx memory llama-8b --methods adamw,fast,mem,int8 --gpu 24 | "
    "poetx memory llama-3.1-70b data.seq_len=2048 train.batch_size=1 --gpu 48 --host 96 | "
    "poetx memory mine.yaml model.pretrained=DIR data.seq_len=2048 --json"
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="memory", epilog=_EPILOG, cls=CommandWithSettings)(memory)


def memory(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Built-in name, YAML file or run directory.")
    ] = "demo",
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe settings.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="The recipe by each of these, separated by commas: mem, int8, single-step, adamw, lora …"),
    ] = None,
    gpus: Annotated[
        int, typer.Option(min=1, help="Processes of torchrun that share each batch: what one of them takes.")
    ] = 1,
    gpu: Annotated[float | None, typer.Option(help="Card's memory in GB (2^30 bytes): find the largest batch.")] = None,
    host: Annotated[
        float | None,
        typer.Option(
            help="The host's memory in GB, with --gpu: in which ways the frozen weights fit, and at what cost."
        ),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(metavar="GB/S,TFLOP/S", help="With --host: what poetx env --measure found, not known cards."),
    ] = None,
    device: Annotated[str, typer.Option(help="Whose allocator and kernels: cuda or cpu.")] = "cuda",
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart here (.png, .svg or .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Predict the peak memory of one training step, without a GPU."""
    settings = list(overrides or ())
    say_idle(settings)
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"plot={plot}: must end in .png, .svg or .pdf")
    if gpu is not None and not 0 < gpu * 2**30 < math.inf:
        raise UserError(f"gpu={gpu}: must be a positive, finite number of GB")
    if host is not None:
        if gpu is None or methods is not None or plot is not None:
            raise UserError("--host: goes with --gpu, and without --methods and --plot")
        if not 0 < host * 2**30 < math.inf:
            raise UserError(f"host={host}: must be a positive, finite number of GB")
        (planned,) = _planned(recipe, settings, None).values()
        from poetx.planner.estimate import part_of

        _show_ways(part_of(planned, gpus), gpu, host, link=link, device=device, as_json=as_json)
        return
    if link is not None:
        raise UserError("--link: goes with --host")
    names = None if methods is None else names_in("methods", methods)
    _run(_planned(recipe, settings, names), gpus=gpus, gpu=gpu, device=device, plot=plot, as_json=as_json)


def _planned(source: str, overrides: Sequence[str], methods: Sequence[str] | None) -> dict[str, Recipe]:
    """Recipes by a name for the table."""
    from poetx.recipe import load_recipe
    from poetx.recipe.several import load_methods

    if methods is not None:
        return load_methods(source, overrides, methods)
    plain = load_recipe(source, overrides, text=False)
    return {plain.name: plain}


def _run(
    recipes: dict[str, Recipe], *, gpus: int, gpu: float | None, device: str, plot: Path | None, as_json: bool
) -> None:
    from rich.console import Console

    from poetx.planner.batch_limit import largest_batch
    from poetx.planner.estimate import estimate_memory

    console = Console()
    estimates: dict[str, MemoryEstimate] = {}
    limits: dict[str, BatchLimit] = {}
    for name, recipe in recipes.items():
        with Console(stderr=True).status(f"{name}: one step of {recipe.name} on fake tensors"):
            estimates[name] = estimate_memory(recipe, device=device, ranks=gpus)
            if gpu is not None:
                limits[name] = largest_batch(recipe, gpu, device=device, ranks=gpus)
    title = _title(next(iter(estimates.values())), gpus)
    if plot is not None:
        draw(plot, title, estimates)
    if as_json:
        document: dict[str, Any] = {"estimates": {name: estimate.to_dict() for name, estimate in estimates.items()}}
        if gpu is not None:
            document |= {"gpu_gib": gpu, "largest_batch": {name: limit.batch_size for name, limit in limits.items()}}
        print(json.dumps(document, indent=1))
        return
    _show_table(console, title, estimates)
    for line in advice(limits, gpu):
        console.print(line, highlight=False, soft_wrap=True)
    if plot is not None:
        console.print(f"wrote {plot}", highlight=False, soft_wrap=True)


def _show_ways(recipe: Recipe, gpu: float, host: float, *, link: str | None, device: str, as_json: bool) -> None:
    """Each way to keep the frozen weights, whether it fits, and the recipe lines of the first that does."""
    from rich.console import Console
    from rich.table import Table

    from poetx.planner.reach import DISK, LINKS, Link, ways

    links = LINKS if link is None else {"here": Link.parse(link)}
    speeds = [f"{name} tokens/s" for name in links]
    console = Console()
    table = Table()
    for place, name in enumerate(("frozen weights", "card GB", "host GB", "disk GB", "fits", *links, *speeds)):
        table.add_column(name, no_wrap=True, justify="right" if place else "left")
    rows, first = [], None
    for way in ways(recipe, device=device):
        fits = way.device_gib <= gpu and way.host_gib <= host
        first = first or (way if fits else None)
        name = f"{way.keys.get('poet.weight_format') or way.estimate.recipe.train.dtype}, "
        name += "from files" if way.estimate.file else "streamed" if way.keys["model.offload"] else "resident"
        needed = {name: way.enough_tokens(each) for name, each in links.items()}
        speed = {name: round(way.tokens_per_second(each)) for name, each in links.items()}
        rows.append({"name": name, "fits": fits, "keys": way.keys, "enough_tokens": needed, "tokens_per_second": speed})
        rows[-1] |= {"estimate": way.estimate.to_dict()}
        table.add_row(
            *(name, f"{way.device_gib:.1f}", f"{way.host_gib:.1f}"),
            *(f"{way.estimate.file / 2**30:.1f}" if way.estimate.file else "", "yes" if fits else "no"),
            *(f"{tokens:,}" if tokens else "" for tokens in needed.values()),
            *(f"{tokens:,}" for tokens in speed.values()),
        )
    if as_json:
        print(json.dumps({"gpu_gib": gpu, "host_gib": host, "ways": rows}, indent=1))
        return
    pass_ = f"{recipe.train.micro_batch} x {recipe.data.seq_len} tokens a pass"
    console.print(f"{recipe.name}, {pass_}, card {gpu:g} GB, host {host:g} GB (2^30 bytes)", highlight=False)
    Console(width=max(console.width, _WIDTH)).print(table)
    say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
    say(f"{', '.join(links)}: tokens a pass from which on the products take longer there than the copies beside them")
    say(f"tokens/s: at most, by products and copies alone; from files at {DISK / 1e9:g} GB/s")
    if first is None:
        say("none fits; use a shorter data.seq_len, a smaller poet.block_size or a smaller model")
        return
    words = {None: "null", True: "true", False: "false"}
    keys = " ".join(f"{key}={words.get(value, value)}" for key, value in first.keys.items())
    say(f"the first that fits: {keys}")


def _title(estimate: MemoryEstimate, gpus: int) -> str:
    recipe = estimate.recipe
    several = f"one of {gpus} processes, parallel={recipe.parallel}, " if gpus > 1 else ""
    if recipe.parallel == "fsdp" and gpus == 1:
        several = "one process, nothing sharded (--gpus N plans one of N), "
    passes = recipe.train.batch_size // recipe.train.micro_batch
    accumulated = f", {passes} of them a step" if passes > 1 else ""
    return f"{recipe.name}, {several}{recipe.train.micro_batch} x {recipe.data.seq_len} tokens a pass{accumulated}"


def _show_table(console: Any, title: str, estimates: dict[str, MemoryEstimate]) -> None:
    from rich.console import Console
    from rich.table import Table

    from poetx.memory.tracker import CATEGORIES
    from poetx.planner.estimate import GIB

    every = list(estimates.values())
    console.print(f"{title}: peak of one step, GB (2^30 bytes)", highlight=False, soft_wrap=True)
    lines = [["", *estimates]]
    for category in CATEGORIES:
        if category == "gathered" and not any(e.categories[category] for e in every):
            continue  # of what fully_shard parts alone
        lines.append(
            [f"[{_COLOURS[category]}]■[/] {category}", *(f"{e.categories[category] / GIB:.2f}" for e in every)]
        )
        if category in ("trainable", "gradient", "optimizer") and any(sum(e.rotations.values()) for e in every):
            lines.append(["    of rotations", *(f"{e.rotations[category] / GIB:.2f}" for e in every)])
    lines.append(["peak", *(f"{e.gib:.2f}" for e in every)])
    lines.append(["when", *(e.phase for e in every)])
    if any(e.host for e in every):
        lines.append(["in host memory", *(f"{e.host / GIB:.2f}" for e in every)])
        if any(e.file for e in every):
            lines.append(["in files", *(f"{e.file / GIB:.2f}" for e in every)])
        lines.append(["brought a pass", *(f"{e.moved / GIB:.2f}" for e in every)])
        if any(e.stepped for e in every):
            lines.append(["both ways a step", *(f"{e.stepped / GIB:.2f}" for e in every)])
    lines.append(["weights", *(e.recipe.train.dtype for e in every)])
    lines.append(["trained", *(f"{e.trainable / 1e6:.1f}M" for e in every)])
    wide = console.width >= 22 + sum(max(8, len(name)) + 3 for name in estimates)
    if not wide:  # a line for each method, without the parts of rotations
        lines = [
            list(line) for line in zip(*(line for line in lines if line[0].strip() != "of rotations"), strict=True)
        ]
    table = Table()
    for place, name in enumerate(lines[0]):
        table.add_column(name, no_wrap=True, justify="right" if place else "left")
    for line in lines[1:]:
        style = {"peak": "bold", "    of rotations": "dim"}.get(line[0])
        table.add_row(*line, style=style, end_section=line[0] == CATEGORIES[-1])
    (console if wide else Console(width=max(console.width, _WIDTH))).print(table)
    width = max(20, min(60, console.width - 24))
    largest = max(e.peak for e in every)
    longest = max(12, *map(len, estimates))
    for name, estimate in estimates.items():
        console.print(f"{name:{longest}} {bar(estimate.categories, width / largest)} {estimate.gib:.1f}")


def bar(categories: dict[str, int], scale: float) -> str:
    """Coloured blocks, ``scale`` characters a byte; what is left of one category's block goes to the next."""
    drawn, total, text = 0, 0, ""
    for name, size in categories.items():
        total += size
        blocks = round(total * scale) - drawn
        drawn += blocks
        text += f"[{_COLOURS[name]}]{'█' * blocks}[/]" if blocks else ""
    return text


def advice(limits: dict[str, BatchLimit], gpu: float | None) -> list[str]:
    """What fits on the card, one line a method, and the batch at which dense training is left behind."""
    lines = []
    for name, limit in limits.items():
        recipe = limit.at_limit.recipe
        if limit.batch_size:
            what = f"fits, up to batch {limit.batch_size} x {recipe.data.seq_len} ({limit.at_limit.gib:.1f} GB)"
        else:
            what = f"does not fit: one sequence takes {limit.at_limit.gib:.1f} GB"
        lines.append(f"{name} on {gpu:g} GB: {what}")
    ours = {name: limit.batch_size for name, limit in limits.items() if limit.at_limit.recipe.poet is not None}
    best = max(ours, key=ours.__getitem__, default=None)
    for name, limit in limits.items():
        recipe = limit.at_limit.recipe
        dense = recipe.poet is None and recipe.lora is None
        if best is not None and dense and ours[best] > limit.batch_size:
            lines.append(f"from batch {limit.batch_size + 1} to {ours[best]} {best} still fits where {name} does not")
    return lines


def draw(path: Path, title: str, estimates: dict[str, MemoryEstimate]) -> None:
    """One stacked bar a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from poetx.memory.tracker import CATEGORIES
    from poetx.planner.estimate import GIB

    figure, axes = plt.subplots(figsize=(7, 1.4 + 0.5 * len(estimates)), layout="constrained")
    left = [0.0] * len(estimates)
    for category in CATEGORIES:
        sizes = [estimate.categories[category] / GIB for estimate in estimates.values()]
        colour = {"magenta": "pink", "yellow": "olive", "white": "gray"}.get(_COLOURS[category], _COLOURS[category])
        axes.barh(list(estimates), sizes, left=left, label=category, color=f"tab:{colour}")
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="GB (2³⁰ bytes)", title=f"{title}: predicted peak")
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.35), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=120, bbox_inches="tight")
    except OSError as error:
        raise unwritten(path, error) from None
    plt.close(figure)
