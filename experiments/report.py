"""Write the results as one page: ``python -m experiments.report [--results DIR]``.

``results/report/index.html`` holds everything it needs (style, script, figures, data) and asks no network for anything.
It is made from ``cells.csv``, ``results/figures`` and ``results/published``; where the folder of a cell is still under
``results/cells``, the cell's configuration and the errors of its sites are in it too.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from bc.errors import UserError
from experiments import frame
from experiments.arguments import reading_command
from experiments.records import FILE, write_text
from experiments.report_tables import (
    cell_name,
    cell_table,
    csv_table,
    gain_table,
    overview_table,
    setting_table,
)
from experiments.store import RESULT, SITES, InvalidResultError, check_result, read_json

ASSETS = Path(__file__).parent / "assets"
TITLE = "Bias Compensation: results"
FIGURES = {
    "": "every value, with and without Bias Compensation",
    "_bits": "the metric against bit width",
    "_pareto": "quality against stored bits per weight, biases included",
    "_samples": "the metric against the samples that biases are fitted on",
    "_published": "published values against ours",
    "_sites": "relative output error of every site before and after, on held-out samples",
}
PRINTED = "As published: the same quantizer without and with Bias Compensation"
SITE_FIELDS = ("site", "scope", "granularity", "bias_parameters", "folded")
SITE_ERRORS = tuple(
    f"{part}_{error}_{when}"
    for part in ("calibration", "held_out")
    for error in ("relative", "l1")
    for when in ("before", "after")
)
FACTS_OF_CELL = (*frame.FACTS, *frame.COSTS)
SOURCE_OF_CELL = ("device", "commit", "experiment", "suite")


def write_report(results: Path) -> Path:
    """Make the page.

    Raises:
        UserError: There is no row to show.
    """
    rows = frame.load(results)
    if rows.empty:
        raise UserError(f"report: {results / FILE} has no rows; run an experiment, then python -m experiments.tables")
    path = results / "report" / "index.html"
    write_text(path, page(rows, results))
    return path


def page(rows: pd.DataFrame, results: Path) -> str:
    """The page's text."""
    listed = frame.experiments()
    settings = frame.with_published(frame.settings(rows), listed)
    details = {cell: detail for cell, detail in cell_details(results).items() if cell in set(rows["cell"])}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((ASSETS / "report.html").read_text("utf8"))
    return template.render(
        title=TITLE,
        summary=summary(rows),
        overview=overview_table(listed, rows),
        gains=gain_table(frame.pairs(rows)),
        experiments=[section(e, settings, results) for e in sections(listed, rows)],
        published=[csv_table(path) for path in sorted((results / "published").glob("*.csv"))],
        printed=drawn(results, "published", PRINTED),
        cells=cell_table(rows),
        details=bool(details),
        style=Markup((ASSETS / "report.css").read_text("utf8")),
        script=Markup((ASSETS / "report.js").read_text("utf8")),
        data=Markup(embedded({"cells": cell_pages(rows), "details": details})),
    )


def summary(rows: pd.DataFrame) -> str:
    """What there is, in a sentence."""
    devices = ", ".join(sorted(rows["device"].unique()))
    return (
        f"{rows['cell'].nunique()} cells and {len(rows)} values of {rows['experiment'].nunique()} experiments on "
        f"{rows['model'].nunique()} models, measured on: {devices}. Perplexity: lower is better; accuracy: higher."
    )


def sections(listed: Sequence[frame.Experiment], rows: pd.DataFrame) -> list[frame.Experiment]:
    """Experiments with rows; one whose file is gone is shown by its name."""
    known = {e.name: e for e in listed}
    names = sorted(set(rows["experiment"]))
    return [known.get(n) or frame.Experiment(n, "", n, None, 0, "") for n in names]


def section(experiment: frame.Experiment, settings: pd.DataFrame, results: Path) -> dict[str, Any]:
    """What the page shows of an experiment."""
    mine = settings[settings["experiment"] == experiment.name]
    named = mine[mine["note"] != ""]
    notes = [f"{model}, {dataset}: {note}" for model, dataset, note in named[["model", "dataset", "note"]].to_numpy()]
    return {
        "name": experiment.name,
        "title": experiment.title,
        "about": experiment.about,
        "figures": figures(experiment, results),
        "table": setting_table(experiment.title, mine),
        "notes": sorted(set(notes)),
    }


def figures(experiment: frame.Experiment, results: Path) -> list[dict[str, str]]:
    """The drawn figures of an experiment, as data that a page can hold."""
    found = (drawn(results, experiment.name + end, f"{experiment.title}: {what}") for end, what in FIGURES.items())
    return [figure for figure in found if figure is not None]


def drawn(results: Path, name: str, text: str) -> dict[str, str] | None:
    """A drawn figure as data, with its description; None where it was not drawn."""
    path = results / "figures" / f"{name}.svg"
    if not path.is_file():
        return None
    code = base64.b64encode(path.read_bytes()).decode()
    return {"data": f"data:image/svg+xml;base64,{code}", "text": text}


def cell_pages(rows: pd.DataFrame) -> dict[str, Any]:
    """Everything that cells.csv says of every cell, by hash."""
    pages: dict[str, Any] = {}
    for row in rows.to_dict("records"):
        known = {str(k): clean(v) for k, v in row.items()}
        page = pages.setdefault(
            known["cell"],
            {
                "name": cell_name(known),
                "values": [],
                "settings": [[k, known[k]] for k in (*frame.WEIGHTS, *frame.KIND, "model", "bits", "seed", "cell")],
                "provenance": [[k, known[k]] for k in (*FACTS_OF_CELL, *SOURCE_OF_CELL)],
            },
        )
        page["values"].append(
            [f"{known['metric']} on {known['dataset']}", f"{known['value']} ({known['test_samples']} samples)"]
        )
    return pages


def cell_details(results: Path) -> dict[str, Any]:
    """Configuration, provenance and per-site errors of the cells whose folders are here, by hash."""
    found = {}
    for path in sorted((results / "cells").glob(f"*/{RESULT}")):
        try:
            result = check_result(read_json(path), str(path))
            sites = read_json(path.with_name(SITES))
        except (InvalidResultError, OSError):
            continue  # `python -m experiments.status` says which, and the next run makes it again
        source = {k: v for k, v in result["provenance"].items() if k not in ("host", "command")}
        shown = [{k: clean(site.get(k)) for k in (*SITE_FIELDS, *SITE_ERRORS)} for site in sites]
        found[result["cell"]] = {"config": result["config"], "provenance": source, "sites": shown}
    return found


def clean(value: Any) -> Any:
    """A value that JSON can hold; what is not a number becomes null."""
    if isinstance(value, float):
        return None if pd.isna(value) else int(value) if value.is_integer() and abs(value) < 1e15 else value
    return value


def embedded(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    return reading_command(
        "report", "Write the results as one page.", lambda options: [write_report(options.results)], [], arguments
    )


if __name__ == "__main__":
    sys.exit(main())
