"""What is said of the committed results is what they hold."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results" / "cells.csv"
Setting = tuple[str, str, str, str]  # quantizer, bits, group size, BC


def perplexities(experiment: str) -> dict[Setting, dict[str, float]]:
    """Seed → perplexity of every setting of an experiment, on the Wikipedia texts."""
    found: dict[Setting, dict[str, float]] = defaultdict(dict)
    with RESULTS.open(encoding="utf8", newline="") as stream:
        for row in csv.DictReader(stream):
            if row["experiment"] == experiment and row["dataset"] == "embedded_wiki":
                setting = (row["quantizer"], row["w_bits"], row["group_size"], row["bc"])
                found[setting][row["seed"]] = float(row["value"])
    return found


def means(experiment: str) -> dict[Setting, float]:
    return {setting: statistics.fmean(values.values()) for setting, values in perplexities(experiment).items()}


def test_billm_is_far_better_than_plain_signs() -> None:
    found = means("table4_embedded")
    assert found["billm", "1", "-1", "off"] < found["sign", "1", "-1", "off"] / 10
    assert found["billm", "1", "-1", "off"] < found["sign", "1", "128", "off"] / 10


def test_what_depends_on_samples_was_run_with_three_seeds() -> None:
    for experiment in ("table4_embedded",):
        for (quantizer, _, _, bc), values in perplexities(experiment).items():
            needs_none = quantizer == "none" or (quantizer in ("rtn", "sign") and bc == "off")
            assert sorted(values) == (["0"] if needs_none else ["0", "1", "2"])
