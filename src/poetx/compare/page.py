"""What a comparison found: a table, and one HTML page with the frontier of loss and memory."""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from poetx.files import write_text
from poetx.runs.charts import GREY, STYLE, draw, figure, svg

Row = dict[str, Any]
HEAD = (
    *("method", "validation loss", "range", "seeds", "tokens/s", "peak, GiB", "predicted", "weights", "state"),
    *("gradient", "trained, M", "rates"),
)
_GIB, _MIB = 1 << 30, 1 << 20


def write_results(directory: Path, title: str, rows: Sequence[Row], *, sweep: bool) -> None:
    """``results.jsonl``, ``table.md`` and ``index.html`` in ``directory``, of the ``rows`` that there are by now."""
    note = _NOTE + _RATES[sweep]
    write_text(directory / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    body = table(rows)
    lines = [" | ".join(line) for line in (HEAD, ["---"] * len(HEAD), *body)]
    write_text(directory / "table.md", f"{title}\n\n" + "".join(f"| {line} |\n" for line in lines) + f"\n{note}\n")
    write_text(directory / "index.html", _page(title, note, rows, body))


_NOTE = (
    "Validation loss in nats a token at the last step, mean over the seeds. Weights, optimizer's state and gradient in "
    "MiB as planned, each at its largest, with those of accumulation. Peak as measured in the last step (on a CPU by "
    "following every tensor), and as planned. "
)
_RATES = {
    True: "Rates: the best of as many tried for each method, by successive halving with the first seed.",
    False: "Rates: the recipe's own and the methods' usual ones, not searched: compare the methods with --sweep.",
}


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Cells under :data:`HEAD`, the lowest loss first."""
    return [_line(found) for found in sorted(_by_method(rows).values(), key=lambda found: _mean(found, last=True))]


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    return found


def _mean(rows: Sequence[Row], *, last: bool = False) -> float:
    """Of the losses; infinite where a run diverged, so that such a method comes last."""
    losses = [row["loss"] for row in rows]
    return float("inf") if last and None in losses else statistics.fmean(x for x in losses if x is not None)


def _line(rows: list[Row]) -> list[str]:
    first, losses = rows[0], [row["loss"] for row in rows if row["loss"] is not None]
    diverged = len(rows) - len(losses)
    peaks = [row["measured_peak"] for row in rows if row["measured_peak"] is not None]
    rates = ", ".join(f"{key.partition('.')[2]} {rate:.3g}" for key, rate in first["rates"].items())
    return [
        first["method"],
        (f"{statistics.fmean(losses):.4f}" if losses else "") + (f" ({diverged} diverged)" if diverged else ""),
        f"{min(losses):.4f} to {max(losses):.4f}" if len(losses) > 1 else "",
        str(len(rows)),
        f"{statistics.fmean(row['tokens_per_second'] for row in rows):,.0f}",
        f"{max(peaks) / _GIB:.3f}" if peaks else "",
        f"{first['predicted_peak'] / _GIB:.3f}",
        *(f"{first[key] / _MIB:.1f}" for key in ("weights", "state", "gradient")),
        f"{first['trained'] / 1e6:.2f}",
        rates + (f" ({first['rates_note']})" if first["rates_note"] else ""),
    ]


def frontier(rows: Sequence[Row]) -> list[str]:
    """Methods that no other beats in both, predicted peak and mean loss; the smallest peak first."""
    points = sorted(
        (found[0]["predicted_peak"], _mean(found, last=True), name) for name, found in _by_method(rows).items()
    )
    best, names = float("inf"), []
    for _, loss, name in points:
        if loss < best:
            best = loss
            names.append(name)
    return names


def _page(title: str, note: str, rows: Sequence[Row], body: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in HEAD)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in body)
    best = f"On the frontier of loss and memory: {', '.join(frontier(rows))}."
    parts = [
        f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div><p class="note">{html.escape(note)}</p>',
        f"<h2>Loss against memory</h2><p>{html.escape(best)}</p>{_memory_chart(rows)}",
        f"<h2>Validation loss over tokens, and over seconds</h2>{_curves(rows)}",
    ]
    text = html.escape(title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{text}</title><style>{STYLE}</style></head><body><h1>{text}</h1>{''.join(parts)}</body></html>\n"
    )


def _colours(rows: Sequence[Row]) -> dict[str, Any]:
    import matplotlib

    names = list(_by_method(rows))
    palette: Any = matplotlib.colormaps["tab20" if len(names) > 10 else "tab10"]
    return {name: palette(i % palette.N) for i, name in enumerate(names)}


def _memory_chart(rows: Sequence[Row]) -> str:
    chart, (axis,) = figure(height=4.4)
    colours, found = _colours(rows), _by_method(rows)
    points = {name: (of[0]["predicted_peak"] / _GIB, _mean(of)) for name, of in found.items() if _any_loss(of)}
    for name, (peak, loss) in points.items():
        axis.plot([peak], [loss], "o", color=colours[name])
        axis.annotate(name, (peak, loss), xytext=(5, 4), textcoords="offset points", color=GREY, fontsize=9)
    edge = [points[name] for name in frontier(rows) if name in points]
    axis.step([x for x, _ in edge], [y for _, y in edge], where="post", color=GREY, linewidth=1, linestyle="--")
    axis.margins(x=0.15, y=0.12)
    draw(axis, "validation loss, nats a token")
    axis.set_xlabel("predicted peak of one step, GiB", color=GREY)
    return svg(chart)


def _any_loss(rows: Sequence[Row]) -> bool:
    return any(row["loss"] is not None for row in rows)


def _curves(rows: Sequence[Row]) -> str:
    """One curve a method, of its first seed."""
    chart, axes = figure(2, height=4.4)
    colours = _colours(rows)
    for axis, place, label in zip(axes, (0, 1), ("tokens", "seconds, evaluation included"), strict=True):
        curves = []
        for name, found in _by_method(rows).items():
            points = [(point[place], point[2]) for point in found[0]["curve"] if point[2] is not None]
            style = {"color": colours[name], "marker": "o", "markersize": 2.5, "linewidth": 1}
            curves.append((tuple(zip(*points, strict=True)) or ((), ()), style | ({"label": name} if place else {})))
        draw(axis, "" if place else "validation loss, nats a token", *curves)
        axis.set_xlabel(label, color=GREY)
    return svg(chart)
