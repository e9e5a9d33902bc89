"""Figures beside those of single settings: published against ours, and the errors of every site of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from experiments.frame import LOWER_IS_BETTER, kind_order, records
from experiments.published import WITH_BC
from experiments.store import SITES
from experiments.style import WIDTH, axis_label, kind_label, legend, looks, new_figure, plain_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TICKED_SITES = 12  # up to here every site's name is written


def published(title: str, frame: pd.DataFrame) -> Figure | None:
    """Published values against ours, a point a setting; on the line they agree."""
    frame = frame.dropna(subset="published")
    if frame.empty:
        return None
    places = list(dict.fromkeys(zip(frame["dataset"], frame["metric"], strict=True)))
    figure = new_figure(min(3.3 * len(places), WIDTH * 1.3), 3.6)
    grid = figure.subplots(1, len(places), squeeze=False)[0]
    for axes, (dataset, metric) in zip(grid, places, strict=True):
        _published_panel(axes, frame[(frame["dataset"] == dataset) & (frame["metric"] == metric)], str(metric))
        axes.set_title(str(dataset))
    legend(figure, list(grid))
    figure.suptitle(f"{title}: published against ours")
    return figure


def _published_panel(axes: Axes, frame: pd.DataFrame, metric: str) -> None:
    from matplotlib.ticker import LogFormatter

    kinds = sorted(frame["bc"].unique(), key=kind_order)
    look = looks(kinds)
    low = min(frame["value"].min(), frame["published"].min())
    high = max(frame["value"].max(), frame["published"].max())
    axes.plot([low, high], [low, high], color="black", linewidth=0.8, label="equal")
    for kind in kinds:
        shown = frame[(frame["bc"] == kind) & ~frame["is_float"]]
        error = shown["deviation"].fillna(0)
        axes.errorbar(shown["published"], shown["value"], yerr=error, label=kind_label(kind), **look[kind].points)
    plain = frame[frame["is_float"]]
    axes.plot(plain["published"], plain["value"], "x", color="black", label="float model")
    if metric in LOWER_IS_BETTER and high > 5 * low:
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(LogFormatter(labelOnlyBase=False))
            axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.2, 0.4)))
    axes.set_xlabel("published")
    axes.set_ylabel(f"ours: {axis_label(metric)}")


def read_sites(results: Path) -> dict[str, list[dict[str, Any]]]:
    """Per-site errors of every cell whose folder is here: hash → rows."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((results / "cells").glob(f"*/{SITES}")):
        try:
            cell = json.loads(path.with_name("result.json").read_text("utf8"))["cell"]
            found[str(cell)] = json.loads(path.read_text("utf8"))
        except (OSError, ValueError, KeyError):
            continue  # a run in progress, or a damaged cell: `python -m experiments.status` says which
    return found


def sites(title: str, frame: pd.DataFrame, errors: dict[str, list[dict[str, Any]]]) -> Figure | None:
    """Relative output error of every site before and after BC, held out.

    For every model it shows the fewest bits whose per-site errors are here, and of those the first quantizer.
    """
    chosen = profiles(frame, errors)
    if not chosen:
        return None
    figure = new_figure(WIDTH, 2.5 * len(chosen) + 0.8)
    grid = figure.subplots(len(chosen), 1, squeeze=False)[:, 0]
    for axes, rows in zip(grid, chosen, strict=True):
        kinds = {str(r["bc"]): errors[r["cell"]] for r in rows}
        site_panel(axes, kinds, streams={str(r["bc"]): str(r["stream"]) for r in rows})
        first = rows[0]
        axes.set_title(f"{first['model']}, {first['method']} {first['bits']}")
    legend(figure, list(grid))
    figure.suptitle(title, wrap=True)
    return figure


def profiles(frame: pd.DataFrame, errors: dict[str, list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """For every model the compensated cells of one quantizer and bit width whose per-site errors are here."""
    rows = [
        {
            "model": r.model,
            "method": r.method,
            "bits": r.bits,
            "w_bits": r.w_bits,
            "bc": r.bc,
            "stream": r.stream,
            "cell": cell,
        }
        for r in records(frame)
        for cell in r.cells[:1]
        if r.bc != "off" and cell in errors and any(s.get("held_out_relative_before") for s in errors[cell])
    ]
    out = []
    for model in dict.fromkeys(r["model"] for r in rows):
        mine = sorted((r for r in rows if r["model"] == model), key=lambda r: r["w_bits"])
        first = mine[0]
        alike = [r for r in mine if (r["method"], r["bits"]) == (first["method"], first["bits"])]
        out.append(list({r["bc"]: r for r in alike}.values()))
    return out


def site_panel(
    axes: Axes,
    kinds: dict[str, list[dict[str, Any]]],
    part: str = "held_out",
    streams: Mapping[str, str] | None = None,
) -> None:
    """Errors of the sites of one model, in forward order: without BC once a stream, then with every kind of it.

    An error is that of a site's output on what its stream feeds it, so kinds on different streams are to be held
    against different lines.

    Args:
        axes: Where to draw.
        kinds: Kind of BC → per-site rows as :meth:`bc.report.SiteReport.row` makes them.
        part: ``held_out`` or ``calibration``.
        streams: Kind of BC → its stream; all ``float`` if absent.
    """
    fed = {kind: _measured_on((streams or {}).get(kind, "float")) for kind in kinds}
    kinds = dict(sorted(kinds.items(), key=lambda item: kind_order(item[0])))
    look = looks(list(kinds))
    names: list[str] = []
    drawn: set[str] = set()
    for kind, rows in kinds.items():
        layers = [r for r in rows if r["scope"] == "layer" and r.get(f"{part}_relative_before") is not None]
        names = names or [str(r["site"]) for r in layers]
        if fed[kind] not in drawn:
            before = [(names.index(r["site"]), r[f"{part}_relative_before"]) for r in layers if r["site"] in names]
            label = kind_label("off") + (f", {fed[kind]} inputs" if len(set(fed.values())) > 1 else "")
            line = "-" if fed[kind] == "float" else "--"
            plain = looks(["off"])["off"].colour
            axes.plot(*zip(*before, strict=True), color=plain, linestyle=line, label=label, drawstyle="steps-mid")
            drawn.add(fed[kind])
        places = [names.index(str(r["site"])) for r in layers if r["site"] in names]
        after = [r[f"{part}_relative_after"] for r in layers if r["site"] in names]
        axes.plot(places, after, markersize=3, label=kind_label(kind), **look[kind].points)
    axes.set_yscale("log")
    plain_numbers(axes.yaxis)
    if len(names) <= TICKED_SITES:
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_xlabel("site")
    else:
        axes.set_xlabel(f"number of the site, in forward order ({len(names)} sites)")
    axes.set_ylabel("squared output error,\nrelative (lower is better)")


def _measured_on(stream: str) -> str:
    """What a site is fed while its errors are measured: the float model's inputs, or the quantized model's."""
    return "quantized" if stream in ("quantized", "blended") else "float"


def printed_gains(published: Path) -> Figure | None:
    """What the paper prints without and with BC: its vision table at the fewest bits, and language models."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    vision = _printed(published / "table1_vit.csv", "top1")
    vision = vision[vision["w_bits"] == vision["w_bits"].min()]
    language = _printed(published / "table2_llm.csv", "ppl")
    if vision.empty and language.empty:
        return None
    figure = new_figure(WIDTH, 0.3 + 0.19 * max(len(vision), len(language), 8))
    left, right = figure.subplots(1, 2)
    _printed_panel(left, vision, "top-1 accuracy on ImageNet in % (higher is better)")
    _printed_panel(right, language, "perplexity (lower is better)")
    right.set_xscale("log")
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.xaxis.set_minor_locator(NullLocator())
    legend(figure, [left, right])
    figure.suptitle("As published: the same quantizer without and with Bias Compensation")
    return figure


def _printed(path: Path, metric: str) -> pd.DataFrame:
    """Printed values with BC beside those of the same method without, named by what differs."""
    keys = ["w_bits", "a_bits", "group", "model", "dataset"]
    table = pd.read_csv(path).query("metric == @metric")
    with_bc = table[table["method"].str.endswith(WITH_BC)].copy()
    with_bc["method"] = with_bc["method"].str.removesuffix(WITH_BC)
    both = with_bc.merge(table, on=[*keys, "method"], suffixes=("_bc", ""))
    several = both["dataset"].nunique() > 1
    both["name"] = [
        f"{str(r.model).rpartition('/')[2]}, {r.method} w{r.w_bits:.0f}"
        + (f"a{r.a_bits:.0f}" if r.a_bits < 16 else "")
        + (f"g{r.group:.0f}" if r.group > 0 else "")
        + (f", {r.dataset}" if several else "")
        for r in records(both)
    ]
    return both


def _printed_panel(axes: Axes, table: pd.DataFrame, label: str) -> None:
    places = range(len(table))
    look = looks(["off", "paper"])
    axes.hlines(places, table["value"], table["value_bc"], color="#bbbbbb", linewidth=1)
    for column, kind in (("value", "off"), ("value_bc", "paper")):
        axes.plot(table[column], places, label=kind_label(kind), **look[kind].points)
    axes.set_yticks(places, table["name"], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel(label)
