"""Paired comparisons: the interval covers, and the table is made from what the samples scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from bc.errors import UserError
from bc.settings import Compensation
from experiments.compare import compare, interval, main, rows_of, scored, values_of
from experiments.compose import compose_run, hydra_ready
from experiments.identity import cell_hash, with_seed
from experiments.run import main as run


@pytest.mark.parametrize(("seeds", "samples"), [(1, 8), (2, 8), (3, 16), (5, 8), (5, 400)])
@pytest.mark.parametrize("deviations", [(0.05, 0.03, 0.02), (0.01, 0.05, 0.05), (0.0, 0.05, 0.02)])
def test_the_interval_covers_the_true_mean(seeds: int, samples: int, deviations: tuple[float, float, float]) -> None:
    """In about 95 of 100 draws, be it the seeds or the samples that vary; of one seed, over samples alone."""
    draw = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        of_seed, of_sample, rest = (
            deviation * draw.normal(size=size)
            for deviation, size in zip(deviations, ((seeds, 1), (1, samples), (seeds, samples)), strict=True)
        )
        low, high = interval(0.3 + of_seed * (seeds > 1) + of_sample + rest)
        held += low <= 0.3 <= high
    assert held >= (0.86 if seeds == 2 else 0.92) * 400  # the variance over two seeds is hardly known


def test_the_interval_is_the_textbooks_where_one_thing_varies() -> None:
    """Against scipy's t interval of the windows, or of the seeds."""
    table = np.random.default_rng(0).normal(size=(1, 12))
    ours = stats.ttest_1samp(table[0], 0.0).confidence_interval(0.95)
    assert interval(table) == pytest.approx((ours.low, ours.high))
    assert interval(table.T) == pytest.approx((ours.low, ours.high))
    assert interval(np.repeat(table, 4, axis=0)) == pytest.approx((ours.low, ours.high))  # seeds that change nothing
    assert interval(np.ones((1, 1))) == (-np.inf, np.inf)
    assert interval(np.zeros((3, 4))) == (0.0, 0.0)


def test_differences_are_taken_sample_by_sample() -> None:
    with hydra_ready():
        cell = compose_run(
            ["model=tiny_vit", "quantizer=minmax", "bits=w4a4", "bc=channel", "data=embedded_vision"]
        ).cell
        base = compose_run(["model=tiny_vit", "quantizer=minmax", "bits=w4a4", "bc='off'", "data=embedded_vision"]).cell
    results = {}
    for seed, (mine, other) in enumerate([("1101", "0101"), ("1111", "1100")]):
        results[cell_hash(with_seed(cell, seed))] = {"outcomes": {"d": mine}, "bits_per_weight": 4.5}
        results[cell_hash(with_seed(base, seed))] = {"outcomes": {"d": other}, "bits_per_weight": 4.25}
    found = compare(cell, Compensation(), "d", results, [0, 1, 2], {})
    assert found is not None
    assert (found.difference, found.seeds, found.samples, found.bits) == (pytest.approx(37.5), 2, 4, 0.25)
    assert found.better == 1.0 and found.low <= 37.5 <= found.high
    assert compare(cell, Compensation(), "other", results, [0, 1], {}) is None
    assert values_of([1.5, 2.0]).tolist() == [1.5, 2.0]


def test_a_quantizer_without_data_has_one_baseline() -> None:
    """Of the same weights and test samples; one that is calibrated has no other than its own."""
    for quantizer, expected in (("rtn", 2), ("gptq", 1)):
        usual = ["model=smollm2_135m", f"quantizer={quantizer}", "bits=w3", "data=embedded_demo"]
        with hydra_ready():
            cell = compose_run([*usual, "bc=sink", "data.calibration.samples=16"]).cell
            base = compose_run([*usual, "bc='off'", "data.calibration.samples=16"]).cell
        results = {cell_hash(with_seed(cell, s)): {"outcomes": {"d": [1.0, 2.0]}, "bits_per_weight": 4} for s in (0, 1)}
        results[cell_hash(base)] = {"outcomes": {"d": [1.5, 2.5]}, "bits_per_weight": 3}
        found = compare(cell, Compensation(), "d", results, [0, 1], {scored(base): cell_hash(base)})
        assert found is not None and (found.seeds, found.difference) == (expected, -0.5)


def test_scores_of_other_samples_are_refused() -> None:
    usual = ["model=smollm2_135m", "quantizer=gptq", "bits=w3", "data=embedded_demo"]
    with hydra_ready():
        cell, base = (compose_run([*usual, f"bc={name}"]).cell for name in ("sink", "'off'"))
    for lengths in ({0: (2, 3)}, {0: (2, 2), 1: (3, 3)}):
        results = {
            cell_hash(with_seed(c, seed)): {"outcomes": {"d": [1.0] * length}, "bits_per_weight": 4}
            for seed, pair in lengths.items()
            for c, length in zip((cell, base), pair, strict=True)
        }
        with pytest.raises(UserError, match=r"compare: d: .* not scored on the same test samples"):
            compare(cell, Compensation(), "d", results, [0, 1], {})


FAST = ["model=tiny_vit", "data=embedded_vision", "data.evaluation.limit=60", "data.calibration.samples=8"]
FAST += ["data.compensation.samples=12", "data.selection.samples=8", "report.calibration_samples=0"]
FAST += ["report.held_out_samples=0", "engine.device=cpu", "engine.threads=1", "logger=none", "quantizer=minmax"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [*FAST, "bits=w2a4", "seed=0"]
    assert main(["demo_vision", *overrides, "--results", str(tmp_path)]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: compare: no result files of demo_vision") and "\n" not in line
    assert run(["+experiment=demo_vision", f"results_dir={tmp_path}", *overrides]) in (0, 2)  # float cells do not fit
    assert main(["demo_vision", *overrides, "--results", str(tmp_path)]) == 0
    text = (tmp_path / "tables" / "demo_vision_paired.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| tiny_vit")]
    assert {row.split("|")[4].strip() for row in rows} == {"channel", "paper"}
    assert "top-1 in percent (higher is better) from no compensation" in text
    capsys.readouterr()
    assert main(["demo_vision", *overrides, "--against", "paper", "--results", str(tmp_path)]) == 0
    text = (tmp_path / "tables" / "demo_vision_paired_paper.md").read_text()
    assert "from `paper`" in text
    assert {line.split("|")[4].strip() for line in text.splitlines() if line.startswith("| tiny_vit")} == {"channel"}
    assert main(["demo_vision", *overrides, "--against", "sink", "--results", str(tmp_path)]) == 2
    line = capsys.readouterr().err.strip()
    assert line == "error: --against: 'sink' is not a setting of this experiment; it has channel, off, paper"
    assert len(rows_of("demo_vision", overrides, tmp_path)) == len(rows)
