"""``poetx report RUN [RUN …]``: one self-contained HTML page of what run directories know, one over the other."""

from __future__ import annotations

import html
import json
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poetx.errors import UserError
from poetx.files import read_json, write_text
from poetx.recipe.places import is_prepared
from poetx.runs.charts import STYLE
from poetx.train.export import TEXT_SUM
from poetx.train.metrics import is_whole, put_elapsed_, read_metrics

logger = logging.getLogger(__name__)

_POINTS = 400  # of a curve: each is the median over its part of the run
_STYLE, _SCRIPT = (Path(__file__).with_name(f"report.{kind}") for kind in ("css", "js"))

Entry = dict[str, Any]


@dataclass
class _Run:
    """What one run directory knows.

    Attributes:
        entries: its whole lines, each with the ``elapsed`` seconds of all the processes that it took.
        damaged: lines that are not whole.
        tokens: in a step.
    """

    path: Path
    name: str
    entries: list[Entry]
    damaged: int
    tokens: int
    facts: Entry = field(default_factory=dict)
    unknown: str = ""

    def of(self, event: str) -> list[Entry]:
        """The lines of one event; of validations, those with a loss."""
        return [e for e in self.entries if e["event"] == event and (event != "validation" or e["loss"] is not None)]

    def merges(self) -> list[Entry]:
        """The steps that merged."""
        return [e for e in self.of("train") if None not in (e.get("merge_angle"), e.get("norm_drift"))]


def write_report(runs: Path | Sequence[Path], path: Path, *, baseline: Path | None = None) -> Path:
    """Write the page for one or several runs to ``path``: nothing is loaded, readable in any browser, light and dark.

    Args:
        baseline: the run that others are compared with; the first by default.

    Raises:
        UserError: a run has no metrics, or ``path`` cannot be written, or is a file that is no page.
    """
    places = [runs] if isinstance(runs, Path) else list(runs)
    if tokens := [place for place in places if is_prepared(str(place))]:  # of `poetx report runs/*`
        logger.warning("left out, tokens and no runs: %s", ", ".join(map(str, tokens)))
        places = [place for place in places if place not in tokens] or places
    if baseline is not None:
        places = [baseline, *(place for place in places if place.resolve() != baseline.resolve())]
    if path.is_file():
        with path.open("rb") as file:
            if not file.read(15).lower().startswith((b"<!doctype html", b"<html")):
                raise UserError(f"{path}: exists and is no HTML page, so a report does not replace it; choose another")
    found = [_read(place, places) for place in places]
    write_text(path, _page(found))
    for note in incomparable(found):
        logger.warning(note)
    return path


def _read(place: Path, places: Sequence[Path]) -> _Run:
    metrics = place / "metrics.jsonl"
    entries = [entry for entry in read_metrics(metrics) if is_whole(entry)]
    if not any(entry["event"] == "train" for entry in entries):
        raise UserError(f"{place}: no whole training steps in {metrics}; is it a run directory?")
    put_elapsed_(entries)
    alike = [other for other in places if other.resolve().name == place.resolve().name]
    name = place.resolve().name if len(alike) == 1 else "/".join(place.resolve().parts[-2:])
    damaged = len(metrics.read_bytes().splitlines()) - len(entries)
    run = _Run(place, name, entries, damaged, _tokens_a_step(place, entries))
    try:
        run.facts = read_json(place / "environment.json")
        _ = f"{run.facts['device']} {run.facts['device_name']} {dict(run.facts['versions'])}"
    except UserError as error:
        run.facts, run.unknown = {}, str(error)
    except (KeyError, TypeError, ValueError):
        run.facts, run.unknown = {}, "environment.json is incomplete"
    return run


def _tokens_a_step(place: Path, entries: list[Entry]) -> int:
    """From the run's audit or its recipe; 1 where neither is there."""
    steps = sum(entry["event"] == "train" for entry in entries)
    for entry in entries:
        if entry["event"] == "audit" and isinstance(entry.get("tokens"), int) and entry["tokens"] >= steps > 0:
            return entry["tokens"] // steps
    from poetx.recipe import load_recipe

    try:
        recipe = load_recipe(str(place))
    except (UserError, OSError):
        return 1
    return recipe.train.batch_size * recipe.data.seq_len


# -- the page ---------------------------------------------------------------------------------------------------------


def _page(runs: list[_Run]) -> str:
    wide = ' class="runs"' if len(runs) > 1 else ""
    sections = [("", f'<div{wide}>{_summary(runs)}</div><div id="controls"></div><div id="charts"></div>')]
    if any(run.of("sample") for run in runs):
        sections.append(("What the model writes", '<div id="samples"></div>'))
    for run in runs:
        whose = f" of {run.name}" if len(runs) > 1 else ""
        if memory := run.of("memory"):
            sections.append((f"Memory by phase{whose}", f'<div class="wide">{_memory_table(memory)}</div>'))
        if spectra := run.of("spectrum"):
            sections.append((f"Spectrum{whose}", f'<div class="wide">{_spectrum_table(spectra[-1])}</div>'))
        for title, name in (("What was converted", "conversion.txt"), ("Recipe", "recipe.yaml")):
            if (run.path / name).is_file():
                text = html.escape((run.path / name).read_text("utf-8", "replace"))
                sections.append(
                    ("", f"<details><summary>{title}{html.escape(whose)}</summary><pre>{text}</pre></details>")
                )
    body = "".join((f"<h2>{html.escape(title)}</h2>" if title else "") + content for title, content in sections)
    title = html.escape(" · ".join(run.name for run in runs))
    heads = [{"name": r.name, "tokens": r.tokens, "samples": [_texts(e) for e in r.of("sample")]} for r in runs]
    numbers = json.dumps({"runs": heads, "charts": [chart for chart in _charts(runs) if chart["series"]]}).replace(
        "<", "\\u003c"
    )
    style, script = STYLE + _STYLE.read_text("utf-8"), _SCRIPT.read_text("utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{title}</title><style>{style}</style></head>'
        f"<body><h1>{title}</h1>{body}<noscript>The charts are drawn by the script in this page.</noscript>"
        f'<script type="application/json" id="numbers">{numbers}</script>'
        f"<script>{script}</script></body></html>\n"
    )


def _texts(entry: Entry) -> Entry:
    return {"step": entry["step"], "samples": [{k: str(v) for k, v in text.items()} for text in entry["samples"]]}


def _summary(runs: list[_Run]) -> str:
    """A table of facts: a column a run, and what the others differ in from the first."""
    columns = [dict(_facts(run)) for run in runs]
    names = list(dict.fromkeys(name for column in sorted(columns, key=len, reverse=True) for name in column))
    head = (
        "" if len(runs) == 1 else "<tr><th></th>" + "".join(f"<th>{html.escape(r.name)}</th>" for r in runs) + "</tr>"
    )
    rows = ""
    for name in names:
        cells = ""
        for number, column in enumerate(columns):
            text = html.escape(column.get(name, ""))
            against = _against(runs[0], runs[number], name) if number else ""
            cells += f"<td>{text}{f' <small>{against}</small>' if against else ''}</td>"
        rows += f"<tr><td>{html.escape(name)}</td>{cells}</tr>"
    notes = [] if len(runs) == 1 else [f"In small type: against {runs[0].name}.", *incomparable(runs)]
    return f"<table>{head}{rows}</table>" + "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)


def incomparable(runs: Sequence[_Run]) -> list[str]:
    """A line about every run whose losses mean something else than the first's: they are a token's, of its own text."""
    texts = [run.facts.get(TEXT_SUM) for run in runs]
    return [
        f"{run.name} was trained on other tokens than {runs[0].name} (other text, or another tokenizer): their losses "
        "are not comparable."
        for run, text in zip(runs, texts, strict=True)
        if None not in (text, texts[0]) and text != texts[0]
    ]


def _facts(run: _Run) -> Iterator[tuple[str, str]]:
    train, validation = run.of("train"), run.of("validation")
    yield "steps", f"{train[-1]['step']:,}"
    yield "tokens", f"{train[-1]['step'] * run.tokens:,}" if run.tokens > 1 else "unknown"
    if run.damaged:
        yield "left out", f"{run.damaged} damaged lines of metrics.jsonl"
    if validation:
        start, end = ("not finite" if e["perplexity"] is None else f"{e['perplexity']:,.2f}" for e in
                      (validation[0], validation[-1]))  # fmt: skip
        yield "validation loss", f"{validation[-1]['loss']:.4f}"
        yield "validation perplexity", f"{start} at the start, {end} at the end"
    yield "training loss", f"{_finite_median([e['loss'] for e in train[-20:]]):.3f} (median of the last 20)"
    yield "total time", _clock(run.entries[-1]["elapsed"])
    yield "speed", f"{_finite_median([e['tokens_per_second'] for e in train]):,.0f} tokens/s (median)"
    yield "peak memory", f"{max(e['peak_memory_gib'] for e in train):.2f} GiB"
    yield "skipped steps", f"{sum(bool(e['skipped']) for e in train)}"
    if merges := run.merges():
        angle, drift = (max(entry[key] for entry in merges) for key in ("merge_angle", "norm_drift"))
        what = f"largest angle folded {angle:.3f}, largest norm drift before correction {drift:.1e}"
        yield "merges", f"{len(merges)}; {what}"
    if spectra := run.of("spectrum"):
        worst = max(layer["drift_median"] for layer in spectra[-1]["layers"].values())
        yield "spectrum", f"largest median change of a layer's singular values {worst:.1e}"
    if run.unknown:
        yield "device", f"unknown: {run.unknown}"
        return
    yield "device", f"{run.facts['device']}: {run.facts['device_name']}"
    if commit := run.facts.get("commit"):
        yield "commit", str(commit)
    yield "versions", ", ".join(f"{k} {v}" for k, v in dict(run.facts["versions"]).items())


_COMPARED: dict[str, tuple[Callable[[_Run], float | None], bool]] = {
    "validation loss": (lambda run: next((e["loss"] for e in reversed(run.of("validation"))), None), False),
    "total time": (lambda run: run.entries[-1]["elapsed"], True),
    "speed": (lambda run: _finite_median([e["tokens_per_second"] for e in run.of("train")]), True),
    "peak memory": (lambda run: max(e["peak_memory_gib"] for e in run.of("train")), True),
}


def _against(baseline: _Run, run: _Run, name: str) -> str:
    """How a fact differs from the baseline's: as a factor, or a loss as a difference; empty where that says nothing."""
    if name not in _COMPARED:
        return ""
    number, as_factor = _COMPARED[name]
    first, other = number(baseline), number(run)
    if first is None or other is None or (as_factor and not first):
        return ""
    return f"{other / first:.2f}×" if as_factor else f"{other - first:+.4f}"


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def _finite_median(values: list[float | None]) -> float:
    finite = [value for value in values if value is not None]
    return statistics.median(finite) if finite else float("nan")


# -- charts -----------------------------------------------------------------------------------------------------------


def _charts(runs: list[_Run]) -> Iterator[Entry]:
    """What the page's script draws: titles, and curves of (step, seconds, value)."""
    curves = [_curve(r, n, "train", "loss", name="training", smooth=True) for n, r in enumerate(runs)]
    curves += [_curve(r, n, "validation", "loss", name="validation", dots=True) for n, r in enumerate(runs)]
    yield _chart("Loss, nats a token", curves)
    rates = []
    keys = list(dict.fromkeys(key for run in runs for key in run.of("train")[-1] if key.startswith("lr_")))
    for number, run in enumerate(runs):
        for hue, key in enumerate(keys):
            rates.append(_curve(run, number, "train", key, name=key.removeprefix("lr_"), hue=hue, dash=bool(hue)))
    yield _chart("Learning rate", rates, byName=len(runs) == 1)
    norms = [_curve(r, n, "train", "grad_norm", name="gradient norm", smooth=True) for n, r in enumerate(runs)]
    clips = [_curve(r, n, "train", "clip", name="clip", hue=1, dash=True) for n, r in enumerate(runs)]
    yield _chart("Gradient norm", [*norms, *clips], log=True)
    speeds = [_curve(r, n, "train", "tokens_per_second", smooth=True) for n, r in enumerate(runs)]
    yield _chart("Tokens a second", speeds, zero=True)
    yield _chart("Peak memory, GiB", [_curve(r, n, "train", "peak_memory_gib") for n, r in enumerate(runs)], zero=True)
    angles = [_curve(r, n, "train", "merge_angle", dots=True) for n, r in enumerate(runs)]
    yield _chart("Largest angle folded, radians", angles, zero=True)
    drifts = [_curve(r, n, "train", "norm_drift", dots=True) for n, r in enumerate(runs)]
    yield _chart("Norm drift before correction", drifts, log=True)
    changes, ratios = [], []
    for number, run in enumerate(runs):
        for pick, name, hue in ((max, "worst layer", 1), (statistics.median, "median layer", 0)):
            style = {"name": name, "hue": hue, "dash": bool(hue), "dots": True}
            changes.append(_layers(run, number, lambda v, pick=pick: pick(v), "drift_median", **style))
        for pick, name, hue in ((max, "largest", 1), (min, "smallest", 0)):
            style = {"name": name, "hue": hue, "dash": bool(hue), "dots": True}
            ratios.append(_layers(run, number, lambda v, pick=pick: pick(v) - 1, "norm_ratio", **style))
    yield _chart("Median change of singular values", changes, log=True, byName=len(runs) == 1)
    yield _chart("‖W‖ / ‖W‖ at the start − 1", ratios, byName=len(runs) == 1)


def _chart(title: str, curves: list[Entry], **style: Any) -> Entry:
    return {"title": title, "series": [curve for curve in curves if curve["points"]], **style}


def _curve(run: _Run, number: int, event: str, key: str, **style: Any) -> Entry:
    """Medians of a key over 1/400 of the run each; lines without a finite value are left out."""
    points = [(e["step"], e["elapsed"], e[key]) for e in run.of(event) if e.get(key) is not None]
    width = 1 if style.get("dots") else -(-len(points) // _POINTS)
    parts = [points[start : start + width] for start in range(0, len(points), max(1, width))]
    drawn = [
        [part[-1][0], round(part[-1][1], 2), float(f"{statistics.median(p[2] for p in part):.6g}")] for part in parts
    ]
    return {"run": number, "points": drawn, "hue": 0, **style}


def _layers(run: _Run, number: int, pick: Callable[[list[float]], float], key: str, **style: Any) -> Entry:
    points = [
        [entry["step"], entry["elapsed"], pick([layer[key] for layer in entry["layers"].values()])]
        for entry in run.of("spectrum")
    ]
    return {"run": number, "points": points, **style}


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
