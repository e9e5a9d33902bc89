"""What every test sample scored: ``scores/EXPERIMENT.csv``, one row a cell and data set.

Kept beside cells.csv, so that paired comparisons can be made, and made again, where there are no result files.
Columns: ``cell`` (the hash), ``dataset``, ``unit``, ``samples``, ``scores``. Unit ``nats``: the cross-entropy of every
window, in full precision, with spaces between; ``correct``: a bit an image in the data set's order, 1 where the top-1
is right, as hexadecimal digits, the first image in the highest bit of the first digit.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bc.errors import UserError
from experiments.records import FILE, read_rows, write_text

FOLDER = "scores"
COLUMNS = ("cell", "dataset", "unit", "samples", "scores")
NATS, CORRECT = "nats", "correct"

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
    samples, text = int(row["samples"]), row["scores"]
    if row["unit"] == CORRECT:
        outcome: Any = f"{int(text, 16):0{4 * len(text)}b}"[:samples]
    else:
        outcome = [float(word) for word in text.split()]
    if len(outcome) != samples:
        raise ValueError(f"{len(outcome)} scores instead of {samples}")
    return outcome


def path_of(results: Path, experiment: str) -> Path:
    """Where an experiment's scores are kept."""
    return results / FOLDER / f"{experiment}.csv"


def read_scores(path: Path) -> Scores:
    """Rows of a file by cell and data set; none where there is no file.

    Raises:
        UserError: The columns are not those of such a file.
    """
    if not path.exists():
        return {}
    csv.field_size_limit(sys.maxsize)  # of 50,000 images a row has 12,500 digits, of a long text more than 131,072
    with path.open(encoding="utf8", newline="") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UserError(f"{path}: its columns are not {', '.join(COLUMNS)}; restore the file from version control")
        return {(row["cell"], row["dataset"]): row for row in reader}


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
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(merged[key] for key in sorted(merged))
    write_text(path, stream.getvalue())


def kept_results(results: Path, experiment: str) -> dict[str, dict[str, Any]]:
    """What a comparison needs of every cell of an experiment whose scores are kept, by the cell's hash.

    Raises:
        UserError: A row cannot be read.
    """
    path, found = path_of(results, experiment), dict[str, dict[str, Any]]()
    facts = {row["cell"]: row for row in read_rows(results / FILE) if row["experiment"] == experiment}
    for (cell, dataset), row in read_scores(path).items():
        if cell not in facts:
            continue
        try:
            outcome = decode(row)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path}: {dataset} of cell {cell[:8]}: {error}; restore the file from version control"
            ) from error
        result = found.setdefault(cell, {"outcomes": {}, "label": {"seed": int(facts[cell]["seed"])}})
        result["bits_per_weight"] = float(facts[cell]["bits_per_weight"])
        result["outcomes"][dataset] = outcome
    return found
