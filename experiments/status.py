"""What became of every cell: ``python -m experiments.status [EXPERIMENT] [key=value …] [--results DIR]``."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from experiments.arguments import OVERRIDES, reading_command
from experiments.cell import metrics_line
from experiments.compose import load_experiment
from experiments.identity import cell_hash, slug
from experiments.store import (
    COMPLETE,
    FAILED,
    INTERRUPTED,
    RESULT,
    RUNNING,
    CellStore,
    InvalidResultError,
    check_result,
    read_json,
)

WAITING = "waiting"
STATES = (COMPLETE, RUNNING, FAILED, INTERRUPTED, WAITING)


def state_of(store: CellStore) -> tuple[str, str]:
    """State of a cell and a detail: metrics, host, last line of the error. Changes nothing on the disk."""
    path = store.folder / RESULT
    try:
        if path.exists():
            return COMPLETE, metrics_line(check_result(read_json(path), RESULT))
        status = store.status()
    except InvalidResultError as error:
        return FAILED, f"unreadable result, the next run makes it again: {error}"
    except OSError as error:
        return FAILED, f"its files cannot be read: {error.strerror} ({error.filename})"
    if status is None:
        return WAITING, ""
    where = f"on {status.get('host')} (process {status.get('pid')}), since {status.get('started')}"
    if status.get("state") == RUNNING:
        return (RUNNING, where) if store.is_locked() else (INTERRUPTED, f"{where}; the process is gone")
    if status.get("state") == FAILED:
        return FAILED, str(status.get("error", "")).strip()
    if status.get("state") == INTERRUPTED:
        return INTERRUPTED, where
    return WAITING, ""


def stores(results: Path, experiment: str | None, overrides: Sequence[str]) -> list[CellStore]:
    """Cells of an experiment in its order, or all cells that there are."""
    if experiment is None:
        folders = sorted(p for p in (results / "cells").glob("*") if p.is_dir())
        return [CellStore(results, folder.name, "") for folder in folders]
    _, runs = load_experiment(experiment, overrides)
    named = {slug(run.cell): cell_hash(run.cell) for run in runs}
    return [CellStore(results, name, digits) for name, digits in named.items()]


def report(found: Sequence[CellStore]) -> list[str]:
    """One line a cell, then the totals."""
    states = [(store.slug, *state_of(store)) for store in found]
    width = max((len(name) for name, _, _ in states), default=0)
    lines = [f"{state:<11} {name:<{width}}  {detail}".rstrip() for name, state, detail in states]
    counts = Counter(state for _, state, _ in states)
    totals = ", ".join(f"{counts[s]} {s}" for s in STATES if counts[s])
    return [*lines, f"{len(states)} cells: {totals}" if states else "no cells yet; run python -m experiments.run"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    named = {"nargs": "?", "help": "name of a file in conf/experiment; all cells that ran if absent"}

    def act(options: Namespace) -> list[str]:
        return report(stores(options.results, options.experiment, options.overrides))

    own = [("experiment", named), OVERRIDES]
    return reading_command("status", "State of every cell.", act, own, arguments)


if __name__ == "__main__":
    sys.exit(main())
