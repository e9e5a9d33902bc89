"""What experiments cost, as measured: ``python -m experiments.costs [--results DIR]`` writes ``results/costs.md``.

Made from the seconds and the memory in cells.csv. Quantized weights are made once and shared by all settings of BC, so
their time counts once for each quantizer, bit width and seed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from bc.errors import UserError
from experiments import frame
from experiments.arguments import reading_command
from experiments.records import FILE, write_text

NAME = "costs.md"
HEAD = """# Costs

Made by `python -m experiments.costs` from `cells.csv`; not to be edited. Minutes are sums over cells, measured on the
device that is named, one cell at a time; quantized weights, which all settings of BC share, count once. Loading models
and data is not in them. Memory is the largest of any cell: of the process on a CPU, of the device on a GPU.

"""
COLUMNS = ("experiment", "model", "device", "cells", "quantize, min", "BC, min", "evaluate, min", "memory, MB")


def table(rows: pd.DataFrame) -> str:
    """The table in Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- | --- | --- " + "| --: " * (len(COLUMNS) - 3) + "|"]
    cells = rows.drop_duplicates(["experiment", "cell"])
    for (experiment, model, device), group in cells.groupby(["experiment", "model", "device"]):
        weights = group.groupby([*frame.WEIGHTS, "seed"], dropna=False)["seconds_quantize"].max()
        seconds = (weights.sum(), group["seconds_bc"].sum(), group["seconds_evaluate"].sum())
        memory = group["peak_memory_mb"].max()
        numbers = [str(len(group)), *(f"{s / 60:.1f}" for s in seconds), "—" if pd.isna(memory) else f"{memory:,.0f}"]
        lines.append("| " + " | ".join([str(experiment), str(model), str(device), *numbers]) + " |")
    return "\n".join(lines) + "\n"


def write_costs(results: Path) -> Path:
    """Write the table.

    Raises:
        UserError: There is no row to show.
    """
    rows = frame.load(results)
    if rows.empty:
        raise UserError(f"costs: {results / FILE} has no rows; run an experiment first")
    write_text(results / NAME, HEAD + table(rows))
    return results / NAME


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    return reading_command(
        "costs", "Write what experiments cost.", lambda options: [write_costs(options.results)], [], arguments
    )


if __name__ == "__main__":
    sys.exit(main())
