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
svg { max-width: 100%; height: auto } p.note { color: #68707b } .wide { overflow-x: auto; white-space: nowrap }
@media (prefers-color-scheme: dark) {
  body { color: #dfe3e8; background: #15181c } pre { background: #1f242a }
  td:first-child, th, p.note { color: #98a1ac }
}
"""


def figure(columns: int = 1, *, height: float = 3.2) -> tuple[Any, list[Any]]:
    """An empty figure and its axes, which say steps below; text in a grey that reads on light and dark."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made, axes = plt.subplots(1, columns, figsize=(9, height), squeeze=False)
    for axis in axes[0]:
        axis.tick_params(colors=GREY)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GREY)
        axis.set_xlabel("step", color=GREY)
    return made, list(axes[0])


def svg(made: Any) -> str:
    """The figure as an element of a page, without a background; it is closed."""
    import matplotlib.pyplot as plt

    made.tight_layout()
    buffer = io.StringIO()
    made.savefig(buffer, format="svg", transparent=True)
    plt.close(made)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def draw(axis: Any, label: str, *curves: tuple[Any, dict[str, Any]], log: bool = False, zero: bool = False) -> None:
    """Curves of (steps, values) and style; ``zero``: the axis begins there."""
    for points, style in curves:
        axis.plot(*points, **style)
    axis.set_ylabel(label, color=GREY)
    if log:
        axis.set_yscale("log")
    if zero:
        axis.set_ylim(bottom=0)
    if any("label" in style for _, style in curves):
        axis.legend(frameon=False, labelcolor=GREY)
