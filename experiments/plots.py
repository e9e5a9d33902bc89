"""The figures, each a function of an experiment's settings (:func:`experiments.frame.settings`).

A function returns None where it has nothing to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from experiments.frame import LOWER_IS_BETTER, bits_order, kind_order, records
from experiments.style import (
    MARKERS,
    WIDTH,
    axis_label,
    kind_label,
    legend,
    legend_of,
    looks,
    new_figure,
    scale_values,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = ("perplexity", "top1")
BAR = 0.34  # inches a bar: room for its number
MOST_BARS = 40  # beyond these a figure of bars is wider than any page

Draw = Callable[[str, pd.DataFrame], "Figure | None"]


def panels(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Pairs of model and data set."""
    return list(dict.fromkeys(zip(frame["model"], frame["dataset"], strict=True)))


def _of(frame: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    for name, value in wanted.items():
        frame = frame[frame[name] == value]
    return frame


def _kinds(frame: pd.DataFrame) -> list[str]:
    return sorted(frame.loc[~frame["is_float"], "bc"].unique(), key=kind_order)


def _bits(frame: pd.DataFrame) -> list[str]:
    """Labels of the bit widths, from few to many."""
    found = {row.bits: bits_order(row.w_bits, row.a_bits, row.group_size) for row in records(frame)}
    return sorted(found, key=found.__getitem__)


def _float_line(axes: Axes, frame: pd.DataFrame) -> None:
    """The float model, where it was scored on as many samples as the others."""
    alike = frame["test_samples"].isin(frame.loc[~frame["is_float"], "test_samples"])
    for value in frame.loc[frame["is_float"] & alike, "value"]:
        axes.axhline(value, color="black", linestyle=(0, (4, 2)), linewidth=0.9, label="float model")


def _errors(frame: pd.DataFrame) -> Any:
    """Bars of a standard deviation, where there are several seeds."""
    return frame["deviation"].fillna(0.0) if frame["deviation"].notna().any() else None


def bars(title: str, frame: pd.DataFrame) -> Figure | None:
    """Every value as a bar with its number; None where there are too many to be read."""
    frame = frame[frame["metric"].isin(SHOWN)]
    kinds, places = _kinds(frame), panels(frame)
    count = max((len(_groups(_of(frame, model=m, dataset=d))) for m, d in places), default=0) * (len(kinds) + 1)
    alike = frame.duplicated(["model", "dataset", "quantizer", "bits", "bc"])  # an ablation of something else
    if not count or count > MOST_BARS or alike.any():
        return None
    figure = new_figure(max(WIDTH, BAR * count), 2.5 * len(places) + 0.5)
    grid = figure.subplots(len(places), 1, squeeze=False)[:, 0]
    for axes, (model, dataset) in zip(grid, places, strict=True):
        _bar_panel(axes, _of(frame, model=model, dataset=dataset), kinds)
        axes.set_title(f"{model}, {dataset}")
    legend(figure, list(grid))
    figure.suptitle(title, wrap=True)
    return figure


def _groups(frame: pd.DataFrame) -> list[str]:
    """Quantizer and bits of every setting of a panel."""
    frame = frame[~frame["is_float"]]
    return list(dict.fromkeys(f"{m} {b}" for m, b in zip(frame["method"], frame["bits"], strict=True)))


def _bar_panel(axes: Axes, frame: pd.DataFrame, kinds: Sequence[str]) -> None:
    groups, look = _groups(frame), looks(kinds)
    kinds = [kind for kind in kinds if kind in set(frame.loc[~frame["is_float"], "bc"])]
    width = 0.84 / max(len(kinds), 1)
    for number, kind in enumerate(kinds):
        shown = _of(frame[~frame["is_float"]], bc=kind)
        names = [f"{m} {b}" for m, b in zip(shown["method"], shown["bits"], strict=True)]
        places = [groups.index(name) + (number - (len(kinds) - 1) / 2) * width for name in names]
        drawn = axes.bar(
            places,
            shown["value"],
            width,
            yerr=_errors(shown),
            label=kind_label(kind),
            color=look[kind].colour,
            hatch=look[kind].hatch,
            edgecolor="white",
            linewidth=0.5,
            error_kw={"elinewidth": 0.8},
        )
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}  # keeps the float model's line off the numbers
        axes.bar_label(drawn, fmt="%.3g", fontsize=6, padding=1, bbox=paper)
    _float_line(axes, frame)
    metric = str(frame["metric"].iloc[0])
    scale_values(axes, frame["value"].tolist(), metric)
    axes.set_xticks(range(len(groups)), [group.replace(" ", "\n") for group in groups])
    axes.set_ylabel(axis_label(metric))
    axes.margins(y=0.12)
    axes.grid(visible=False, axis="x")


def bits(title: str, frame: pd.DataFrame) -> Figure | None:
    """The metric against bit width, with and without BC: rows are models and data sets, columns quantizers."""
    frame = frame[frame["metric"].isin(SHOWN) & (frame["variant"] == "")]
    frame = frame.drop_duplicates(["model", "dataset", "quantizer", "bits", "bc"], keep=False)  # ablations
    quantized = frame[~frame["is_float"]]
    several = quantized.groupby(["model", "dataset", "quantizer"])["bits"].nunique()
    if not (several > 1).any():
        return None
    methods, places, kinds = list(quantized["method"].unique()), panels(quantized), _kinds(frame)
    width = min(max(WIDTH * 0.75, 2.6 * len(methods)), WIDTH * 1.4)
    figure = new_figure(width, 1.75 * len(places) + 0.9)
    grid = figure.subplots(len(places), len(methods), squeeze=False, sharey="row")
    for line, (model, dataset) in zip(grid, places, strict=True):
        here = _of(frame, model=model, dataset=dataset)
        ticks = _bits(here[~here["is_float"]])
        crowded = len(ticks) * max(0.35, 0.1 * max(map(len, ticks))) > width / len(methods) - 0.4  # inches
        for axes, method in zip(line, methods, strict=True):
            shown = here[(here["method"] == method) | here["is_float"]]
            _bits_panel(axes, shown, ticks, kinds, crowded)
        metric = str(here["metric"].iloc[0])
        scale_values(line[0], here["value"].tolist(), metric)
        line[0].set_ylabel(f"{model}\n{dataset}\n{axis_label(metric)}")
    for axes, method in zip(grid[0], methods, strict=True):
        axes.set_title(method)
    for axes in grid[-1]:
        axes.set_xlabel("bits")
    legend(figure, [axes for line in grid for axes in line])
    figure.suptitle(title, wrap=True)
    return figure


def _bits_panel(axes: Axes, frame: pd.DataFrame, ticks: list[str], kinds: Sequence[str], crowded: bool) -> None:
    look = looks(kinds)
    _float_line(axes, frame)
    for kind in kinds:
        shown = _of(frame[~frame["is_float"]], bc=kind)
        shown = shown.assign(place=[ticks.index(b) for b in shown["bits"]]).sort_values("place")
        if shown.empty:
            continue
        axes.errorbar(
            shown["place"],
            shown["value"],
            yerr=_errors(shown),
            label=kind_label(kind),
            color=look[kind].colour,
            marker=look[kind].marker,
            linestyle=look[kind].line,
            elinewidth=0.8,
            capsize=2,
        )
    turned: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(range(len(ticks)), ticks, **turned)
    axes.set_xlim(-0.3, len(ticks) - 0.7)


def pareto(title: str, frame: pd.DataFrame) -> Figure | None:
    """Quality against everything that is stored, biases included; the line joins the settings that none dominates."""
    frame = frame[frame["metric"].isin(SHOWN) & (frame["variant"] == "")].dropna(subset="bits_per_weight")
    quantized = frame[~frame["is_float"]]
    if quantized["bits_per_weight"].nunique() < 2:
        return None
    places, kinds = panels(quantized), _kinds(frame)
    columns = min(2, len(places))
    rows = -(-len(places) // columns)
    figure = new_figure(WIDTH * (1 if columns > 1 else 0.75), 2.7 * rows + 0.9)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    shapes = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(quantized["method"].unique())}
    for axes, (model, dataset) in zip(grid, places, strict=False):
        _pareto_panel(axes, _of(frame, model=model, dataset=dataset), kinds, shapes)
        axes.set_title(f"{model}, {dataset}")
    for axes in grid[len(places) :]:
        axes.remove()
    _pareto_legend(figure, kinds, shapes)
    figure.suptitle(title, wrap=True)
    return figure


def _pareto_panel(axes: Axes, frame: pd.DataFrame, kinds: Sequence[str], shapes: dict[str, str]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    look = looks(kinds)
    quantized = frame[~frame["is_float"]]
    for row in records(quantized):
        style = look[row.bc].points | ({"marker": shapes[row.method]} if len(shapes) > 1 else {})
        axes.plot(row.bits_per_weight, row.value, alpha=0.9, zorder=3, **style)
    front = frontier(quantized)
    axes.step(front["bits_per_weight"], front["value"], where="post", color="black", linewidth=0.9, zorder=2)
    _float_line(axes, frame)
    metric = str(frame["metric"].iloc[0])
    scale_values(axes, frame["value"].tolist(), metric)
    low, high = quantized["bits_per_weight"].min(), quantized["bits_per_weight"].max()
    if high > 2 * low:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.12, high * 1.12)
        ticks = [b for b in (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64) if low / 1.12 <= b <= high * 1.12]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda b, _: f"{b:g}"))
    axes.set_xlabel("stored bits per weight, biases and scales included")
    axes.set_ylabel(axis_label(metric))


def _pareto_legend(figure: Figure, kinds: Sequence[str], shapes: dict[str, str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    look = looks(kinds)
    entries: list[Any] = []
    if len(shapes) > 1:
        entries += [Patch(color=look[kind].colour, label=kind_label(kind)) for kind in kinds]
        entries += [Line2D([], [], color="#555555", marker=s, linestyle="none", label=n) for n, s in shapes.items()]
    else:
        entries += [Line2D([], [], label=kind_label(kind), **look[kind].points) for kind in kinds]
    entries += [Line2D([], [], color="black", linewidth=0.9, label="not dominated")]
    entries += [Line2D([], [], color="black", linestyle=(0, (4, 2)), linewidth=0.9, label="float model")]
    legend_of(figure, entries, [str(entry.get_label()) for entry in entries])


def frontier(frame: pd.DataFrame) -> pd.DataFrame:
    """The settings of one model and data set that none with fewer or equal bits is better than."""
    sign = 1 if frame["metric"].iloc[0] in LOWER_IS_BETTER else -1
    ordered = frame.assign(rank=sign * frame["value"]).sort_values(["bits_per_weight", "rank"])
    best = ordered["rank"].cummin().shift(fill_value=float("inf"))
    return ordered[ordered["rank"] < best]


def samples(title: str, frame: pd.DataFrame) -> Figure | None:
    """The metric against the number of samples that biases are fitted on, beside the value without BC."""
    frame = frame[frame["metric"].isin(SHOWN)]
    keys = ["model", "dataset", "method", "bits", "bc", "granularity", "scope"]
    with_bc = frame[(frame["bc"] != "off") & ~frame["is_float"]]
    with_bc = with_bc[with_bc.groupby(keys)["calibration_samples"].transform("nunique") > 1]
    plain = frame[(frame["bc"] == "off") & ~frame["is_float"]]
    return _curves(title, with_bc, "calibration_samples", "samples that biases are fitted on", plain)


def lengths(title: str, frame: pd.DataFrame, windows: Mapping[str, int]) -> Figure | None:
    """The metric against the length of the test windows.

    Args:
        title: Of the figure.
        frame: Settings.
        windows: Hash of a cell → tokens of its test windows; cells that it has not are left out.
    """
    frame = frame[frame["metric"].isin(SHOWN) & ~frame["is_float"]]
    known: list[Any] = [windows.get(cells[0]) for cells in frame["cells"]]
    frame = frame.assign(window=known).dropna(subset="window")
    keys = ["model", "dataset", "method", "bits", "bc", "granularity", "scope"]
    frame = frame[frame.groupby(keys)["window"].transform("nunique") > 1]
    return _curves(title, frame, "window", "tokens of a test window", None)


def _curves(title: str, frame: pd.DataFrame, x: str, label: str, plain: pd.DataFrame | None) -> Figure | None:
    """The metric of every kind against a column, a panel for each model, data set, quantizer and bit width."""
    if frame.empty:
        return None
    place_keys = ["model", "dataset", "method", "bits"]
    places = frame[place_keys].drop_duplicates().to_numpy().tolist()
    figure = new_figure(WIDTH * 0.75, 2.4 * len(places) + 0.8)
    grid = figure.subplots(len(places), 1, squeeze=False)[:, 0]
    for axes, values in zip(grid, places, strict=True):
        place = dict(zip(place_keys, values, strict=True))
        _curve_panel(axes, _of(frame, **place), x)
        if plain is not None:
            for value in _of(plain, **place)["value"]:
                axes.axhline(value, color=looks(["off"])["off"].colour, label=kind_label("off"))
        axes.set_xlabel(label)
        axes.set_title("{}, {}, {} {}".format(*values))
    legend(figure, list(grid))
    figure.suptitle(title, wrap=True)
    return figure


def _curve_panel(axes: Axes, frame: pd.DataFrame, x: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    look = looks(_kinds(frame))
    for kind in _kinds(frame):
        shown = _of(frame, bc=kind).sort_values(x)
        seeds = int(shown["seeds"].max())
        axes.errorbar(
            shown[x],
            shown["value"],
            yerr=_errors(shown),
            label=kind_label(kind) + (f" (mean and deviation of {seeds} draws)" if seeds > 1 else ""),
            color=look[kind].colour,
            marker=look[kind].marker,
            linestyle=look[kind].line,
            capsize=2,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(frame[x].unique()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
    axes.set_ylabel(axis_label(str(frame["metric"].iloc[0])))
