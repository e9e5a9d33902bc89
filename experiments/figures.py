"""Draw results from cells.csv: ``python -m experiments.figures [EXPERIMENT …] [--results DIR]``.

Without a name, every experiment that has rows is drawn. An experiment gets those of these figures that it has the rows
for, each as PNG and SVG under ``results/figures``; an older one that its rows no longer make is removed:

====================  ==================================================================
``NAME``              every value as a bar with its number, where there are few enough
``NAME_bits``         the metric against bit width, with and without BC
``NAME_pareto``       quality against stored bits per weight, biases included
``NAME_samples``      the metric against the samples that biases are fitted on
``NAME_lengths``      the metric against the length of the test windows
``NAME_published``    published values against ours
``NAME_sites``        output error of every site, where ``results/cells`` holds it
``published``         what the paper prints without and with BC; drawn with all experiments
``benchmarks``        how the cost of calibration grows, where it was measured; drawn with all
====================  ==================================================================
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from bc.errors import UserError, unknown
from experiments import bench_plots, comparisons, frame, plots
from experiments.arguments import reading_command
from experiments.compose import load_experiment
from experiments.data import EvaluationConfig
from experiments.identity import cell_hash
from experiments.style import remove, save, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOTHING = "figures: cells.csv has no value of {}; run it, then python -m experiments.tables"


def drawn(
    experiment: frame.Experiment, settings: pd.DataFrame, sites: dict[str, list[dict[str, Any]]]
) -> Iterator[tuple[str, Figure | None]]:
    """Every figure of an experiment by the ending of its name; None where there are no rows for it, or too many."""
    title = experiment.title
    beside = frame.with_published(settings, [experiment])
    yield from {
        "": plots.bars(title, settings),
        "_bits": plots.bits(title, settings),
        "_pareto": plots.pareto(title, settings),
        "_samples": plots.samples(title, settings),
        "_lengths": plots.lengths(title, settings, _windows(experiment.name) if settings["variant"].any() else {}),
        "_published": comparisons.published(title, beside),
        "_sites": comparisons.sites(title, settings, sites),
    }.items()


def _windows(name: str) -> dict[str, int]:
    """Hash of each cell of an experiment → tokens of its test windows, where it reads text."""
    _, runs = load_experiment(name)
    data = {cell_hash(run.cell): run.cell.data.evaluation for run in runs}
    return {cell: evaluation.window for cell, evaluation in data.items() if isinstance(evaluation, EvaluationConfig)}


def draw_all(names: Sequence[str], results: Path) -> Iterator[str]:
    """Draw experiments; yields a line for every file, and one for every experiment without rows.

    Raises:
        UserError: A name is unknown, or cells.csv has nothing of any experiment that was named.
    """
    known = {experiment.name: experiment for experiment in frame.experiments()}
    for name in names:
        if name not in known:
            raise unknown("experiment", name, known)
    settings = frame.settings(frame.load(results))
    sites = comparisons.read_sites(results)
    if not set(names or known) & set(settings["experiment"]):
        raise UserError(NOTHING.format(names[0] if names else "any experiment"))
    for name in names or known:
        mine = settings[settings["experiment"] == name]
        if mine.empty:
            yield f"{name}: no rows in cells.csv; nothing drawn"
            continue
        with styled():
            for ending, figure in drawn(known[name], mine, sites):
                stem = results / "figures" / f"{name}{ending}"
                if figure is not None:
                    yield from map(str, save(figure, stem))
                elif ending != "_sites":  # those errors are not in cells.csv: an earlier figure is still right
                    yield from (f"removed: {path}" for path in remove(stem))
    if not names:
        with styled():
            if (printed := comparisons.printed_gains(frame.PUBLISHED)) is not None:
                yield from map(str, save(printed, results / "figures" / "published"))
            if (measured := bench_plots.scaling(results)) is not None:
                yield from map(str, save(measured, results / "figures" / "benchmarks"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    named = {"nargs": "*", "help": "names of files in conf/experiment; all that have rows if absent"}

    def act(options: Namespace) -> Iterator[str]:
        names = [name for name in options.experiments if "=" not in name]  # `make demo ARGS=…` hands overrides on
        return draw_all(names, options.results)

    return reading_command("figures", "Draw results from cells.csv.", act, [("experiments", named)], arguments)


if __name__ == "__main__":
    sys.exit(main())
