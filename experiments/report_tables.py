"""The tables of the report, as columns and entries; how they look is the template's matter."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from experiments import frame
from experiments.render import number

DIGITS = 8  # of a cell's hash, where it is a link's text


@dataclass(frozen=True)
class Column:
    """A column's heading; ``choose`` offers its values in a list."""

    title: str
    number: bool = False
    choose: bool = False


@dataclass(frozen=True)
class Entry:
    """What a field of a table shows, and what it is sorted by where that is a number."""

    text: str
    key: str | None = None
    links: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """A table of the report."""

    caption: str
    columns: list[Column]
    rows: list[list[tuple[Column, Entry]]]


def make(caption: str, columns: Sequence[Column], rows: Iterable[Sequence[Entry]]) -> Table:
    """Put columns and entries together."""
    return Table(caption, list(columns), [list(zip(columns, row, strict=True)) for row in rows])


def words(value: Any) -> Entry:
    """An entry of text."""
    return Entry("" if value is None or (isinstance(value, float) and pd.isna(value)) else str(value))


def figure(value: float | None, text: str | None = None, sign: bool = False) -> Entry:
    """An entry of a number, sorted by its full precision."""
    if value is None or pd.isna(value):
        return Entry("—", "")
    return Entry(text if text is not None else number(float(value), sign), repr(float(value)))


def whole(value: float | None) -> Entry:
    """An entry of a whole number."""
    return figure(value, None if value is None or pd.isna(value) else f"{value:,.0f}")


def cells(hashes: Iterable[str]) -> Entry:
    """Links to cells."""
    return Entry("", None, [{"cell": cell, "text": cell[:DIGITS]} for cell in hashes])


def cell_name(row: dict[str, Any]) -> str:
    """What a cell is called: model, quantizer, bits, BC and seed."""
    if row["is_float"]:
        return f"{row['model']}, float"
    kind = "no BC" if row["bc"] == "off" else f"BC {row['bc']}"
    return f"{row['model']}, {row['method']} {row['bits']}, {kind}, seed {row['seed']}"


def overview_table(listed: Sequence[frame.Experiment], rows: pd.DataFrame) -> Table:
    """Every experiment and what there is of it."""
    names = ("experiment", "suite", "title", "models", "cells with results", "listed cells", "what to do")
    columns = [Column(n, number="cells" in n, choose=n == "suite") for n in names]
    body = []
    for e in listed:
        mine = rows[rows["experiment"] == e.name]
        count = mine["cell"].nunique()
        todo = "" if count else f"not run yet: python -m experiments.run +experiment={e.name}"
        models = ", ".join(dict.fromkeys(mine["model"]))
        texts = [words(e.name), words(e.suite), words(e.title), words(models)]
        body.append([*texts, whole(count), whole(e.cells), words(todo)])
    return make("Experiments", columns, body)


def gain_table(pairs: pd.DataFrame) -> Table:
    """For every experiment, model, test set and kind of BC how many pairs improve, and by how much."""
    names = ["experiment", "model", "dataset", "metric", "bc"]
    columns = [Column(n.upper() if n == "bc" else n, choose=True) for n in names]
    columns += [Column(n, number=True) for n in ("pairs", "improved", "median gain", "least", "most")]
    columns.append(Column("unit"))
    body = []
    for _, group in pairs.groupby(names, sort=True) if len(pairs) else []:
        first, gains = group.iloc[0], group["gain"]
        improved = [whole(len(gains)), whole(int((gains > 0).sum()))]
        spread = [figure(float(v), sign=True) for v in (gains.median(), gains.min(), gains.max())]
        unit = words(frame.gain_unit(str(first["metric"])))
        body.append([*(words(first[n]) for n in names), *improved, *spread, unit])
    return make("Gains by Bias Compensation, over pairs of cells", columns, body)


def setting_table(title: str, settings: pd.DataFrame) -> Table:
    """Settings of an experiment, means over seeds."""
    published = settings["published"].notna().any()
    chosen = {
        "model": "model",
        "method": "quantizer",
        "bits": "bits",
        "bc": "BC",
        "scope": "scope",
        "dataset": "dataset",
    }
    columns = [Column(n, choose=True) for n in (*chosen.values(), "metric")]
    columns += [Column(n, number=True) for n in ("value", "± over seeds", "seeds")]
    columns += [Column(n, number=True) for n in ("published", "difference")] if published else []
    facts = ("bits/weight", "bias values", "error before", "error after", "samples")
    columns += [*(Column(n, number=True) for n in facts), Column("cells")]
    body = []
    for row in frame.records(settings):
        entries = [words(getattr(row, name)) for name in (*chosen, "metric")]
        entries += [figure(row.value), figure(row.deviation), whole(row.seeds)]
        if published:
            entries += [figure(row.published), figure(row.value - row.published, sign=True)]
        entries += [figure(row.bits_per_weight), whole(row.bias_parameters)]
        entries += [figure(v, None if pd.isna(v) else f"{v:.4f}") for v in (row.error_before, row.error_after)]
        body.append([*entries, whole(row.calibration_samples), cells(row.cells)])
    return make(title, columns, body)


def cell_table(rows: pd.DataFrame) -> Table:
    """Every measured value."""
    names = {"experiment": "experiment", "model": "model", "method": "quantizer", "bits": "bits", "bc": "BC"}
    names |= {"dataset": "dataset", "metric": "metric"}
    columns = [Column(n, choose=True) for n in names.values()]
    columns += [Column(n, number=True) for n in ("seed", "value", "bits/weight")]
    columns += [Column(n, number=True) for n in ("seconds quantize", "seconds BC", "seconds evaluate", "memory MB")]
    columns += [Column("device", choose=True), Column("cell")]
    body = []
    for row in frame.records(rows):
        entries = [words(getattr(row, name)) for name in names]
        entries += [whole(row.seed), figure(row.value), figure(row.bits_per_weight)]
        costs = (row.seconds_quantize, row.seconds_bc, row.seconds_evaluate)
        entries += [figure(v, None if pd.isna(v) else f"{v:.1f}") for v in costs]
        body.append([*entries, whole(row.peak_memory_mb), words(row.device), cells([row.cell])])
    return make("All measured values", columns, body)


def csv_table(path: Path) -> Table:
    """A committed CSV file as it is."""
    with path.open(encoding="utf8", newline="") as stream:
        head, *lines = list(csv.reader(stream))
    numeric = [_is_number(line[i] for line in lines) for i in range(len(head))]
    choose = ("method", "model", "dataset", "w_bits", "group")
    columns = [Column(n, number=is_number, choose=n in choose) for n, is_number in zip(head, numeric, strict=True)]
    body = [
        [Entry(text, text if is_number else None) for text, is_number in zip(line, numeric, strict=True)]
        for line in lines
    ]
    return make(path.name, columns, body)


def _is_number(values: Iterable[str]) -> bool:
    try:
        return bool([float(value) for value in values if value])
    except ValueError:
        return False
