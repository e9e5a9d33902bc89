"""What the test samples scored is kept without loss, and comparisons can be made from it alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from experiments import compare, tables
from experiments.run import main as run
from experiments.scores import decode, encode, read_scores
from tests.experiments.test_compare import FAST

FINITE = some.floats(allow_nan=False)


@given(some.text("01", min_size=1) | some.lists(FINITE, min_size=1))
def test_scores_round_trip(outcome: Any) -> None:
    assert decode(encode(outcome)) == outcome


def test_the_bits_are_those_of_the_images() -> None:
    assert encode("100000011") == {"unit": "correct", "samples": "9", "scores": "818"}  # 1000 0001 1(000)


@pytest.mark.parametrize("row", [{"samples": "3", "scores": "1.5 2"}, {"samples": "2", "scores": "1.5 x"}])
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
    kept.write_text(kept.read_text().replace(",60,", ",61,"))
    capsys.readouterr()
    assert compare.main(["demo_vision", *overrides, *place]) == 2
    line = capsys.readouterr().err.strip()
    assert "60 scores instead of 61" in line and "\n" not in line
