"""cells.csv: one row for every experiment, cell and metric, in full precision and a fixed order."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bc.errors import UserError

COLUMNS = (
    "experiment",
    "suite",
    "model",
    "quantizer",
    "w_bits",
    "a_bits",
    "group_size",
    "bc",
    "granularity",
    "scope",
    "stream",
    "calibration_data",
    "calibration_samples",
    "dataset",
    "metric",
    "value",
    "test_samples",
    "seed",
    "bits_per_weight",
    "bias_parameters",
    "error_before",
    "error_after",
    "seconds_quantize",
    "seconds_bc",
    "seconds_evaluate",
    "peak_memory_mb",
    "device",
    "commit",
    "cell",
    "options",  # the quantizer's own (weight granularity, search metric, …), and unusual numerics of the engine
    "damping_retries",
)
KEY = ("experiment", "cell", "dataset", "metric")
NUMERIC = ("w_bits", "a_bits", "group_size", "calibration_samples", "seed")
WHOLE = ("w_bits", "a_bits", "group_size", "test_samples", "seed")
MAYBE = (  # a number, or empty
    *("calibration_samples", "bits_per_weight", "error_before", "error_after", "peak_memory_mb"),
    *("bias_parameters", "seconds_quantize", "seconds_bc", "seconds_evaluate", "damping_retries"),
)
FILE = "cells.csv"

Row = dict[str, str]


def rows_of(result: dict[str, Any], experiment: str, suite: str) -> list[Row]:
    """Rows of one result: a row a metric.

    Args:
        result: A valid result file's content.
        experiment: The experiment that the rows are for.
        suite: ``paper`` or ``embedded``.
    """
    facts = {name: result[name] for name in COLUMNS if name in result}
    facts |= {"device": result["provenance"]["device"], "commit": result["provenance"]["commit"]}
    options = {name: value for name, value in result["config"]["quantizer"].items() if name != "name"}
    options |= result["config"].get("numerics", {})
    facts |= {"options": " ".join(f"{name}={value}" for name, value in sorted(options.items()))}
    facts |= {"experiment": experiment, "suite": suite}
    return [
        {name: _text(value) for name, value in (facts | result["label"] | metric).items()}
        for metric in result["metrics"]
    ]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)  # repr: full precision


def read_csv(path: Path, columns: Sequence[str], check: Callable[[Row], None]) -> list[Row]:
    """Rows of a file of ours; none where there is no file.

    Args:
        path: The file.
        columns: Those that it is to have.
        check: Raises ValueError for a row that is none.

    Raises:
        UserError: The columns are others, or a line is no row: the marks of a merge, for example.
    """
    if not path.exists():
        return []
    with path.open(encoding="utf8", newline="") as stream:
        reader = csv.DictReader(stream)
        rows = []
        try:
            if tuple(reader.fieldnames or ()) != tuple(columns):
                raise ValueError(f"its columns are not those of {path.name}")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"it has not {len(columns)} fields")
                check(row)
                rows.append(row)
        except (ValueError, csv.Error) as error:
            where = f"line {reader.line_num}"
            raise UserError(f"{path}: {where}: {error}; restore the file from version control") from error
    return rows


def read_rows(path: Path) -> list[Row]:
    """Rows of a cells.csv; none where there is no file.

    Raises:
        UserError: The file is damaged.
    """
    return read_csv(path, COLUMNS, _check)


def _check(row: Row) -> None:
    kinds = dict.fromkeys(WHOLE, int) | dict.fromkeys(("value", *MAYBE), float)
    for name, kind in kinds.items():
        try:
            kind(row[name] if row[name] or name not in MAYBE else "0")
        except ValueError:
            raise ValueError(f"{name} {row[name][:40]!r} is not a number") from None


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Rows of both, the new ones in place of old ones of the same experiment, cell and metric; sorted."""
    merged = {tuple(row[k] for k in KEY): row for row in old}
    merged |= {tuple(row[k] for k in KEY): row for row in new}
    return sorted(merged.values(), key=_order)


def _order(row: Row) -> tuple[tuple[int, float, str], ...]:
    """Order of the columns from left to right, numbers by size."""
    names = (*COLUMNS[: COLUMNS.index("value")], "seed", "cell")
    return tuple((0, float(row[n]), "") if n in NUMERIC and row[n] else (1, 0.0, row[n]) for n in names)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a cells.csv, complete or not at all."""
    write_csv(path, COLUMNS, rows)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Write a file of ours with a heading line, complete or not at all."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, stream.getvalue())


def write_text(path: Path, text: str) -> None:
    """Write a text file by way of a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
