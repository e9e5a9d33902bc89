"""Figure of the benchmarks: how time and memory of calibration grow, and what is saved beside the literal protocols."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from experiments.style import WIDTH, new_figure, plain_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTITIES = {"cpu_seconds": "CPU time in s", "peak_mib": "peak memory in MiB"}
UNITS = {"samples": "calibration samples", "blocks": "blocks", "width": "width of the model"}


def latest(path: Path) -> pd.DataFrame | None:
    """Rows of the last run that a benchmark's file holds; None without the file."""
    if not path.exists():
        return None
    rows = pd.read_csv(path)
    return rows[rows["commit"] == rows["commit"].iloc[-1]]


def scaling(results: Path) -> Figure | None:
    """CPU time and peak memory of GPTQ with layer-scope BC against samples, blocks and width, on logarithmic axes."""
    from matplotlib.ticker import NullLocator

    rows = latest(results / "benchmarks" / "scaling.csv")
    if rows is None:
        return None
    curves = [name for name in UNITS if name in set(rows["curve"])]
    figure = new_figure(WIDTH, 3.6)
    grid = figure.subplots(2, len(curves), squeeze=False, sharey="row", sharex="col")
    for column, curve in enumerate(curves):
        mine = rows[rows["curve"] == curve].sort_values("at")
        for row, (quantity, label) in enumerate(QUANTITIES.items()):
            axes = grid[row][column]
            slope = mine[f"{quantity}_slope"].iloc[0]
            axes.loglog(mine["at"], mine[quantity], "o-", color="C0", markersize=3.5)
            axes.set_title(f"slope {slope:.2f}", fontsize="small")
            axes.set_xticks(mine["at"], [f"{value:g}" for value in mine["at"]])
            axes.xaxis.set_minor_locator(NullLocator())
            plain_numbers(axes.yaxis)
            if column == 0:
                axes.set_ylabel(label)
            if row:
                axes.set_xlabel(UNITS[curve])
    figure.suptitle("GPTQ with Bias Compensation of the Linears: cost against size")
    return figure
