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


def test_awq_is_not_worse_than_rounding_and_compensation_helps_at_every_setting() -> None:
    found = means("table3_embedded")
    settings = {setting[1:3] for setting in found if setting[0] == "awq"}
    assert settings
    for bits, group in settings:
        for bc in ("off", "sink"):
            assert found["awq", bits, group, bc] <= found["rtn", bits, group, bc]
        for quantizer in ("rtn", "gptq", "awq"):
            assert found[quantizer, bits, group, "sink"] < found[quantizer, bits, group, "off"]


def test_billm_is_far_better_than_plain_signs() -> None:
    found = means("table4_embedded")
    assert found["billm", "1", "-1", "off"] < found["sign", "1", "-1", "off"] / 10
    assert found["billm", "1", "-1", "off"] < found["sign", "1", "128", "off"] / 10


def test_what_depends_on_samples_was_run_with_three_seeds() -> None:
    for experiment in ("table3_embedded", "table4_embedded"):
        for (quantizer, _, _, bc), values in perplexities(experiment).items():
            needs_none = quantizer == "none" or (quantizer in ("rtn", "sign") and bc == "off")
            assert sorted(values) == (["0"] if needs_none else ["0", "1", "2"])
