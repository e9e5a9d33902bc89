"""Rebuild cells.csv and a table: ``python -m experiments.tables table2 [key=value …] [--results DIR] [--from wandb]``.

What lies in result files goes into ``cells.csv``, and what every test sample scored into ``scores/EXPERIMENT.csv``; the
table is made from ``cells.csv`` alone, so it can be rebuilt where there are no result files, and rows without files
stay.
"""

from __future__ import annotations

import statistics
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bc.data.images import asked_for
from experiments.arguments import EXPERIMENT, OVERRIDES, reading_command
from experiments.compose import load_experiment
from experiments.config import CellConfig, RunConfig
from experiments.data import ImageEvaluation
from experiments.identity import cell_hash, slug, with_seed
from experiments.published import Published, PublishedTable
from experiments.records import FILE, Row, merge, read_rows, rows_of, write_rows
from experiments.render import write_table
from experiments.scores import path_of, write_scores
from experiments.status import state_of
from experiments.store import CellStore, all_results, try_lock

LOCK = ".tables.lock"  # below the results directory
FOREVER = -1.0  # seconds, of a lock's patience
PUBLISHED = Path(__file__).parent.parent / "results" / "published"


@dataclass
class Line:
    """One cell and data set of a table, over all seeds that were run.

    Attributes:
        cell: The cell, at the seed that the experiment lists.
        dataset: Test text or images.
        values: Ours, a value a seed.
        rows: The rows of cells.csv that they come from.
        published: What the paper prints, if anything.
        missing: Why there is no value of ours.
        listed: At how many seeds the experiment lists the cell.
    """

    cell: CellConfig
    dataset: str
    values: list[float] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    published: Published | None = None
    missing: str = ""
    listed: int = 1

    @property
    def heading(self) -> str:
        """The data set, and how many images where not all of them are scored."""
        evaluation = self.cell.data.evaluation
        if not isinstance(evaluation, ImageEvaluation):
            return self.dataset
        wanted, fewest = asked_for(self.dataset, evaluation.limit, evaluation.offset), self._fewest
        of = "" if fewest is None or fewest >= wanted else f"{fewest:,} of "  # pictures that could not be decoded
        if evaluation.limit is not None or evaluation.offset:
            number = f"{wanted:,}" if of else evaluation.limit or "rest"
            return f"{self.dataset} (part: {of}{number} images from {evaluation.offset or 0})"
        return f"{self.dataset} ({of}{wanted:,} images)" if of else self.dataset

    @property
    def _fewest(self) -> int | None:
        return min((int(row["test_samples"]) for row in self.rows if row["test_samples"]), default=None)

    @property
    def mean(self) -> float | None:
        """Mean over seeds."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def difference(self) -> float | None:
        """Ours minus published."""
        return self.mean - self.published.value if self.published and self.mean is not None else None

    def fact(self, name: str) -> float | None:
        """Mean over seeds of a numeric column."""
        found = [float(row[name]) for row in self.rows if row[name]]
        return statistics.fmean(found) if found else None


def distinct(runs: Iterable[RunConfig]) -> list[CellConfig]:
    """Cells of an experiment that differ in more than the seed."""
    return list({cell_hash(with_seed(run.cell, 0)): run.cell for run in reversed(list(runs))}.values())[::-1]


def listed_seeds(runs: Iterable[RunConfig]) -> dict[str, int]:
    """At how many seeds that matter to it each cell of an experiment is listed, by its hash at seed 0."""
    listed = {(cell_hash(with_seed(run.cell, 0)), cell_hash(run.cell)) for run in runs}
    return Counter(cell for cell, _ in listed)


def hashes(cell: CellConfig, seeds: Iterable[int]) -> list[str]:
    """Hash of a cell at each of some seeds, without repetition."""
    return list(dict.fromkeys(cell_hash(with_seed(cell, seed)) for seed in sorted(seeds)))


def own_results(
    runs: Iterable[RunConfig], results: Iterable[dict[str, Any]], experiment: str
) -> dict[str, dict[str, Any]]:
    """Results by the hash of their cell that may count for an experiment.

    Cells that it lists do wherever they were run; others, such as the same at another seed, where they were run for it.
    """
    listed = {cell_hash(run.cell) for run in runs}
    return {r["cell"]: r for r in results if r["cell"] in listed or r["provenance"]["experiment"] == experiment}


def new_results(runs: Sequence[RunConfig], results: Iterable[dict[str, Any]], experiment: str) -> list[dict[str, Any]]:
    """Results, at any seed, of an experiment's cells."""
    found = own_results(runs, results, experiment)
    seeds = {int(result["label"]["seed"]) for result in found.values()}
    wanted = dict.fromkeys(h for cell in distinct(runs) for h in hashes(cell, seeds))
    return [found[h] for h in wanted if h in found]


def table_lines(
    runs: Sequence[RunConfig], rows: Iterable[Row], experiment: str, published: PublishedTable, results: Path
) -> list[Line]:
    """Every cell and data set of an experiment with what is known of it."""
    mine = [row for row in rows if row["experiment"] == experiment]
    found = {(row["cell"], row["dataset"], row["metric"]): row for row in mine}
    seeds = {int(row["seed"]) for row in mine}
    listed = listed_seeds(runs)
    lines = []
    for cell in distinct(runs):
        count = listed[cell_hash(with_seed(cell, 0))]
        for dataset in cell.data.evaluation.datasets:
            line = Line(cell, dataset, published=published.find(cell, dataset, cell.metric), listed=count)
            keys = [(h, dataset, cell.metric) for h in hashes(cell, seeds | {cell.seed})]
            line.rows = [found[key] for key in keys if key in found]
            line.values = [float(row["value"]) for row in line.rows]
            if not line.values:
                line.missing = reason(CellStore(results, slug(cell), cell_hash(cell)))
            lines.append(line)
    return lines


def reason(store: CellStore) -> str:
    """Why a cell has no value."""
    state, detail = state_of(store)
    if state == "failed":
        text = "no data: " if detail.startswith("data") else "failed: "
        return text + detail
    return {"waiting": "not run", "complete": "not in cells.csv"}.get(state, state)


@contextmanager
def one_at_a_time(results: Path) -> Iterator[None]:
    """Keep other processes from rebuilding in the same results directory meanwhile.

    Where no lock can be had, as in a folder that may only be read, it is for the writing to say so.
    """
    with ExitStack() as held:
        with suppress(OSError):
            held.enter_context(try_lock(results / LOCK, FOREVER))
        yield


def rebuild(name: str, overrides: Sequence[str], results: Path, source: str = "files") -> list[Path]:
    """Bring cells.csv up to date for an experiment and write its table.

    Args:
        name: The experiment.
        overrides: Those that the experiment was run with.
        results: The results directory.
        source: ``files`` or ``wandb``.

    Returns:
        The files that were written.
    """
    section, runs = load_experiment(name, overrides)
    if source == "wandb":
        from experiments.wandb_logger import read_results

        found = read_results(runs[0].logger)
    else:
        found = all_results(results)
    new = new_results(runs, found, name)
    own = [row for result in new for row in rows_of(result, name, section.suite)]
    with one_at_a_time(results):
        rows = merge(read_rows(results / FILE), own)
        write_rows(results / FILE, rows)
        write_scores(path_of(results, name), new)
    published = PublishedTable(PUBLISHED / section.published if section.published else None)
    lines = table_lines(runs, rows, name, published, results)
    return [results / FILE, *write_table(results / "tables" / name, section.title or name, lines)]


def stored_lines(name: str, overrides: Sequence[str], results: Path) -> tuple[str, list[Line]]:
    """Title and lines of an experiment's table, from cells.csv as it is."""
    section, runs = load_experiment(name, overrides)
    lines = table_lines(runs, read_rows(results / FILE), name, PublishedTable(None), results)
    return section.title or name, lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    source = {"dest": "source", "choices": ("files", "wandb"), "default": "files", "help": "where to read"}

    def act(options: Namespace) -> list[Path]:
        return rebuild(options.experiment, options.overrides, options.results, options.source)

    own = [EXPERIMENT, OVERRIDES, ("--from", source)]
    return reading_command("tables", "Rebuild cells.csv and a table.", act, own, arguments)


if __name__ == "__main__":
    sys.exit(main())
