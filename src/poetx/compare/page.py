"""What a comparison found: a table, and one HTML page with the frontier of loss and memory."""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from poetx.files import write_text
from poetx.runs.charts import GREY, STYLE, draw, figure, svg

Row = dict[str, Any]
HEAD = (
    *("method", "validation loss", "range", "seeds", "tokens/s", "state + gradient, of AdamW's", "state", "gradient"),
    *("weights", "peak, MiB", "predicted", "trained, M", "rates"),
)
_MIB = 1 << 20
_WIDE_RANGE = 20  # of memory, largest to smallest, from which on a picture has it on a logarithmic axis
_FAR_ABOVE = 4  # times the distance of the middle loss from the best: above that a picture has a loss at its edge
_FEW = 12  # points of a picture that have their names beside them; more have numbers, and the names are in a list,
_SHORT = 24  # as they are where one has more letters
_BASE = "adamw"  # the method whose state and gradient those of the others are compared with


def write_results(directory: Path, title: str, rows: Sequence[Row], *, sweep: bool) -> None:
    """``results.jsonl``, ``table.md`` and ``index.html`` in ``directory``, of the ``rows`` that there are by now."""
    note = _NOTE + _RATES[sweep]
    write_text(directory / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    body = table(rows)
    lines = [" | ".join(line) for line in (HEAD, ["---"] * len(HEAD), *body)]
    write_text(directory / "table.md", f"{title}\n\n" + "".join(f"| {line} |\n" for line in lines) + f"\n{note}\n")
    write_text(directory / "index.html", _page(title, note, rows, body))


_NOTE = (
    "Validation loss in nats a token at the last step, mean over the seeds. Optimizer's state, gradient and weights in "
    "MiB as planned, each at its largest; micro-batches are accumulated in the gradient, of single steps in the state. "
    "Peak as measured in the last step (on a CPU by following every tensor), and as planned. "
)
_RATES = {
    True: "Rates: the best of as many tried for each method, by successive halving with the first seed.",
    False: "Rates: the recipe's own and the methods' usual ones, not searched: compare the methods with --sweep.",
}


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Cells under :data:`HEAD`, the lowest loss first."""
    found = _by_method(rows)
    base = found.get(_BASE)
    order = sorted(found.values(), key=lambda of: _mean(of, last=True))
    return [_line(of, held(of) / held(base) if base else None) for of in order]


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    return found


def _mean(rows: Sequence[Row], *, last: bool = False) -> float:
    """Of the losses; infinite where a run diverged, so that such a method comes last."""
    losses = [row["loss"] for row in rows]
    return float("inf") if last and None in losses else statistics.fmean(x for x in losses if x is not None)


def held(rows: list[Row]) -> int:
    """Bytes of optimizer's state and gradient of a method, of which accumulation is a part."""
    return rows[0]["state"] + rows[0]["gradient"]


def peak(rows: list[Row]) -> int:
    """Bytes of the largest measured peak of a method's runs, the predicted one where none was measured."""
    return max((row["measured_peak"] for row in rows if row["measured_peak"]), default=rows[0]["predicted_peak"])


def _line(rows: list[Row], share: float | None) -> list[str]:
    first, losses = rows[0], [row["loss"] for row in rows if row["loss"] is not None]
    diverged = len(rows) - len(losses)
    measured = any(row["measured_peak"] for row in rows)
    rates = ", ".join(f"{key.partition('.')[2]} {rate:.3g}" for key, rate in first["rates"].items())
    return [
        first["method"],
        (f"{statistics.fmean(losses):.4f}" if losses else "") + (f" ({diverged} diverged)" if diverged else ""),
        f"{min(losses):.4f} to {max(losses):.4f}" if len(losses) > 1 else "",
        str(len(rows)),
        f"{statistics.fmean(row['tokens_per_second'] for row in rows):,.0f}",
        "" if share is None else f"{share:.2f}",
        *(f"{first[key] / _MIB:.2f}" for key in ("state", "gradient", "weights")),
        f"{peak(rows) / _MIB:.1f}" if measured else "",
        f"{first['predicted_peak'] / _MIB:.1f}",
        f"{first['trained'] / 1e6:.2f}",
        rates + (f" ({first['rates_note']})" if first["rates_note"] else ""),
    ]


def frontier(rows: Sequence[Row], size: Callable[[list[Row]], float] = peak) -> list[str]:
    """Methods that no other beats in both, ``size`` and mean loss; the smallest first."""
    points = sorted((size(found), _mean(found, last=True), name) for name, found in _by_method(rows).items())
    best, names = float("inf"), []
    for _, loss, name in points:
        if loss < best:
            best = loss
            names.append(name)
    return names


def _page(title: str, note: str, rows: Sequence[Row], body: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in HEAD)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in body)
    colours = _colours(rows)
    legend = "".join(f'<span><b style="color:{c}">●</b> {html.escape(name)}</span>' for name, c in colours.items())
    best = f"No other is better in both: by state and gradient {', '.join(frontier(rows, held))}; "
    best += f"by peak {', '.join(frontier(rows)) or 'none, all diverged'}."
    parts = [
        f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div><p class="note">{html.escape(note)}</p>',
        f"<h2>Loss against memory</h2><p>{html.escape(best)}</p>{svg(memory_figures(rows))}",
        f"<h2>Validation loss over tokens, and over seconds</h2>{_curves(rows, colours)}",
        f'<p class="legend">{legend}</p>',
    ]
    text = html.escape(title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{text}</title><style>{STYLE}</style></head><body><h1>{text}</h1>{''.join(parts)}</body></html>\n"
    )


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    import matplotlib
    from matplotlib.colors import to_hex

    names = list(_by_method(rows))
    palette: Any = matplotlib.colormaps["tab20" if len(names) > 10 else "tab10"]
    return {name: to_hex(palette(i % palette.N)) for i, name in enumerate(names)}


def memory_figures(rows: Sequence[Row]) -> list[Any]:
    """Loss over state and gradient, and over the peak, each with its frontier; what diverged is left out.

    A loss far above most would flatten the rest: a triangle at the upper edge has its value beside the name. Many
    methods, or those with long names, are numbered, from the lowest loss on.
    """
    colours = _colours(rows)
    found = {name: of for name, of in _by_method(rows).items() if any(row["loss"] is not None for row in of)}
    unit = held(found[_BASE]) if _BASE in found else _MIB
    label = f"state + gradient, {'of ' + _BASE if _BASE in found else 'MiB'}"
    losses = {name: _mean(of) for name, of in found.items()}
    far, height = _far(losses)
    chart, axes = figure(2, height=4.4)
    for axis, size, by, text in zip(axes, (held, peak), (unit, _MIB), (label, "peak of a step, MiB"), strict=True):
        points = {name: (size(of) / by, height if name in far else losses[name]) for name, of in found.items()}
        edge = [points[name] for name in frontier(rows, size) if name in points]
        axis.step([x for x, _ in edge], [y for _, y in edge], where="post", color=GREY, linewidth=1, linestyle="--")
        for name, (x, y) in points.items():
            axis.plot([x], [y], "^" if name in far else "o", color=colours[name])
        sizes = [x for x, _ in points.values() if x > 0]
        if len(sizes) == len(points) and sizes and max(sizes) > _WIDE_RANGE * min(sizes):
            axis.set_xscale("log")
        axis.margins(x=0.12, y=0.1)
        draw(axis, "validation loss, nats a token")
        axis.set_xlabel(text)
        named = {f"{name} {losses[name]:.2f}" if name in far else name: at for name, at in points.items()}
        if len(named) > _FEW or any(len(name) > _SHORT for name in named):
            order = sorted(zip(losses.values(), named, strict=True))
            numbers = {name: str(number) for number, (_, name) in enumerate(order, start=1)}
            axis.figure.set_figwidth(axis.figure.get_figwidth() + 2.4)
            lines = "\n".join(f"{number}  {name}" for name, number in numbers.items())
            axis.text(1.03, 1.0, lines, transform=axis.transAxes, va="top", fontsize=8, color=GREY, linespacing=1.5)
            named = {numbers[name]: at for name, at in named.items()}
        _name_points(axis, named)
    return chart


def _far(losses: dict[str, float]) -> tuple[set[str], float]:
    """Methods whose loss is far above most, and at which height a picture has them."""
    best = min(losses.values(), default=0.0)
    limit = best + _FAR_ABOVE * (statistics.median(losses.values()) - best) if losses else 0.0
    highest = max((loss for loss in losses.values() if loss <= limit), default=best)
    far = {name for name, loss in losses.items() if loss > limit and highest > best}
    return far, highest + 0.12 * (highest - best)


def _name_points(axis: Any, points: dict[str, tuple[float, float]]) -> None:
    """Each name beside its point, on the first place in the axes that covers no other name and no point."""
    size = 10
    axis.figure.tight_layout()  # where the axes will be
    corner, end = axis.bbox.get_points() * 72 / axis.figure.dpi
    width, height = end - corner
    at = {n: tuple(axis.transData.transform(p) * 72 / axis.figure.dpi - corner) for n, p in points.items()}
    heights = (3, -9, 12, -18, 21, -27, 30, -36)
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in at.values()]
    for name, (x, y) in at.items():
        wide, boxes = 0.55 * size * len(name), []
        for dx, dy in ((dx, dy) for dy in heights for dx in (5, -5 - wide)):
            boxes.append((dx, dy, (x + dx, y + dy, x + dx + wide, y + dy + size)))
        inside = [
            (dx, dy, box) for dx, dy, box in boxes if box[0] > 0 and box[2] < width and 0 < box[1] < height - size
        ]
        free = [place for place in inside if not any(_meet(place[2], other) for other in taken)]
        dx, dy, box = (free or inside or boxes)[0]
        taken.append(box)
        axis.annotate(name, points[name], xytext=(dx, dy), textcoords="offset points", color=GREY, fontsize=size)


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _curves(rows: Sequence[Row], colours: dict[str, str]) -> str:
    """One curve a method, of its first seed, from the second evaluation on: the first is before any step."""
    chart, axes = figure(2, height=4.4)
    for axis, place, label in zip(axes, (0, 1), ("tokens, thousands", "seconds, evaluation included"), strict=True):
        curves = []
        for name, found in _by_method(rows).items():
            points = [(point[place], point[2]) for point in found[0]["curve"][1:] if point[2] is not None]
            points = [(x / 1e3, y) for x, y in points] if place == 0 else points
            style = {"color": colours[name], "marker": "o", "markersize": 2.5, "linewidth": 1}
            curves.append((tuple(zip(*points, strict=True)) or ((), ()), style))
        draw(axis, "validation loss, nats a token", *curves)
        axis.set_xlabel(label)
    return svg(chart)
