"""Charts and style of the pages that poetx writes: no scripts, no links to anywhere, light and dark."""

from __future__ import annotations

import io
from typing import Any

BLUE, ORANGE, GREY = "#2f81c7", "#d9730d", "#80868f"

STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1f24; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
table { border-collapse: collapse } td, th { padding: .15rem 1.2rem .15rem 0; vertical-align: top; text-align: left }
td:first-child, th { color: #68707b; font-weight: normal }
pre { background: #f5f6f8; padding: .8rem; overflow-x: auto; font-size: 13px }
.charts { display: flex; flex-wrap: wrap; gap: 0 1rem } .charts svg { flex: 1 1 21rem; min-width: 0; height: auto }
.charts svg:only-child { max-width: 40rem } .legend span { display: inline-block; margin-right: 1.1rem }
p.note { color: #68707b } .wide { overflow-x: auto; white-space: nowrap }
@media (prefers-color-scheme: dark) {
  body { color: #dfe3e8; background: #15181c } pre { background: #1f242a }
  td:first-child, th, p.note { color: #98a1ac }
}
"""


def figure(columns: int = 1, *, height: float = 3.2) -> tuple[list[Any], list[Any]]:
    """Empty figures and the axes of each, which say steps below; text in a grey that reads on light and dark."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = [plt.figure(figsize=(5.2, height)) for _ in range(columns)]
    axes = [one.add_subplot() for one in made]
    for axis in axes:
        axis.tick_params(colors=GREY, labelsize=11)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GREY)
        axis.set_xlabel("step", color=GREY, fontsize=11)
    return made, axes


def svg(made: list[Any]) -> str:
    """The figures as one element of a page, beside each other where it is wide enough, without a background.

    They are closed.
    """
    import matplotlib.pyplot as plt

    drawn = []
    for one in made:
        one.tight_layout()
        buffer = io.StringIO()
        one.savefig(buffer, format="svg", transparent=True)
        plt.close(one)
        drawn.append(buffer.getvalue().partition("<svg")[2])
    return '<div class="charts">' + "".join(f"<svg{text}" for text in drawn) + "</div>"


def draw(axis: Any, label: str, *curves: tuple[Any, dict[str, Any]], log: bool = False, zero: bool = False) -> None:
    """Curves of (steps, values) and style; ``zero``: the axis begins there."""
    for points, style in curves:
        axis.plot(*points, **style)
    axis.set_ylabel(label, color=GREY, fontsize=11)
    if log:
        axis.set_yscale("log")
    if zero:
        axis.set_ylim(bottom=0)
    if any("label" in style for _, style in curves):
        axis.legend(frameon=False, labelcolor=GREY)
