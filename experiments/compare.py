"""Paired comparison of settings: ``python -m experiments.compare EXPERIMENT [key=value …] [--against SETTING]``.

Every setting and the one that it is held against (no compensation by default) scored the same test samples, so the
difference is taken sample by sample, averaged over seeds, and its 95 % interval is for other test samples and other
seeds (:func:`interval`). What every sample scored is read from the result files and, for cells that have none, from
``scores/EXPERIMENT.csv``, where ``experiments.tables`` keeps it; so the table, ``tables/EXPERIMENT_paired``
(``…_paired_SETTING`` against another), can be made again from what is under version control.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from bc.errors import UserError
from bc.quantizers import create
from bc.settings import Compensation
from experiments.arguments import EXPERIMENT, OVERRIDES, Argument, reading_command
from experiments.compose import load_experiment
from experiments.config import CellConfig
from experiments.identity import bc_name, cell_hash, digest, scientific, weights_hash, with_seed
from experiments.records import write_text
from experiments.render import varied
from experiments.scores import kept_results, path_of
from experiments.store import all_results
from experiments.tables import distinct, own_results

AGAINST: Argument = (
    "--against",
    {"default": "off", "help": "setting to compare with (default: off, no compensation)"},
)
LEVEL = 0.95
HEAD = (
    "Difference of {what} from {against}, sample by sample, mean over seeds; in brackets the 95 % interval "
    "(t, two-way random effects of test samples and seeds; of one seed over its test samples alone). Bold: the "
    "interval leaves 0 out, over two seeds or more. Made by `python -m experiments.compare "
    "{name}{option}`; not to be edited."
)


@dataclass(frozen=True)
class Paired:
    """One setting against no compensation.

    Attributes:
        cell: The setting.
        dataset: Test text or images.
        difference: Mean, in nats of cross-entropy or percent of top-1.
        low: Lower end of the interval.
        high: Upper end.
        better: Share of the test samples that are better, of those that differ.
        samples: Test samples.
        seeds: Seeds that both have.
        bits: Bits per weight added.
    """

    cell: CellConfig
    dataset: str
    difference: float
    low: float
    high: float
    better: float
    samples: int
    seeds: int
    bits: float


def values_of(outcome: Any) -> NDArray[np.float64]:
    """What each sample scored: cross-entropy, or 100 where the image is right and 0 where it is not."""
    if isinstance(outcome, str):
        return np.array([100.0 * (mark == "1") for mark in outcome])
    return np.array(outcome, dtype=np.float64)


def interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of the mean of differences of shape (seeds, samples), either of which may vary.

    The two-way random-effects model d = μ + seed + sample + rest: the mean's variance is (MS_seed + MS_sample −
    MS_rest) / (seeds · samples), not below that of the larger of the two alone, with Satterthwaite's degrees of freedom
    for the t quantile (Satterthwaite, "An approximate distribution of estimates of variance components", Biometrics
    Bulletin 1946). Of one seed it is the usual t interval over the samples; without any repetition there is no bound.
    """
    seeds, samples = differences.shape
    mean = float(differences.mean())
    by_seed, by_sample = differences.mean(1, keepdims=True), differences.mean(0, keepdims=True)
    rest = differences - by_seed - by_sample + mean
    parts = [  # of each: sign, sum of squares, degrees of freedom
        (1, samples * ((by_seed - mean) ** 2).sum(), seeds - 1),
        (1, seeds * ((by_sample - mean) ** 2).sum(), samples - 1),
        (-1, (rest**2).sum(), (seeds - 1) * (samples - 1)),
    ]
    squares = [(sign * total / freedom, freedom) for sign, total, freedom in parts if freedom]
    if not squares:
        return -np.inf, np.inf
    scale = sum(square for square, _ in squares)
    freedom = scale**2 / max(sum(square**2 / freedom for square, freedom in squares), np.finfo(float).tiny)
    largest = max(squares)
    if scale < largest[0]:
        scale, freedom = largest
    half = float(stats.t.ppf((1 + LEVEL) / 2, max(freedom, 1.0)) * np.sqrt(scale / differences.size))
    return mean - half, mean + half


def scored(cell: CellConfig) -> str:
    """Identity of what alone determines a result without compensation: the weights, and what they are scored on."""
    full, quantizer = scientific(cell), create(cell.quantizer, cell.bits, **cell.options)
    parts = [full.get(name) for name in ("model", "quantizer", "bits", "numerics", "evaluation")]
    fitted = quantizer.needs_data or quantizer.kind == "weight_activation"
    return digest([*parts, weights_hash(cell) if fitted else None])


def compare(
    cell: CellConfig,
    against: Compensation,
    dataset: str,
    results: dict[str, Any],
    seeds: Sequence[int],
    plain: Mapping[str, str],
) -> Paired | None:
    """A setting against another on the same quantized weights, over the seeds that both have.

    Args:
        cell: The setting.
        against: The other.
        dataset: What both were scored on.
        results: By the hash of the cell.
        seeds: Those to look for.
        plain: :func:`scored` → hash of a cell without compensation; a quantizer without data has one for all seeds.

    Raises:
        UserError: They have scores of other samples.
    """
    differences: list[NDArray[np.float64]] = []
    bits: list[float] = []
    for seed in seeds:
        mine = with_seed(cell, seed)
        base = replace(mine, bc=against)
        pair = [results.get(cell_hash(c), {}) for c in (mine, base)]
        if not pair[1] and not against.enabled:
            pair[1] = results.get(plain.get(scored(mine), ""), {})
        if any(dataset not in result.get("outcomes", {}) for result in pair):
            continue
        one, two = (values_of(result["outcomes"][dataset]) for result in pair)
        if len({len(scores) for scores in (one, two, *differences)}) > 1:
            raise UserError(
                f"compare: {dataset}: {bc_name(mine)} and {bc_name(base)} were not scored on the same test samples at "
                f"all seeds ({len(one)} and {len(two)} at seed {seed}); run the cells of that seed again"
            )
        differences.append(one - two)
        bits.append(pair[0]["bits_per_weight"] - pair[1]["bits_per_weight"])
    if not differences:
        return None
    table = np.stack(differences)
    mean = table.mean(0)
    sign = -1 if cell.metric == "perplexity" else 1
    differing = mean[mean != 0]
    better = float((sign * differing > 0).mean()) if len(differing) else 0.5
    low, high = interval(table)
    return Paired(
        cell, dataset, float(mean.mean()), low, high, better, table.shape[1], len(table), float(np.mean(bits))
    )


def baselines(cells: Sequence[CellConfig], against: str) -> dict[str, Compensation]:
    """The setting of a name, by domain.

    Raises:
        UserError: The experiment has none of that name.
    """
    found: dict[str, Compensation] = {cell.domain: cell.bc for cell in cells if bc_name(cell) == against}
    if not found:
        known = ", ".join(dict.fromkeys(bc_name(cell) for cell in cells if not cell.is_float))
        raise UserError(f"--against: {against!r} is not a setting of this experiment; it has {known}")
    return found


def rows_of(name: str, overrides: Sequence[str], results: Path, against: str = "off") -> list[Paired]:
    """All comparisons of an experiment with one of its settings.

    Raises:
        UserError: No pair of results is there.
    """
    _, runs = load_experiment(name, overrides)
    found = kept_results(results, name) | own_results(runs, all_results(results), name)
    bare = [run.cell for run in runs if not run.cell.bc.enabled and not run.cell.is_float]
    plain = {scored(cell): cell_hash(cell) for cell in bare if cell_hash(cell) in found}
    seeds = sorted({int(result["label"]["seed"]) for result in found.values()})
    settings = [cell for cell in distinct(runs) if not cell.is_float]
    base = baselines(settings, against)
    cells = [cell for cell in settings if cell.bc.enabled and cell.bc != base.get(cell.domain)]
    pairs = [
        compare(cell, base[cell.domain], dataset, found, seeds, plain)
        for cell in cells
        if cell.domain in base
        for dataset in cell.data.evaluation.datasets
    ]
    rows = [pair for pair in pairs if pair is not None]
    if not rows:
        raise UserError(
            f"compare: no result files of {name} below {results / 'cells'}, and no scores in "
            f"{path_of(results, name)}, for {against!r} and another setting; "
            f"run python -m experiments.run +experiment={name}"
        )
    return rows


def frame_of(rows: Sequence[Paired]) -> pd.DataFrame:
    """One row a comparison, numbers in full precision."""
    further = varied(row.cell for row in rows)
    return pd.DataFrame(
        [
            {
                "model": row.cell.model.name,
                "quantizer": row.cell.quantizer,
                "bits": row.cell.bits.label,
                "weights": weights_hash(with_seed(row.cell, 0))[:8],
                "bc": bc_name(row.cell),
                **{name: value(row.cell) for name, value in further.items()},
                "dataset": row.dataset,
                "unit": "nats" if row.cell.metric == "perplexity" else "percent",
                "difference": row.difference,
                "low": row.low,
                "high": row.high,
                "better": row.better,
                "test_samples": row.samples,
                "seeds": row.seeds,
                "bits_per_weight_added": row.bits,
            }
            for row in rows
        ]
    )


def markdown(name: str, title: str, rows: Sequence[Paired], against: str = "off") -> str:
    """The comparisons for people."""
    perplexity = rows[0].cell.metric == "perplexity"
    what = "cross-entropy in nats (lower is better)" if perplexity else "top-1 in percent (higher is better)"
    option = "" if against == "off" else f" --against {against}"
    than = "no compensation" if against == "off" else f"`{against}`"
    lines = [f"# {title}: paired", "", HEAD.format(what=what, name=name, against=than, option=option), ""]
    further = varied(row.cell for row in rows)
    titles = ["model", "quantizer", "bits", "BC", *further, "added bits/weight", "data", "difference", "better in"]
    lines += [f"| {' | '.join([*titles, 'seeds'])} |"]
    lines += [f"|{'---|' * 4}{'--:|' * (len(further) + 1)}---|--:|--:|--:|"]
    for row in rows:
        cell, digits = row.cell, 4 if perplexity else 2
        text = f"{row.difference:+.{digits}f} [{row.low:+.{digits}f}, {row.high:+.{digits}f}]"
        text = f"**{text}**" if row.seeds > 1 and (row.low > 0 or row.high < 0) else text
        facts = [cell.model.name, cell.quantizer, cell.bits.label, bc_name(cell), *(v(cell) for v in further.values())]
        facts += [f"{row.bits:.3f}", row.dataset, text, f"{100 * row.better:.0f} %", str(row.seeds)]
        lines.append(f"| {' | '.join(facts)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""

    def act(options: Namespace) -> list[Path]:
        section, _ = load_experiment(options.experiment, options.overrides)
        rows = rows_of(options.experiment, options.overrides, options.results, options.against)
        ending = "paired" if options.against == "off" else f"paired_{options.against}"
        stem = options.results / "tables" / f"{options.experiment}_{ending}"
        write_text(stem.with_suffix(".md"), markdown(options.experiment, section.title, rows, options.against))
        write_text(stem.with_suffix(".csv"), frame_of(rows).to_csv(index=False, lineterminator="\n"))
        return [stem.with_suffix(".md"), stem.with_suffix(".csv")]

    own = [EXPERIMENT, OVERRIDES, AGAINST]
    return reading_command("compare", "Paired comparison.", act, own, arguments)


if __name__ == "__main__":
    sys.exit(main())
