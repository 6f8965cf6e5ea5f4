"""``poetx report RUN``: one self-contained HTML page of what a run directory knows."""

from __future__ import annotations

import html
import statistics
from pathlib import Path
from typing import Any

from poetx.errors import UserError
from poetx.files import read_json, write_text
from poetx.runs.charts import BLUE, GREY, ORANGE, STYLE, draw, figure, svg
from poetx.train.metrics import is_whole, read_metrics

_SMOOTHING_POINTS = 200  # a drawn curve is the running median over 1/200 of the run
_BLUE_DOTS, _ORANGE_DOTS = ({"color": colour, "marker": "o", "markersize": 3} for colour in (BLUE, ORANGE))


def write_report(run_dir: Path, path: Path) -> Path:
    """Write the page for ``run_dir`` to ``path``: no scripts, no links to anywhere, readable in any browser.

    Raises:
        UserError: ``run_dir`` has no metrics, or ``path`` cannot be written, or is a file that is no page.
    """
    if path.is_file():
        with path.open("rb") as file:
            if not file.read(15).lower().startswith((b"<!doctype html", b"<html")):
                raise UserError(f"{path}: exists and is no HTML page, so a report does not replace it; choose another")
    metrics = run_dir / "metrics.jsonl"
    entries = [entry for entry in read_metrics(metrics) if is_whole(entry)]
    if not any(entry["event"] == "train" for entry in entries):
        raise UserError(f"{run_dir}: no whole training steps in {metrics}; is it a run directory?")
    write_text(path, _page(run_dir, entries, len(metrics.read_bytes().splitlines()) - len(entries)))
    return path


def _page(run_dir: Path, entries: list[dict[str, Any]], damaged: int) -> str:
    train = [entry for entry in entries if entry["event"] == "train"]
    validation = [entry for entry in entries if entry["event"] == "validation" and entry["loss"] is not None]
    spectra = [entry for entry in entries if entry["event"] == "spectrum"]
    sections = [
        ("Loss", _loss_chart(train, validation)),
        ("Learning rates and gradient norm", _step_chart(train)),
        ("Speed and memory", _speed_chart(train)),
    ]
    if merges := _merges(train):
        sections.append(("Merges", _merge_chart(merges)))
    if memory := [entry for entry in entries if entry["event"] == "memory"]:
        sections.append(("Memory by phase", _memory_table(memory)))
    if spectra:
        sections.append(("Spectrum", _spectrum_chart(spectra) + _spectrum_table(spectra[-1])))
    for title, name in (("What was converted", "conversion.txt"), ("Recipe", "recipe.yaml")):
        if (run_dir / name).is_file():
            sections.append((title, f"<pre>{html.escape((run_dir / name).read_text('utf-8', 'replace'))}</pre>"))
    body = "".join(f"<h2>{html.escape(title)}</h2>{content}" for title, content in sections)
    name = html.escape(run_dir.resolve().name)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{name}</title><style>{STYLE}</style>"
        f"</head><body><h1>{name}</h1>{_summary(run_dir, train, validation, spectra, damaged)}{body}</body></html>\n"
    )


def _summary(run_dir: Path, train: list[dict], validation: list[dict], spectra: list[dict], damaged: int = 0) -> str:
    rows = [("steps", f"{train[-1]['step']:,}")]
    if damaged:
        rows.append(("left out", f"{damaged} damaged lines of metrics.jsonl"))
    if validation:
        ends = (e["perplexity"] for e in (validation[0], validation[-1]))
        start, end = ("not finite" if value is None else f"{value:,.2f}" for value in ends)
        rows.append(("validation perplexity", f"{start} at the start, {end} at the end"))
    rows.append(("training loss", f"{_finite_median([e['loss'] for e in train[-20:]]):.3f} (median of the last 20)"))
    rows.append(("speed", f"{_finite_median([e['tokens_per_second'] for e in train]):,.0f} tokens/s (median)"))
    rows.append(("peak memory", f"{max(e['peak_memory_gib'] for e in train):.2f} GiB"))
    rows.append(("skipped steps", f"{sum(bool(e['skipped']) for e in train)}"))
    if merges := _merges(train):
        angle, drift = (max(entry[key] for entry in merges) for key in ("merge_angle", "norm_drift"))
        what = f"largest angle folded {angle:.3f}, largest norm drift before correction {drift:.1e}"
        rows.append(("merges", f"{len(merges)}; {what}"))
    if spectra:
        worst = max(layer["drift_median"] for layer in spectra[-1]["layers"].values())
        rows.append(("spectrum", f"largest median change of a layer's singular values {worst:.1e}"))
    try:
        facts = read_json(run_dir / "environment.json")
        rows.append(("device", f"{facts['device']}: {facts['device_name']}"))
        rows.append(("versions", ", ".join(f"{k} {v}" for k, v in dict(facts["versions"]).items())))
    except UserError as error:
        rows.append(("device", f"unknown: {error}"))
    except (KeyError, TypeError, ValueError):
        rows.append(("device", "unknown: environment.json is incomplete"))
    cells = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in rows)
    return f"<table>{cells}</table>"


def _merges(train: list[dict]) -> list[dict]:
    return [entry for entry in train if None not in (entry.get("merge_angle"), entry.get("norm_drift"))]


def _finite_median(values: list[float | None]) -> float:
    finite = [value for value in values if value is not None]
    return statistics.median(finite) if finite else float("nan")


def _smooth(entries: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Running median over 1/200 of the run, at least one step; steps without a finite value are left out."""
    points = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
    width = max(1, len(points) // _SMOOTHING_POINTS)
    chunks = [points[start : start + width] for start in range(0, len(points), width)]
    return [chunk[-1][0] for chunk in chunks], [statistics.median(value for _, value in chunk) for chunk in chunks]


def _loss_chart(train: list[dict], validation: list[dict]) -> str:
    chart, (axis,) = figure()
    held = [entry["step"] for entry in validation], [entry["loss"] for entry in validation]
    training = {"color": GREY, "linewidth": 1, "label": "training"}
    draw(axis, "loss, nats a token", (_smooth(train, "loss"), training), (held, _BLUE_DOTS | {"label": "validation"}))
    return svg(chart)


def _step_chart(train: list[dict]) -> str:
    chart, (left, right) = figure(2)
    names = zip((key for key in train[-1] if key.startswith("lr_")), (ORANGE, BLUE, GREY), strict=False)
    rates = [(_smooth(train, key), {"label": key.removeprefix("lr_"), "color": colour}) for key, colour in names]
    draw(left, "learning rate", *rates)
    norms = [(_smooth(train, "grad_norm"), {"color": GREY, "linewidth": 1, "label": "gradient norm"})]
    if any(entry.get("clip") is not None for entry in train):
        norms.append((_smooth(train, "clip"), {"color": ORANGE, "label": "clip value"}))
    draw(right, "", *norms, log=True)
    return svg(chart)


def _speed_chart(train: list[dict]) -> str:
    chart, (left, right) = figure(2)
    draw(left, "tokens/s", (_smooth(train, "tokens_per_second"), {"color": BLUE}), zero=True)
    draw(right, "peak memory, GiB", (_smooth(train, "peak_memory_gib"), {"color": BLUE}), zero=True)
    return svg(chart)


def _merge_chart(merges: list[dict]) -> str:
    chart, (left, right) = figure(2)
    steps = [entry["step"] for entry in merges]
    angles, drifts = [e["merge_angle"] for e in merges], [max(e["norm_drift"], 1e-12) for e in merges]
    draw(left, "largest angle folded, radians", ((steps, angles), _BLUE_DOTS), zero=True)
    draw(right, "norm drift before correction", ((steps, drifts), _BLUE_DOTS), log=True)
    return svg(chart)


def _spectrum_chart(spectra: list[dict]) -> str:
    chart, (left, right) = figure(2)
    steps = [entry["step"] for entry in spectra]
    drifts, ratios = (
        [[layer[key] for layer in entry["layers"].values()] for entry in spectra]
        for key in ("drift_median", "norm_ratio")
    )
    worst = steps, [max(*values, 1e-17) for values in drifts]
    middle = steps, [max(statistics.median(values), 1e-17) for values in drifts]
    first, second = (_ORANGE_DOTS | {"label": "worst layer"}), (_BLUE_DOTS | {"label": "median layer"})
    draw(left, "median change of singular values", (worst, first), (middle, second), log=True)
    bounds = [((steps, [pick(values) - 1 for values in ratios]), style | {"label": name})
              for pick, style, name in ((max, _ORANGE_DOTS, "largest"), (min, _BLUE_DOTS, "smallest"))]  # fmt: skip
    draw(right, "‖W‖ / ‖W‖ at the start − 1", *bounds)
    return svg(chart)


def _spectrum_table(entry: dict[str, Any]) -> str:
    head = "<tr><td>layer</td><td>‖W‖ ratio − 1</td><td>median change</td><td>largest change</td><td>entropy</td></tr>"
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{layer['norm_ratio'] - 1:.1e}</td><td>{layer['drift_median']:.1e}</td>"
        f"<td>{layer['drift_max']:.1e}</td><td>{layer['entropy']:.4f}</td></tr>"
        for name, layer in entry["layers"].items()
    )
    note = f'<p class="note">Singular values at step {entry["step"]} against the start, every rotated layer.</p>'
    return f"{note}<table>{head}{rows}</table>"


def _memory_table(measured: list[dict]) -> str:
    """The largest moment of each phase over all measurements, by category."""
    largest: dict[str, dict[str, int]] = {}
    for entry in measured:
        for phase, sizes in entry["phases"].items():
            if phase not in largest or sizes["total"] > largest[phase]["total"]:
                largest[phase] = sizes
    names = list(next(iter(largest.values()), {}))
    head = "".join(f"<td>{html.escape(name)}</td>" for name in names)
    rows = ""
    for phase, sizes in largest.items():
        cells = "".join(f"<td>{(sizes.get(name) or 0) / 2**20:,.1f}</td>" for name in names)
        rows += f"<tr><td>{html.escape(phase)}</td>{cells}</tr>"
    note = f'<p class="note">MiB at the largest moment of each phase, {len(measured)} steps measured.</p>'
    return f"{note}<table><tr><td>phase</td>{head}</tr>{rows}</table>"
