"""What the test samples scored is kept without loss, and comparisons can be made from it alone."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from experiments import compare, tables
from experiments.run import main as run
from experiments.scores import check_value, decode, encode, kept_results, read_scores
from tests.experiments.test_compare import FAST

FINITE = some.floats(allow_nan=False)


@given(some.text("01", min_size=1) | some.lists(FINITE, min_size=1))
def test_scores_round_trip(outcome: Any) -> None:
    assert decode(encode(outcome)) == outcome


def test_the_bits_are_those_of_the_images() -> None:
    assert encode("100000011") == {"unit": "correct", "samples": "9", "scores": "818"}  # 1000 0001 1(000)


@pytest.mark.parametrize(
    "row",
    [
        {"samples": "3", "scores": "1.5 2"},
        {"samples": "2", "scores": "1.5 x"},
        {"samples": "0", "scores": ""},
        {"unit": "bits", "samples": "2", "scores": "1.5 2"},
        {"unit": "correct", "samples": "8", "scores": "818"},
        {"unit": "correct", "samples": "9", "scores": "81"},
        {"unit": "correct", "samples": "9", "scores": "0x8"},
    ],
    ids=str,
)
def test_a_damaged_row_is_refused(row: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        decode({"unit": "nats"} | row)


def test_comparisons_without_result_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same bytes as with them; a file that was damaged is one line."""
    overrides = [*FAST, "bits=w2a4", "seed=0"]
    place = ["--results", str(tmp_path)]
    assert run(["+experiment=demo_vision", f"results_dir={tmp_path}", *overrides]) in (0, 2)  # float cells do not fit
    assert compare.main(["demo_vision", *overrides, *place]) == 0
    table = tmp_path / "tables" / "demo_vision_paired.md"
    first = table.read_bytes()
    assert tables.main(["demo_vision", *overrides, *place]) == 0
    kept = tmp_path / "scores" / "demo_vision.csv"
    assert {row["samples"] for row in read_scores(kept).values()} == {"60"}
    shutil.rmtree(tmp_path / "cells")
    table.unlink()
    assert compare.main(["demo_vision", *overrides, *place]) == 0
    assert table.read_bytes() == first

    before = kept.read_bytes()
    assert tables.main(["demo_vision", *overrides, *place]) == 0  # nothing new: what is kept stays
    assert kept.read_bytes() == before
    good = kept.read_text()
    row = next(iter(read_scores(kept).values()))
    digits, cell = row["scores"], row["cell"]
    other = digits.replace(digits[0], "f" if digits[0] != "f" else "0", 1)
    for damaged, said in (
        (good.replace(",60,", ",61,"), "15 characters are not the hexadecimal digits of 61 images"),
        (good.replace(",60,", ",59,"), "59 scores, and cells.csv has 60 test samples"),
        (good.replace(digits, other), "the scores make a top1 of"),
        (good.replace(",correct,", ",right,"), "the unit 'right' is not known"),
        (good + "<<<<<<< HEAD\n", "it has not 5 fields"),
    ):
        kept.write_text(damaged)
        capsys.readouterr()
        assert compare.main(["demo_vision", *overrides, *place]) == 2
        line = capsys.readouterr().err.strip()
        assert said in line and "\n" not in line and line.endswith("restore the file from version control"), line
    kept.write_text(good)
    assert cell in kept_results(tmp_path, "demo_vision")


def test_scores_are_held_against_the_value_that_they_make() -> None:
    row = {"metric": "perplexity", "value": repr(math.exp(1.5)), "test_samples": "2"}
    check_value([1.0, 2.0], row)
    check_value("0110", {"metric": "top1", "value": "50.0", "test_samples": "4"})
    for outcome, against in (([1.0, 2.00001], row), ([1.0, math.nan], row), ([1.5], row), ([1.0, 2.0], None)):
        with pytest.raises(ValueError):
            check_value(outcome, against)
