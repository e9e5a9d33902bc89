"""What is said of the committed results is what they hold."""

from __future__ import annotations

import csv
import math
import shutil
import statistics
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest

from experiments import compare
from experiments.scores import decode, read_scores

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


KEPT = sorted((RESULTS.parent / "scores").glob("*.csv"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_scores_give_the_values(path: Path) -> None:
    """The perplexity is the exponential of the windows' mean, top-1 the share of images that are right."""
    with RESULTS.open(encoding="utf8", newline="") as stream:
        found = [row for row in csv.DictReader(stream) if row["experiment"] == path.stem and row["metric"] != "top5"]
    values = {(row["cell"], row["dataset"]): float(row["value"]) for row in found}
    for key, row in read_scores(path).items():
        outcome = decode(row)
        expected = 100 * outcome.count("1") / len(outcome) if row["unit"] == "correct" else math.exp(fmean(outcome))
        assert values[key] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_paired_tables_are_those_of_the_kept_scores(path: Path, tmp_path: Path) -> None:
    """Whoever has a clone alone makes the same comparisons."""
    shutil.copytree(path.parent, tmp_path / "scores")
    shutil.copy(RESULTS, tmp_path)
    for table in (RESULTS.parent / "tables").glob(f"{path.stem}_paired*.md"):
        setting = table.stem.removeprefix(f"{path.stem}_paired").removeprefix("_") or "off"
        assert compare.main([path.stem, "--against", setting, "--results", str(tmp_path)]) == 0
        assert (tmp_path / "tables" / table.name).read_bytes() == table.read_bytes()
