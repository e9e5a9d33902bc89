"""A table in Markdown, LaTeX, HTML (wide, for people) and CSV (long, for programs)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import pandas as pd

from experiments.config import CellConfig
from experiments.data import ImageData, ImageEvaluation
from experiments.identity import bc_name, cell_hash, with_seed
from experiments.published import method_name
from experiments.records import write_text

if TYPE_CHECKING:
    from experiments.tables import Line

FIXED_BELOW = 10_000  # larger values are printed in scientific notation
REASON_LENGTH = 160  # of why there is no value, in tables for people
LONG = (
    "model",
    "quantizer",
    "bits",
    "bc",
    "dataset",
    "metric",
    "published",
    "ours",
    "deviation",
    "seeds",
    "difference",
    "bits_per_weight",
    "bias_parameters",
    "missing",
    "note",
    "test_samples",
    "limit",
    "offset",
)
LATEX_SIGNS = {"±": "$\\pm$", "—": "---", "∞": "$\\infty$"}
SETTING = ("model", "quantizer", "bits", "BC", "bits/weight", "bias values")
WORDS = SETTING[:4]  # the others are numbers
#: Further columns of a setting, shown where an experiment varies them.
VARIED: dict[str, Callable[[CellConfig], str]] = {
    "samples": lambda cell: str(fit_samples(cell)) if cell.bc.enabled else "—",
    "test window": lambda cell: str(getattr(cell.data.evaluation, "window", "")),
}
MADE_BY = "Made by `python -m experiments.tables {name}`; not to be edited."


def write_table(stem: Path, title: str, lines: Sequence[Line]) -> list[Path]:
    """Write a table in all formats.

    Args:
        stem: Path without ending.
        title: Heading.
        lines: What to show, in order.

    Returns:
        The files.
    """
    frame, bold = wide(lines)
    notes = sorted({f"{line.cell.model.name}, {line.dataset}: {n}" for line in lines if (n := _note(line))})
    texts = {
        "md": markdown(stem.name, title, frame, bold, notes),
        "tex": latex(stem.name, title, frame, bold),
        "csv": long_csv(lines),
        "html": html(stem.name, title, frame, bold, notes),
    }
    for ending, text in texts.items():
        write_text(stem.with_suffix(f".{ending}"), text)
    return [stem.with_suffix(f".{ending}") for ending in texts]


def wide(lines: Sequence[Line]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row a setting, the data sets side by side; and which entries are the best of their model and bits."""
    with_published = any(line.published for line in lines)
    further = varied(line.cell for line in lines)
    best = [id(line) for line in _best(lines)]
    table: dict[str, dict[tuple[str, str], str]] = {}
    bold: dict[str, set[tuple[str, str]]] = {}
    for line in lines:
        key = cell_hash(with_seed(line.cell, 0))
        row = table.setdefault(key, {})
        if line.rows or not row:  # storage is known as soon as one data set was evaluated
            row |= {("", name): value(line.cell) for name, value in further.items()}
            row |= {("", name): text for name, text in zip(SETTING, _setting(line), strict=True)}
        if with_published:
            row[line.heading, "published"] = number(line.published.value) if line.published else "—"
        row[line.heading, "ours"] = ours(line)
        if with_published:
            row[line.heading, "difference"] = number(line.difference, sign=True)
        if id(line) in best:
            bold.setdefault(key, set()).add((line.heading, "ours"))
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    index = pd.MultiIndex.from_tuples(columns)
    frame = pd.DataFrame([[row.get(c, "—") for c in columns] for row in table.values()], columns=index)
    mask = pd.DataFrame([[c in bold.get(key, ()) for c in columns] for key in table], columns=index)
    return frame, mask


def varied(cells: Iterable[CellConfig]) -> dict[str, Callable[[CellConfig], str]]:
    """The further settings in which cells differ: name → value of a cell."""
    quantized = [cell for cell in cells if not cell.is_float]
    with_bc = [cell for cell in quantized if cell.bc.enabled]
    found = {name: value for name, value in VARIED.items() if len(set(map(value, with_bc))) > 1}
    return found | {name: partial(_option, name) for name in _varied_options(quantized)}


def _varied_options(cells: Iterable[CellConfig]) -> list[str]:
    """Options in which cells of one quantizer differ."""
    values: dict[tuple[str, str], set[str]] = {}
    for cell in cells:
        for name, value in cell.options.items():
            values.setdefault((cell.quantizer, name), set()).add(str(value))
    return list(dict.fromkeys(name for (_, name), seen in values.items() if len(seen) > 1))


def _option(name: str, cell: CellConfig) -> str:
    return "—" if cell.is_float else str(cell.options.get(name, "—"))


def fit_samples(cell: CellConfig) -> int:
    """Samples that biases are fitted on."""
    data = cell.data
    return data.compensation.samples if isinstance(data, ImageData) else data.calibration.samples


def _setting(line: Line) -> tuple[str, ...]:
    cell = line.cell
    bits, biases = line.fact("bits_per_weight"), line.fact("bias_parameters")
    return (
        cell.model.name,
        "float" if cell.is_float else method_name(cell.quantizer),
        cell.model.dtype if cell.is_float else cell.bits.label,
        bc_name(cell) + (f" ({chosen})" if (chosen := _chosen(line)) else ""),
        "—" if bits is None else f"{bits:.2f}",
        "—" if biases is None else f"{biases:,.0f}",
    )


def _chosen(line: Line) -> str:
    """The scopes that a search chose, over all seeds."""
    if not line.cell.bc.searched:
        return ""
    shapes = {"-".join(filter(None, (row["granularity"], row["scope"], row["stream"]))) or "off" for row in line.rows}
    return ", ".join(sorted(shapes))


def _best(lines: Sequence[Line]) -> list[Line]:
    """The best value of every model, bits and data set, where there are several to compare."""
    groups: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        if line.mean is not None and not line.cell.is_float:
            window = VARIED["test window"](line.cell)
            groups.setdefault((line.cell.model.name, line.cell.bits.label, line.dataset, window), []).append(line)
    return [min(g, key=_rank) for g in groups.values() if len(g) > 1]


def _rank(line: Line) -> float:
    """Lower is better."""
    value = math.inf if line.mean is None else line.mean
    return value if line.cell.metric == "perplexity" else -value


def ours(line: Line) -> str:
    """Mean ± standard deviation over seeds, and how many of those that were asked for, or why there is none."""
    if line.mean is None:
        return shorten(line.missing, REASON_LENGTH, placeholder=" …")  # the CSV file has all of it
    lacking = f" of {line.listed}" if len(line.values) < line.listed else ""
    count = f" (n={len(line.values)}{lacking})" if lacking or len(line.values) > 1 else ""
    return number(line.mean) + ("" if line.deviation is None else f" ± {number(line.deviation)}") + count


def number(value: float | None, sign: bool = False) -> str:
    """A value for people: two decimals, scientific where it is large."""
    if value is None:
        return "—"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    form = ".2f" if abs(value) < FIXED_BELOW else ".3g"
    return format(value, f"+{form}" if sign else form)


def _note(line: Line) -> str:
    return line.published.note if line.published else ""


def headings(frame: pd.DataFrame) -> list[str]:
    """One heading a column, for formats with a single heading line."""
    return [": ".join(part for part in map(str, column) if part) for column in frame.columns.to_list()]


def markdown(name: str, title: str, frame: pd.DataFrame, bold: pd.DataFrame, notes: Sequence[str]) -> str:
    """The table in Markdown."""
    rows = [[str(value) for value in row] for row in frame.to_numpy().tolist()]
    marks = bold.to_numpy().tolist()
    rows = [
        [f"**{v}**" if m else v for v, m in zip(row, mark, strict=True)] for row, mark in zip(rows, marks, strict=True)
    ]
    align = ["---" if column[-1] in WORDS else "--:" for column in frame.columns]
    body = [headings(frame), align, *rows]
    table = "\n".join("| " + " | ".join(v.replace("|", "\\|") for v in row) + " |" for row in body)
    lines = "".join(f"- {note}\n" for note in notes)
    text = f"# {title}\n\n{MADE_BY.format(name=name)} Bits per weight count scales, zero points and biases. "
    text += "Mean ± standard deviation over n seeds; n of m where the others failed or were not run. "
    text += "Bold: the best of a model, bit width and data set.\n\n"
    return text + table + "\n" + (f"\nNotes on the published values:\n\n{lines}" if lines else "")


def _styled(name: str, frame: pd.DataFrame, bold: pd.DataFrame, escape: str) -> Any:
    css = bold.map(lambda b: "font-weight: bold" if b else "")
    styler = frame.style.format(escape=escape, na_rep="—")
    return styler.apply(lambda _: css, axis=None).hide(axis="index").set_uuid(name)


def latex(name: str, title: str, frame: pd.DataFrame, bold: pd.DataFrame) -> str:
    """The table in LaTeX (booktabs)."""
    plain = frame.copy()
    plain.columns = pd.Index(headings(frame))
    mask = bold.copy()
    mask.columns = plain.columns
    styler = _styled(name, plain, mask, "latex").format_index(escape="latex", axis=1)
    align = "".join("l" if column[-1] in WORDS else "r" for column in frame.columns)
    text = styler.to_latex(hrules=True, convert_css=True, column_format=align, caption=title.replace("%", "\\%"))
    for sign, command in LATEX_SIGNS.items():
        text = text.replace(sign, command)
    return f"% {MADE_BY.format(name=name)}\n{text}"


def html(name: str, title: str, frame: pd.DataFrame, bold: pd.DataFrame, notes: Sequence[str]) -> str:
    """The table in HTML."""
    styler = _styled(name, frame, bold, "html").set_caption(title)
    styler = styler.set_table_styles([{"selector": "td, th", "props": "padding: 0.2em 0.7em; text-align: right"}])
    lines = "".join(f"<li>{note}</li>\n" for note in notes)
    table = styler.to_html(doctype_html=True, encoding="utf8")
    return table.replace("</body>", f"<ul>\n{lines}</ul>\n</body>") if lines else table


def long_csv(lines: Sequence[Line]) -> str:
    """One row a setting and data set, numbers in full precision; further columns for settings in which cells differ.

    ``limit`` and ``offset`` are empty where all images are scored.
    """
    stream = io.StringIO()
    further = varied(line.cell for line in lines)
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*LONG, *(name.replace(" ", "_") for name in further)])
    for line in lines:
        cell, published = line.cell, line.published.value if line.published else None
        numbers = (published, line.mean, line.deviation, len(line.values), line.difference)
        storage = (line.fact("bits_per_weight"), line.fact("bias_parameters"))
        names = (
            cell.model.name,
            cell.quantizer,
            cell.bits.label,
            bc_name(cell),
            line.dataset,
            cell.metric,
        )
        evaluation = cell.data.evaluation
        part = (evaluation.limit, evaluation.offset) if isinstance(evaluation, ImageEvaluation) else (None, None)
        scored = [None if (n := line.fact("test_samples")) is None else round(n), *part]
        facts = ["" if n is None else repr(n) for n in (*numbers, *storage)]
        facts += [line.missing, _note(line), *("" if n is None else str(n) for n in scored)]
        writer.writerow([*names, *facts, *(value(cell) for value in further.values())])
    return stream.getvalue()
