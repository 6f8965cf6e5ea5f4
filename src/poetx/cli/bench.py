"""``poetx bench layer``, ``ops`` and ``step`` on the command line. JSON lines out, and a table to read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from poetx.cli.recipes import CommandWithSettings, say_idle
from poetx.errors import UserError

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    name="bench",
    help="Time layers, operators and whole training steps, each against what it stands for, in one run.",
    no_args_is_help=True,
)

_OUT = Annotated[Path | None, typer.Option("--out", "-o", help="Append one JSON line a row to this file.")]
_JSON = Annotated[bool, typer.Option("--json", help="Print the rows instead of a table.")]
_DEVICE = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
_DTYPE = Annotated[str, typer.Option(help="float32 or bfloat16. auto: bfloat16 on a GPU.")]
_REPEATS = Annotated[int, typer.Option(min=1, help="Timed calls of each; the median counts.")]


@app.command(
    epilog="Examples: poetx bench layer | poetx bench layer --tokens 2048 --in-features 4096 --out-features 14336 "
    "--block-size 256 --out rows.jsonl"
)
def layer(
    tokens: Annotated[int, typer.Option(min=1)] = 1024,
    in_features: Annotated[int, typer.Option(min=1)] = 1024,
    out_features: Annotated[int, typer.Option(min=1)] = 1024,
    block_size: Annotated[int, typer.Option(min=2)] = 128,
    contestants: Annotated[
        str,
        typer.Option(
            help="Names, or YAML files of LABEL: {KEY: VALUE}, by commas; the first is what others are compared with."
        ),
    ] = "linear,original,fast,mem,single-step",
    parts: Annotated[bool, typer.Option("--parts/--no-parts", help="Also time the parts of a layer.")] = True,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile every contestant.")] = False,
    dtype: _DTYPE = "auto",
    device: _DEVICE = "auto",
    repeats: _REPEATS = 20,
    out: _OUT = None,
    as_json: _JSON = False,
) -> None:
    """Forward and backward of one layer: nn.Linear, the original POET, POET-X fast and mem, single-step."""
    from poetx.bench.layer import Shape, bench_layer

    place, kind = _place(device, dtype)
    shape = Shape(
        tokens=tokens,
        in_features=in_features,
        out_features=out_features,
        block_size=block_size,
        dtype=kind,
        device=place,
    )
    rows = bench_layer(
        shape, contestants=names_in("contestants", contestants), repeats=repeats, parts=parts, compiled=compiled
    )
    _report(
        rows,
        out,
        as_json,
        ("contestant", "part", "ms", "ratio", "queued_ms", "queued_ratio", "share_of_linear", "peak_bytes"),
    )


@app.command(epilog="Example: poetx bench ops --out rows.jsonl")
def ops(
    tokens: Annotated[str, typer.Option(help="Separated by commas.")] = "2048,4096,8192,16384",
    features: Annotated[int, typer.Option(min=1)] = 4096,
    blocks: Annotated[str, typer.Option(help="Blocks of the CNP, separated by commas.")] = "64,128,192,256,320",
    block_sizes: Annotated[str, typer.Option(help="Separated by commas.")] = "256,512",
    dtype: _DTYPE = "auto",
    device: _DEVICE = "auto",
    repeats: _REPEATS = 10,
    out: _OUT = None,
    as_json: _JSON = False,
) -> None:
    """Permutation, Cayley-Neumann series and block product against plain PyTorch."""
    from poetx.bench.ops import bench_ops

    place, kind = _place(device, dtype)
    rows = bench_ops(
        device=place,
        dtype=kind,
        tokens=_numbers("tokens", tokens),
        features=features,
        blocks=_numbers("blocks", blocks),
        block_sizes=_numbers("block-sizes", block_sizes),
        repeats=repeats,
    )
    columns = ("operator", "tokens", "features", "blocks", "block_size", "ms", "naive_ms", "speedup")
    _report(rows, out, as_json, columns)


@app.command(
    epilog="Examples: poetx bench step demo | poetx bench step llama-1b --methods adamw,int8 --seq-lens 512,1024",
    cls=CommandWithSettings,
)
def step(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Built-in name or YAML file.")] = "demo",
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe settings.")] = None,
    seq_lens: Annotated[str, typer.Option(help="Separated by commas. Default: the recipe's.")] = "",
    batch_sizes: Annotated[str, typer.Option(help="Sequences, separated by commas. Default: the recipe's.")] = "",
    methods: Annotated[
        str,
        typer.Option(
            help="Names, or YAML files of LABEL: {KEY: VALUE}, by commas; the first is what others are compared with."
        ),
    ] = "adamw,fast,mem",
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile the models.")] = False,
    repeats: _REPEATS = 5,
    out: _OUT = None,
    as_json: _JSON = False,
) -> None:
    """Whole training steps of a recipe by several methods: tokens a second and peak memory."""
    from poetx.bench.step import bench_step
    from poetx.recipe.several import methods_in

    say_idle(overrides or ())
    rows = bench_step(
        recipe,
        methods=methods_in(names_in("methods", methods)),
        overrides=overrides or (),
        seq_lens=_numbers("seq-lens", seq_lens),
        batch_sizes=_numbers("batch-sizes", batch_sizes),
        repeats=repeats,
        compiled=compiled,
    )
    columns = ("contestant", "seq_len", "batch_size", "ms", "tokens_per_second", "speed_ratio", "peak_bytes", "oom")
    _report(rows, out, as_json, columns)


def names_in(option: str, text: str) -> list[str]:
    """The names in a list on the command line. Raises :class:`UserError` on none or the same twice."""
    names = _split(text)
    if not names or len(set(names)) < len(names):
        raise UserError(f"--{option}={text}: must be different names separated by commas")
    return names


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in _split(text)]
    except ValueError:
        raise UserError(f"--{option}={text}: must be whole numbers separated by commas") from None
    if any(number < 1 for number in numbers) or (text.strip() and not numbers):
        raise UserError(f"--{option}={text}: must be numbers of at least 1, separated by commas")
    return numbers


def _place(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    import torch

    from poetx.models import resolve_device, resolve_dtype

    place = resolve_device(device, "--device")
    kind = resolve_dtype(dtype, place)
    if kind not in ("float32", "bfloat16"):
        raise UserError(f"--dtype={dtype}: must be float32, bfloat16 or auto")
    return place, getattr(torch, kind)


def _report(rows: Iterable[dict[str, Any]], out: Path | None, as_json: bool, columns: tuple[str, ...]) -> None:
    """Every row as soon as it is there: a run that is cut short leaves what it has."""
    from poetx.bench.timing import append

    header = True
    if out is not None and out.is_dir():  # now, not once the first row has been timed
        raise UserError(f"--out={out}: is a directory; name a file in it")
    for row in rows:
        if out is not None:
            append(out, [row])
        if as_json:
            print(json.dumps(row), flush=True)
            continue
        if header:
            print("  ".join(f"{name:>{_width(name)}}" for name in columns))
            header = False
        print("  ".join(f"{_text(name, row.get(name)):>{_width(name)}}" for name in columns), flush=True)


def _width(column: str) -> int:
    return 26 if column in ("part", "operator") else max(10, len(column))


def _text(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column == "peak_bytes":
        return f"{value / 2**30:.2f} GiB"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
