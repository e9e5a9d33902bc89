"""How figures look: one palette, one type size, one way to write a file.

The colours are Okabe and Ito's, which are told apart with any colour vision; every colour also has a marker, a line
style and a hatch of its own, so that a figure reads without colour too. A kind of Bias Compensation looks the same in
every figure.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.frame import LOWER_IS_BETTER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
DPI = 150
WIDTH = 7.0  # inches: the text width of a page
LOG_ABOVE = 5.0  # largest over smallest value from which an axis is logarithmic
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
PLAIN = "off"

SETTINGS: Any = {  # of matplotlib
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "figure.titlesize": 9,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True)
class Look:
    """How a kind of Bias Compensation is drawn; markers of variants of a preset are hollow, or half."""

    colour: str
    marker: str | tuple[int, int, int]
    line: str
    hatch: str
    hollow: bool = False
    half: bool = False

    @property
    def points(self) -> dict[str, Any]:
        """Arguments of matplotlib for markers without a line."""
        fill = {"markerfacecolor": "white"} if self.hollow else {}
        fill |= {"fillstyle": "left", "markerfacecoloralt": "white"} if self.half else {}
        return {"color": self.colour, "marker": self.marker, "linestyle": "none", **fill}


LOOKS = {
    PLAIN: Look("#777777", "o", "-", "", hollow=True),
    "channel": Look("#E69F00", "s", "--", "//"),
    "sink": Look("#0072B2", "^", "-", ""),
    "positional": Look("#009E73", "D", "-.", "\\\\"),
    "paper": Look("#D55E00", "v", "-", ".."),
    "shrink": Look("#56B4E9", "P", "-", "++"),
    "lowrank": Look("#CC79A7", "X", "--", "xx"),
    "affine": Look("#000000", "*", ":", "--"),
    "linear": Look("#882255", "<", "-.", "||"),
    "readout": Look("#661100", "d", "--", "|"),
    "classic": Look("#B8A800", ">", ":", "oo"),
    "search": Look("#44AA99", "p", ":", "**"),
}
LATER = (":", "--", "-.")  # lines of variants by their number
OTHERS = (Look("#AA4499", "h", "--", "/"), Look("#117733", "H", ":", "\\"), Look("#332288", "8", "-.", "."))


def looks(kinds: Sequence[str]) -> dict[str, Look]:
    """The look of every kind: its own; its preset's, hollow, for a variant (``sink-layer-quantized``); or another.

    On the blended stream a variant's marker is half filled. Of several variants alike the later have stars of more and
    more points as markers.
    """
    found, free = {}, list(OTHERS)
    seen: dict[tuple[str, bool], int] = {}
    for kind in kinds:
        base = kind.partition("-")[0]
        if kind in LOOKS:
            found[kind] = LOOKS[kind]
        elif base in LOOKS:
            half = "-blended" in kind
            hatch = LOOKS[base].hatch + ("..." if half else "///")
            found[kind] = replace(LOOKS[base], line=":", hatch=hatch, hollow=not half, half=half)
            if number := seen.get((base, half), 0):
                marker, hatch = (3 + number, 1, 0), hatch + "o" * number
                found[kind] = replace(found[kind], marker=marker, hatch=hatch, line=LATER[number % len(LATER)])
            seen[base, half] = number + 1
        else:
            found[kind] = free.pop(0) if len(free) > 1 else free[0]
    return found


def kind_label(kind: str) -> str:
    """What a legend calls a kind of Bias Compensation."""
    return "no BC" if kind == PLAIN else f"BC {kind}"


def axis_label(metric: str) -> str:
    """What an axis of values says, with the unit and the good direction."""
    if metric in LOWER_IS_BETTER:
        return f"{metric}\n(lower is better)"
    return f"{metric.replace('top', 'top-')} accuracy in %\n(higher is better)"


@contextmanager
def styled() -> Iterator[None]:
    """Draw and save in the project's style."""
    from matplotlib import rc_context

    with rc_context(SETTINGS):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def scale_values(axes: Axes, values: Sequence[float], metric: str) -> None:
    """Make the axis of a metric logarithmic where perplexities are far apart."""
    if metric not in LOWER_IS_BETTER or not values or max(values) <= LOG_ABOVE * min(values):
        return
    axes.set_yscale("log")
    plain_numbers(axes.yaxis)


def plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis with numbers, also between powers of ten where it is short."""
    from matplotlib.ticker import FuncFormatter

    def label(value: float, _: int | None) -> str:
        low, high = axis.get_view_interval()
        decades = math.log10(high / low)
        shown: Sequence[int] = (1,) if decades > 3 else (1, 2, 5) if decades > 0.6 else range(1, 10)
        return f"{value:g}" if round(value / 10 ** math.floor(math.log10(value) + 1e-9)) in shown else ""

    for formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        formatter(FuncFormatter(label))


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, below them, no wider than the figure."""
    entries: dict[str, Any] = {}
    for panel in axes:
        entries |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    legend_of(figure, list(entries.values()), list(entries))


def legend_of(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend below the figure, in as many columns as its width has room for."""
    if not labels:
        return
    inches = 0.5 + 0.0575 * max(len(label) for label in labels)
    columns = max(1, min(len(labels), int(figure.get_figwidth() / inches)))
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.17 * max(0, rows - 2))  # the panels keep their height
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=2.2, columnspacing=1
    )


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure in all formats; the same figure gives the same bytes."""
    from matplotlib import rc_context

    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{ending}") for ending in FORMATS]
    with rc_context({**SETTINGS, "svg.hashsalt": stem.name}):
        for path in paths:
            figure.savefig(path, dpi=DPI, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def remove(stem: Path) -> list[Path]:
    """Remove a figure in all formats; returns what was there."""
    found = [path for ending in FORMATS if (path := stem.with_name(f"{stem.name}.{ending}")).exists()]
    for path in found:
        path.unlink()
    return found


def png(figure: Figure, dpi: int = 80) -> bytes:
    """A figure as PNG, small enough for a notebook."""
    stream = io.BytesIO()
    with styled():
        figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()
