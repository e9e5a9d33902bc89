"""Draw an experiment's results from cells.csv: ``python -m experiments.figures demo [--results DIR]``.

A panel a model and test set, a group of bars a setting, a bar a kind of Bias Compensation, a line for the float model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bc.errors import UserError
from experiments.disk import one_line_disk_errors
from experiments.identity import bc_name
from experiments.published import method_name
from experiments.tables import Line, stored_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision; hatches for prints without colour
COLOURS = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00")
HATCHES = ("", "//", "", "\\\\", "..", "", "xx")
FORMATS = ("png", "svg")
LOG_ABOVE = 5.0  # largest over smallest value from which the axis is logarithmic
PANEL = (6.4, 3.6)  # inches, at least
BAR = 0.34  # inches a bar: room for its number
DPI = 150


def draw(title: str, lines: Sequence[Line]) -> Figure:
    """The figure of an experiment.

    Raises:
        UserError: There is no value to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = [line for line in lines if line.mean is not None]
    if not known:
        raise UserError("figures: cells.csv has no value of this experiment; run it, then python -m experiments.tables")
    panels = list(dict.fromkeys((line.cell.model.name, line.dataset) for line in known))
    kinds = list(dict.fromkeys(bc_name(line.cell) for line in known if not line.cell.is_float))
    bars = len({_setting(line) for line in known if not line.cell.is_float}) * (len(kinds) + 1)
    size = (max(PANEL[0], BAR * bars), PANEL[1] * len(panels))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        draw_panel(axes, [line for line in known if (line.cell.model.name, line.dataset) == panel], kinds)
        axes.set_title(", ".join(panel))
    figure.suptitle(title, wrap=True)
    return figure


def draw_panel(axes: Axes, lines: Sequence[Line], kinds: Sequence[str]) -> None:
    """One model and test set: bars of every setting and kind of BC."""
    from matplotlib.ticker import LogFormatter

    bars = [line for line in lines if not line.cell.is_float]
    settings = list(dict.fromkeys(_setting(line) for line in bars))
    width = 0.8 / max(len(kinds), 1)
    for number, kind in enumerate(kinds):
        shown = [line for line in bars if bc_name(line.cell) == kind]
        places = [settings.index(_setting(line)) + (number - (len(kinds) - 1) / 2) * width for line in shown]
        drawn = axes.bar(
            places,
            [line.mean or 0.0 for line in shown],
            width,
            yerr=[line.deviation or 0.0 for line in shown] if any(line.deviation for line in shown) else None,
            label="no BC" if kind == "off" else f"BC {kind}",
            color=COLOURS[number % len(COLOURS)],
            hatch=HATCHES[number % len(HATCHES)],
            edgecolor="black",
            linewidth=0.5,
        )
        axes.bar_label(drawn, fmt="%.3g", fontsize=7, padding=1)
    for line in lines:
        if line.cell.is_float and line.mean is not None:
            axes.axhline(line.mean, color="black", linestyle="--", linewidth=1, label=f"float ({line.mean:.2f})")
    values = [line.mean for line in lines if line.mean is not None]
    perplexity = lines[0].cell.metric == "perplexity"
    if perplexity and max(values) > LOG_ABOVE * min(values):
        axes.set_yscale("log")
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 1)))
    axes.set_xticks(range(len(settings)), [setting.replace(" ", "\n") for setting in settings])
    axes.set_ylabel("perplexity (lower is better)" if perplexity else "top-1 in % (higher is better)")
    axes.margins(y=0.1)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _setting(line: Line) -> str:
    return f"{method_name(line.cell.quantizer)} {line.cell.bits.label}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.figures", description="Draw an experiment's results.")
    parser.add_argument("experiment", help="name of a file in conf/experiment")
    parser.add_argument("overrides", nargs="*", help="overrides that the experiment was run with")
    parser.add_argument("--results", type=Path, default=Path("results"), help="results directory (default: results)")
    options = parser.parse_intermixed_args(arguments)
    try:
        figure = draw(*stored_lines(options.experiment, options.overrides, options.results))
        with one_line_disk_errors("--results"):
            for path in save(figure, options.results / "figures" / options.experiment):
                print(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure in all formats; the same figure gives the same bytes."""
    from matplotlib import rc_context

    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(f".{ending}") for ending in FORMATS]
    with rc_context({"svg.hashsalt": stem.name}):
        for path in paths:
            figure.savefig(path, dpi=DPI, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


if __name__ == "__main__":
    sys.exit(main())
