"""Settings, pairs and figures from rows of cells.csv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments import bench_plots, comparisons, figures, frame, plots, style
from experiments.records import COLUMNS, Row, read_rows, write_rows
from tests.committed import ROOT, committed


def row(**values: Any) -> Row:
    usual = {"experiment": "demo", "suite": "embedded", "model": "m", "quantizer": "rtn", "w_bits": 4, "a_bits": 16}
    usual |= {"group_size": -1, "bc": "off", "calibration_data": "d", "calibration_samples": 8, "dataset": "t"}
    usual |= {"metric": "perplexity", "value": 10.0, "test_samples": 16, "seed": 0, "bits_per_weight": 4.1}
    merged = usual | values
    merged.setdefault("cell", "-".join(str(v) for k, v in merged.items() if k not in ("value", "dataset", "metric")))
    return {name: str(merged.get(name, "")) for name in COLUMNS}


def vision_rows(quantizers: int = 7, seeds: int = 3) -> list[Row]:
    rows = [row(model="v", quantizer="none", w_bits=16, metric="top1", value=90.0, bits_per_weight=32)]
    names = ["minmax", "base_ptq", "easyquant", "ptq4vit", "apq_vit", "noisyquant", "repq_vit"][:quantizers]
    for name in names:
        for bits in (4, 6, 8):
            for bc in ("off", "paper"):
                common = {"model": "v", "quantizer": name, "w_bits": bits, "a_bits": bits, "bc": bc, "metric": "top1"}
                value = 60.0 + 3 * bits + (2 if bc == "paper" else 0)
                bits_per_weight = bits + (3.0 if bc == "paper" else 0.1)
                rows += [row(**common, value=value + s, seed=s, bits_per_weight=bits_per_weight) for s in range(seeds)]
    return rows


def test_settings_are_means_over_seeds() -> None:
    table = frame.settings(frame.frame_of([row(value=10.0), row(value=14.0, seed=1)]))
    assert len(table) == 1
    assert table.loc[0, "value"] == 12.0
    assert table.loc[0, "seeds"] == 2
    assert table.loc[0, "deviation"] == pytest.approx(8**0.5)


def test_cells_that_the_columns_do_not_tell_apart_are_not_averaged() -> None:
    table = frame.settings(frame.frame_of([row(value=10.0, cell="a" * 64), row(value=14.0, cell="b" * 64)]))
    assert sorted(table["value"]) == [10.0, 14.0]
    assert sorted(table["variant"]) == ["a" * 8, "b" * 8]


def test_pairs_have_the_same_weights_and_seed() -> None:
    gptq = {"quantizer": "gptq"}
    rows = [row(**gptq, value=20.0), row(**gptq, value=30.0, seed=1)]
    rows += [row(**gptq, value=v, bc="sink", seed=s) for s, v in enumerate((10.0, 33.0, 1.0))]
    found = frame.pairs(frame.frame_of(rows))
    assert found["gain"].tolist() == pytest.approx([50.0, -10.0])


def test_weights_that_need_no_data_are_the_same_at_every_seed() -> None:
    rows = [row(value=20.0), row(value=10.0, bc="sink", seed=1), row(value=5.0, bc="sink", seed=2)]
    assert frame.pairs(frame.frame_of(rows))["gain"].tolist() == pytest.approx([50.0, 75.0])


def test_pairs_prefer_the_twin_with_as_many_samples() -> None:
    rows = [row(value=20.0), row(value=40.0, calibration_samples=16)]
    rows += [row(value=10.0, bc="sink"), row(value=10.0, bc="sink", calibration_samples=16)]
    assert frame.pairs(frame.frame_of(rows))["gain"].tolist() == pytest.approx([50.0, 75.0])


def test_gain_of_accuracy_is_in_points() -> None:
    assert frame.gain("top1", 70.0, 72.5) == 2.5
    assert frame.gain("perplexity", 20.0, 15.0) == 25.0


def test_a_figure_for_every_question() -> None:
    settings = frame.settings(frame.frame_of(vision_rows()))
    assert plots.bars("t", settings) is None  # too many to be read
    for draw in (plots.bits, plots.pareto):
        assert draw("t", settings) is not None
    assert plots.bars("t", frame.settings(frame.frame_of(vision_rows(quantizers=2)))) is not None
    assert plots.samples("t", settings) is None


def test_samples_figure() -> None:
    rows = [row(metric="top1", value=60.0)]
    rows += [row(metric="top1", bc="paper", calibration_samples=n, seed=s, value=n) for n in (8, 16) for s in (0, 1)]
    assert plots.samples("t", frame.settings(frame.frame_of(rows))) is not None
    assert plots.bars("t", frame.settings(frame.frame_of(rows))) is None  # bars would lie on one another


def test_lengths_figure() -> None:
    """Cells that only the length of their test windows tells apart."""
    rows = [row(bc=bc, value=v, cell=f"{bc}{n}") for bc in ("off", "sink") for n, v in ((128, 40.0), (512, 30.0))]
    settings = frame.settings(frame.frame_of(rows))
    windows = {f"{bc}{n}": n for bc in ("off", "sink") for n in (128, 512)}
    figure = plots.lengths("t", settings, windows)
    assert figure is not None
    (axes,) = figure.axes
    assert [line.get_xdata().tolist() for line in axes.lines if line.get_marker() not in ("_", "|", "None")] == [
        [128, 512],
        [128, 512],
    ]
    assert plots.lengths("t", settings, {}) is None
    assert plots.lengths("t", settings, dict.fromkeys(windows, 128)) is None


def test_published_values_beside_ours() -> None:
    rows = [row(experiment="table2", model="opt_125m", dataset="wikitext2", bc=bc, quantizer="gptq", granularity=g)
            for bc, g in (("off", ""), ("paper", "positional"), ("sink", "sink"))]  # fmt: skip
    beside = frame.with_published(frame.settings(frame.frame_of(rows)), frame.experiments())
    assert beside.set_index("bc")["published"].notna().to_dict() == {"off": True, "paper": True, "sink": False}
    assert comparisons.published("t", beside) is not None
    assert comparisons.published("t", beside[beside["bc"] == "sink"]) is None


def test_printed_gains() -> None:
    table = comparisons._printed(ROOT / "results" / "published" / "table1_vit.csv", "top1")
    row = table[(table["model"] == "vit_base_patch16_384") & (table["w_bits"] == 4)].iloc[0]
    assert (row["method"], row["value"], row["value_bc"]) == ("PTQ4ViT", 31.40, 68.29)
    assert comparisons.printed_gains(ROOT / "results" / "published") is not None


def test_site_figure_shows_the_fewest_bits() -> None:
    rows = [row(bc=bc, w_bits=w, cell=f"{bc}{w}") for bc in ("off", "sink") for w in (3, 4)]
    error = {"site": "a", "scope": "layer", "held_out_relative_before": 0.5, "held_out_relative_after": 0.25}
    errors = {f"{bc}{w}": [error, error | {"site": "b"}] for bc in ("off", "sink") for w in (3, 4)}
    settings = frame.settings(frame.frame_of(rows))
    assert [[r["cell"] for r in panel] for panel in comparisons.profiles(settings, errors)] == [["sink3"]]
    assert comparisons.sites("t", settings, errors) is not None
    assert comparisons.sites("t", settings, {}) is None


def test_frontier() -> None:
    table = pd.DataFrame({"metric": "perplexity", "bits_per_weight": [3.0, 4.0, 5.0], "value": [30.0, 40.0, 20.0]})
    assert plots.frontier(table)["bits_per_weight"].tolist() == [3.0, 5.0]


def test_every_preset_has_a_look_of_its_own() -> None:
    looks = style.looks(["off", "sink", "strange", "stranger"])
    assert len({look.colour for look in looks.values()}) == len({look.marker for look in looks.values()}) == 4


def test_variants_of_a_preset_are_told_apart() -> None:
    kinds = ["affine", *(f"affine{s}-layer-{t}" for s in ("", "-sink") for t in ("float", "quantized", "blended"))]
    looks = style.looks(kinds)
    assert len({(look.marker, look.hollow, look.half) for look in looks.values()}) == len(kinds)
    axes = style.new_figure(3, 3).subplots()
    for look in looks.values():
        axes.plot([0, 1], [0, 1], linestyle=look.line, marker=look.marker, color=look.colour)


def test_the_float_model_is_drawn_where_it_was_scored_on_as_many_samples() -> None:
    for samples, lines in ((16, 1), (8, 0)):
        rows = [row(bc=bc, bits_per_weight=b) for bc, b in (("off", 4.0), ("sink", 4.1))]
        rows.append(row(quantizer="none", w_bits=16, test_samples=samples))
        figure = plots.pareto("t", frame.settings(frame.frame_of(rows)))
        assert figure is not None
        drawn = [line for line in figure.axes[0].get_lines() if line.get_label() == "float model"]
        assert len(drawn) == lines


def test_errors_on_another_stream_have_a_line_of_their_own() -> None:
    axes = style.new_figure(3, 3).subplots()
    site = {"site": "a", "scope": "layer", "held_out_relative_after": 0.2}
    kinds = {"sink": [site | {"held_out_relative_before": 0.3}], "b": [site | {"held_out_relative_before": 0.4}]}
    comparisons.site_panel(axes, kinds, streams={"sink": "float", "b": "blended"})
    before = {line.get_label(): line.get_ydata()[0] for line in axes.get_lines() if "no BC" in str(line.get_label())}
    assert before == {"no BC, float inputs": 0.3, "no BC, quantized inputs": 0.4}


def test_all_experiments_are_drawn_or_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cells.csv").write_bytes(committed("results/cells.csv"))
    assert figures.main(["--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = {r["experiment"] for r in read_rows(tmp_path / "cells.csv")}
    for path in (ROOT / "conf" / "experiment").glob("*.yaml"):
        said = f"{path.stem}: no rows in cells.csv; nothing drawn" in out
        assert said != (path.stem in rows)
    pictures = list((tmp_path / "figures").iterdir())
    assert {p.suffix for p in pictures} == {".png", ".svg"}
    kept = {p.name for p in (ROOT / "results" / "figures").iterdir()}
    assert {p.name for p in pictures} <= kept, "run make figures and commit what it draws"


def test_the_same_rows_give_the_same_figure(tmp_path: Path) -> None:
    write_rows(tmp_path / "cells.csv", vision_rows(quantizers=2))
    path = tmp_path / "figures" / "demo_bits.svg"
    assert figures.main(["demo", "--results", str(tmp_path)]) == 0
    first = path.read_bytes()
    assert figures.main(["demo", "--results", str(tmp_path)]) == 0
    assert path.read_bytes() == first


def test_a_figure_that_the_rows_no_longer_make_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "cells.csv", vision_rows(quantizers=2))
    sites, other = tmp_path / "figures" / "demo_sites.png", tmp_path / "figures" / "table1_bits.png"
    assert figures.main(["demo", "--results", str(tmp_path)]) == 0
    for path in (sites, other):  # the rows say nothing of either
        path.write_bytes(b"")
    write_rows(tmp_path / "cells.csv", vision_rows())  # too many for bars now
    capsys.readouterr()
    assert figures.main(["demo", "--results", str(tmp_path)]) == 0
    removed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("removed")]
    assert removed == [f"removed: {tmp_path / 'figures' / name}" for name in ("demo.png", "demo.svg")]
    assert not (tmp_path / "figures" / "demo.png").exists() and sites.exists() and other.exists()


def test_bit_widths_with_groups_are_turned_before_they_touch() -> None:
    def labels(groups: tuple[int, ...]) -> list[Any]:
        settings = [
            {"w_bits": b, "group_size": g, "quantizer": q} for q in ("rtn", "gptq") for b in (3, 4) for g in groups
        ]
        figure = plots.bits("t", frame.settings(frame.frame_of([row(**s, cell=str(s)) for s in settings])))
        assert figure is not None
        return list(figure.axes[0].get_xticklabels())

    for groups, turned in (((-1,), 0), ((-1, 64, 128, 256), 40)):
        assert {label.get_rotation() for label in labels(groups)} == {turned}


def test_benchmarks_are_drawn_from_their_last_run(tmp_path: Path) -> None:
    assert bench_plots.scaling(tmp_path) is None
    head = "curve,at,cpu_seconds,peak_mib,cpu_seconds_slope,peak_mib_slope,commit"
    rows = ["samples,8,9,9,9,9,old"]
    rows += [f"{curve},{at},{at},{2 * at},1.0,0.5,new" for curve in ("samples", "blocks", "width") for at in (2, 4, 8)]
    path = tmp_path / "benchmarks" / "scaling.csv"
    path.parent.mkdir()
    path.write_text("\n".join([head, *rows]) + "\n")
    figure = bench_plots.scaling(tmp_path)
    assert figure is not None and len(figure.axes) == 6
    lines = [axes.get_lines()[0].get_xydata().tolist() for axes in figure.axes]
    assert all(line == [[2, 2], [4, 4], [8, 8]] for line in lines[:3])
    assert all(line == [[2, 4], [4, 8], [8, 16]] for line in lines[3:])
