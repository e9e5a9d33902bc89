"""cells.csv as data frames: settings averaged over seeds, and every compensated setting paired with its plain twin.

What is here works on the committed rows alone: no result file is read and no configuration is composed, so that
figures, the report and the notebooks cost seconds however many cells there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from bc import quantizers
from bc.settings import Bits
from experiments.compose import expand
from experiments.config import FLOAT
from experiments.published import METHODS, PublishedTable, method_name
from experiments.records import COLUMNS, FILE, Row, read_rows

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "conf" / "experiment"
PUBLISHED = ROOT / "results" / "published"

FACTS = ("bits_per_weight", "bias_parameters", "error_before", "error_after")
COSTS = ("seconds_quantize", "seconds_bc", "seconds_evaluate", "peak_memory_mb")
NUMBERS = ("w_bits", "a_bits", "group_size", "calibration_samples", "test_samples", "seed", "value", *FACTS, *COSTS)
PLACE = ("experiment", "model", "dataset", "metric", "test_samples")  # what only like may be compared within
WEIGHTS = ("quantizer", "options", "w_bits", "a_bits", "group_size", "calibration_data")
KIND = ("bc", "granularity", "scope", "stream", "calibration_samples")
WITHOUT_DATA = (*PLACE, "quantizer", "options", "w_bits", "a_bits", "group_size")
RIVALS = ("affine", "linear", "classic")
# The order in which BC's presets are shown; others follow by name.
KINDS = ("off", "channel", "sink", "positional", "paper", "shrink", "lowrank", "readout", *RIVALS, "search")
LOWER_IS_BETTER = ("perplexity",)


@dataclass(frozen=True)
class Experiment:
    """What the file of an experiment says.

    Attributes:
        name: Of the file, and in cells.csv.
        suite: ``paper`` or ``embedded``.
        title: Of its table.
        published: File under results/published that it is compared with, or None.
        cells: How many cells it lists.
        about: The comment at the head of its file.
    """

    name: str
    suite: str
    title: str
    published: str | None
    cells: int
    about: str


def experiments() -> list[Experiment]:
    """All experiments that conf/experiment names."""
    return [_experiment(path) for path in sorted(EXPERIMENTS.glob("*.yaml"))]


def _experiment(path: Path) -> Experiment:
    text = path.read_text("utf8")
    section = yaml.safe_load(text)["experiment"]
    head = re.match(r"(?:#[^\n]*\n)+", text)
    about = [line.removeprefix("#").strip() for line in head[0].splitlines()] if head else []
    return Experiment(
        name=path.stem,
        suite=section["suite"],
        title=section.get("title") or path.stem,
        published=section.get("published"),
        cells=len(expand(section["cells"])),
        about="\n".join(line for line in about if not line.startswith("@")),
    )


def load(results: Path = ROOT / "results") -> pd.DataFrame:
    """cells.csv with numbers as numbers and two more columns, ``bits`` (``w3g64``) and ``method`` (``RTN``)."""
    return frame_of(read_rows(results / FILE))


def frame_of(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows of cells.csv as a data frame."""
    frame = pd.DataFrame(list(rows), columns=list(COLUMNS))
    for name in NUMBERS:
        frame[name] = pd.to_numeric(frame[name], errors="coerce")
    frame["bits"] = [
        Bits(int(w), int(a), int(g)).label
        for w, a, g in zip(frame["w_bits"], frame["a_bits"], frame["group_size"], strict=True)
    ]
    frame["method"] = ["float" if name == FLOAT else method_name(name) for name in frame["quantizer"]]
    frame["is_float"] = frame["quantizer"] == FLOAT
    return frame


def records(frame: pd.DataFrame) -> list[Any]:
    """The rows of a frame, columns as attributes."""
    return list(frame.itertuples())


def settings(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a setting, data set and metric: ``value`` is the mean over seeds, ``deviation`` and ``seeds`` beside it.

    Cells that the columns do not tell apart, because they differ in an option of the quantizer, are not averaged: each
    keeps a row, and its hash in the column ``variant``.
    """
    frame = _with_variants(frame)
    keys = [*PLACE, *WEIGHTS, *KIND, "suite", "bits", "method", "is_float", "variant"]
    facts = {name: (name, "mean") for name in (*FACTS, *COSTS)}
    grouped = frame.groupby(keys, dropna=False, sort=False).agg(
        deviation=("value", "std"), seeds=("seed", "nunique"), value=("value", "mean"), cells=("cell", tuple), **facts
    )
    return _sorted(grouped.reset_index())


def _with_variants(frame: pd.DataFrame) -> pd.DataFrame:
    frame = frame.copy()
    searched = frame["bc"].str.match("search|auto")
    frame.loc[searched, ["granularity", "scope", "stream"]] = "searched"  # what was found may differ by seed
    same = frame.groupby([*PLACE, *WEIGHTS, *KIND, "seed"], dropna=False)["cell"].transform("nunique")
    frame["variant"] = [cell[:8] if n > 1 else "" for cell, n in zip(frame["cell"], same, strict=True)]
    return frame


def bits_order(w_bits: float, a_bits: float, group_size: float) -> tuple[float, float, float]:
    """Sorts bit widths from few to many; a smaller group has more scales."""
    return w_bits, a_bits, 0.0 if group_size < 1 else 1.0 / group_size


def kind_order(kind: str) -> tuple[int, str]:
    """Sorts kinds of Bias Compensation: the presets in their order, then others by name."""
    return (KINDS.index(kind) if kind in KINDS else len(KINDS)), kind


def _sorted(frame: pd.DataFrame) -> pd.DataFrame:
    methods = list(METHODS)

    def key(row: Any) -> tuple[Any, ...]:
        method = methods.index(row.quantizer) if row.quantizer in methods else len(methods)
        bits = tuple(-b for b in bits_order(row.w_bits, row.a_bits, row.group_size))
        return row.experiment, row.model, method, bits, kind_order(row.bc), row.calibration_samples, row.dataset

    order = sorted(range(len(frame)), key=lambda i: key(frame.iloc[i]))
    return frame.iloc[order].reset_index(drop=True)


def pairs(frame: pd.DataFrame) -> pd.DataFrame:
    """Every compensated cell beside the cell without BC of the same weights, data set and seed.

    Returns:
        A row a pair: the setting's columns, ``without``, ``value`` (with BC) and ``gain``, which is positive where BC
        helps: percentage points of top-1, or the percent by which perplexity falls.
    """
    keys = [*PLACE, *WEIGHTS, "seed"]
    frame = _with_variants(frame)
    plain, with_bc = frame[frame["bc"] == "off"], frame[frame["bc"] != "off"]
    joined = with_bc.merge(_twins(plain, [*keys, "calibration_samples"], "exact"), how="left")
    joined = joined.merge(_twins(plain, keys, "alike"), how="left")
    joined = joined.merge(_twins(plain[~plain["quantizer"].map(uses_data)], WITHOUT_DATA, "any_seed"), how="left")
    joined["without"] = joined["exact"].fillna(joined["alike"]).fillna(joined["any_seed"])
    joined = joined.dropna(subset="without").reset_index(drop=True)
    joined["gain"] = [
        gain(metric, without, value)
        for metric, without, value in zip(joined["metric"], joined["without"], joined["value"], strict=True)
    ]
    return joined


@cache
def uses_data(quantizer: str) -> bool:
    """Whether a quantizer's weights depend on calibration samples, and so on their seed."""
    cls = quantizers.available().get(quantizer)
    return cls is None or cls.kind != "weight" or cls.needs_hessian or cls.needs_inputs


def _twins(plain: pd.DataFrame, keys: Sequence[str], name: str) -> pd.DataFrame:
    """Values of the cells without BC that the keys tell apart."""
    return plain[[*keys, "value"]].drop_duplicates(list(keys), keep=False).rename(columns={"value": name})


def gain(metric: str, without: float, value: float) -> float:
    """How much better a value is: points of accuracy, or percent by which perplexity falls."""
    return 100 * (1 - value / without) if metric in LOWER_IS_BETTER else value - without


def gain_unit(metric: str) -> str:
    """Unit of :func:`gain`."""
    return "% lower perplexity" if metric in LOWER_IS_BETTER else "points of top-1"


def with_published(summary: pd.DataFrame, listed: Sequence[Experiment]) -> pd.DataFrame:
    """Settings with the paper's printed value in the columns ``published`` and ``note``; empty where there is none."""
    files = {e.name: PublishedTable(PUBLISHED / e.published if e.published else None) for e in listed}
    found = []
    for row in records(summary):
        table = files.get(str(row.experiment))
        bits = Bits(int(row.w_bits), int(row.a_bits), int(row.group_size))
        names = (str(row.model), str(row.quantizer), bits, str(row.bc), str(row.dataset), str(row.metric))
        options = dict(pair.split("=", 1) for pair in str(row.options).split() if "=" in pair)
        found.append(table.look_up(*names, options) if table and row.metric in ("perplexity", "top1") else None)
    out = summary.copy()
    out["published"] = [None if f is None else f.value for f in found]
    out["note"] = ["" if f is None else f.note for f in found]
    out["published"] = pd.to_numeric(out["published"])
    return out
