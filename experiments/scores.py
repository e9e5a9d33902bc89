"""What every test sample scored: ``scores/EXPERIMENT.csv``, one row a cell and data set.

Kept beside cells.csv, so that paired comparisons can be made, and made again, where there are no result files.
Columns: ``cell`` (the hash), ``dataset``, ``unit``, ``samples``, ``scores``. Unit ``nats``: the cross-entropy of every
window, in full precision, with spaces between; ``correct``: a bit an image in the data set's order, 1 where the top-1
is right, as hexadecimal digits, the first image in the highest bit of the first digit.
"""

from __future__ import annotations

import csv
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bc.errors import UserError
from bc.evaluation import perplexity_of
from experiments.records import FILE, Row, read_csv, read_rows, write_csv

FOLDER = "scores"
COLUMNS = ("cell", "dataset", "unit", "samples", "scores")
NATS, CORRECT = "nats", "correct"
METRICS = {NATS: "perplexity", CORRECT: "top1"}  # what they make on the mean
TOLERANCE = 1e-6  # relative, of that

Scores = dict[tuple[str, str], dict[str, str]]


def encode(outcome: Any) -> dict[str, str]:
    """Unit, number and text of an outcome: a list of cross-entropies, or a string of 0 and 1."""
    if isinstance(outcome, str):
        width = -(-len(outcome) // 4)
        digits = f"{int(outcome.ljust(4 * width, '0'), 2):0{width}x}"
        return {"unit": CORRECT, "samples": str(len(outcome)), "scores": digits}
    return {"unit": NATS, "samples": str(len(outcome)), "scores": " ".join(repr(float(value)) for value in outcome)}


def decode(row: dict[str, str]) -> Any:
    """The outcome of a row, as it was encoded.

    Raises:
        ValueError: The row has not as many scores as it says, or they are not scores.
    """
    samples, text, unit = int(row["samples"]), row["scores"], row["unit"]
    if unit == CORRECT:
        if len(text) != -(-samples // 4) or not re.fullmatch("[0-9a-f]+", text):
            raise ValueError(f"{len(text)} characters are not the hexadecimal digits of {samples} images")
        outcome: Any = f"{int(text, 16):0{4 * len(text)}b}"[:samples]
    elif unit == NATS:
        outcome = [float(word) for word in text.split()]
    else:
        raise ValueError(f"the unit {unit!r} is not known")
    if len(outcome) != samples or not samples:
        raise ValueError(f"{len(outcome)} scores instead of {samples}")
    return outcome


def check_value(outcome: Any, row: Row | None) -> None:
    """Refuse an outcome that is not what a row of cells.csv was computed from.

    Raises:
        ValueError: It has another mean or number of samples, or there is no such row.
    """
    if row is None:
        raise ValueError("cells.csv has no value of that unit")
    value = 100 * outcome.count("1") / len(outcome) if isinstance(outcome, str) else perplexity_of(outcome)
    if len(outcome) != int(row["test_samples"]):
        raise ValueError(f"{len(outcome)} scores, and cells.csv has {row['test_samples']} test samples")
    if not math.isclose(value, float(row["value"]), rel_tol=TOLERANCE):
        raise ValueError(f"the scores make a {row['metric']} of {value:.8g}, and cells.csv has {row['value']}")


def path_of(results: Path, experiment: str) -> Path:
    """Where an experiment's scores are kept."""
    return results / FOLDER / f"{experiment}.csv"


def read_scores(path: Path) -> Scores:
    """Rows of a file by cell and data set; none where there is no file.

    Raises:
        UserError: The file is damaged.
    """
    csv.field_size_limit(sys.maxsize)  # of 50,000 images a row has 12,500 digits, of a long text more than 131,072
    return {(row["cell"], row["dataset"]): row for row in read_csv(path, COLUMNS, lambda row: None)}


def write_scores(path: Path, results: Iterable[dict[str, Any]]) -> None:
    """Add the scores of results to a file, in place of those that it has of the same cells; sorted.

    Nothing is written where no result has any.
    """
    new: Scores = {
        (result["cell"], dataset): {"cell": result["cell"], "dataset": dataset, **encode(outcome)}
        for result in results
        for dataset, outcome in result.get("outcomes", {}).items()
    }
    if not new:
        return
    merged = read_scores(path) | new
    write_csv(path, COLUMNS, (merged[key] for key in sorted(merged)))


def kept_results(results: Path, experiment: str) -> dict[str, dict[str, Any]]:
    """What a comparison needs of every cell of an experiment whose scores are kept, by the cell's hash.

    Raises:
        UserError: A row cannot be read, or does not go with cells.csv.
    """
    path, found = path_of(results, experiment), dict[str, dict[str, Any]]()
    rows = [row for row in read_rows(results / FILE) if row["experiment"] == experiment]
    facts = {row["cell"]: row for row in rows}
    values = {(row["cell"], row["dataset"], row["metric"]): row for row in rows}
    for (cell, dataset), row in read_scores(path).items():
        if cell not in facts:
            continue
        try:
            outcome = decode(row)
            check_value(outcome, values.get((cell, dataset, METRICS[row["unit"]])))
        except ValueError as error:
            raise UserError(
                f"{path}: {dataset} of cell {cell[:8]}: {error}; restore the file from version control"
            ) from error
        result = found.setdefault(cell, {"outcomes": {}, "label": {"seed": int(facts[cell]["seed"])}})
        result["bits_per_weight"] = float(facts[cell]["bits_per_weight"])
        result["outcomes"][dataset] = outcome
    return found
