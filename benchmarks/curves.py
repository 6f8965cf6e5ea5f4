"""Training loss over tokens of the recorded single-step runs: each method's best setting at every budget, all seeds.

python -m benchmarks.curves --scales small wide 5m --plot docs/single-step.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, by_setting, mean_loss

_GROWING = "tab:green"
_COLOURS = {"adamw": "tab:gray", "adamw-split": "tab:blue", "muon": "tab:orange", "poet-x": "tab:purple"}


def best_settings(rows: list[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Rows of all seeds of the setting with the lowest mean validation loss, for each (kind of method, tokens)."""
    best: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for same in by_setting(rows):
        row = same[0]
        blocks = f", b={row['block_size']}" if row["method"] in ("poet-x", "single-step") else ""
        norm = ", growing norm" if row.get("norm_growth") else ""
        at = (row["method"] + blocks + norm, row["tokens"])
        if at not in best or mean_loss(same) < mean_loss(best[at]):
            best[at] = same
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=Path, default=RESULTS / "single_step.jsonl")
    parser.add_argument("--scales", nargs="+", default=["small", "wide", "5m"])
    parser.add_argument("--plot", type=Path, required=True)
    args = parser.parse_args()
    if not args.rows.exists():
        parser.error(f"--rows {args.rows}: no such file; `python -m benchmarks.single_step sweep` writes it")
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    panels = []
    for scale in args.scales:
        best = best_settings([row for row in rows if row["scale"] == scale and row["loss"] is not None])
        budgets = sorted({tokens for _, tokens in best if sum(at == tokens for _, at in best) > 2})
        panels += [(scale, tokens, best) for tokens in budgets]
    if not panels:
        parser.error(f"--scales {' '.join(args.scales)}: no budget at which three methods ran in {args.rows}")

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(panels))
    rows_of_panels = -(-len(panels) // columns)
    figure = plt.figure(figsize=(5.5 * columns, 4 * rows_of_panels), layout="constrained")
    for number, (scale, tokens, best) in enumerate(panels, start=1):
        axis = figure.add_subplot(rows_of_panels, columns, number)
        # The first tenth is warm-up and the same for all.
        for (name, _), same in sorted((item for item in best.items() if item[0][1] == tokens), key=_loss):
            for index, row in enumerate(same):
                points = range(2, len(row["train_curve"]))
                axis.plot(
                    [tokens / 1e6 * (i + 1) / len(row["train_curve"]) for i in points],
                    [row["train_curve"][i] for i in points],
                    color=_COLOURS.get(row["method"], _GROWING if row.get("norm_growth") else "tab:red"),
                    linestyle="-" if row["block_size"] == 64 else "--",
                    label=None if index else f"{name}: {mean_loss(same):.3f} ({len(same)} seeds)",
                )
        axis.set_xlabel("tokens, millions")
        axis.set_ylabel("training loss, nats")
        axis.set_title(f"{scale}, {tokens / 1e6:.1f}M tokens; in the legend, validation loss at the end", fontsize=9)
        axis.legend(fontsize=8)
    figure.savefig(args.plot, dpi=110)


def _loss(item: tuple[tuple[str, int], list[dict[str, Any]]]) -> float:
    return mean_loss(item[1])


if __name__ == "__main__":
    main()
