"""The float model's top-1 beside the published one, and that it is asked for before quantized scores."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bc.data import images
from experiments import vision
from experiments.compose import compose_run, hydra_ready
from experiments.config import CellConfig
from experiments.float_first import float_cell, say_unchecked
from experiments.identity import cell_hash, slug

VIT_B = ("model=vit_b", "data=imagenet")  # 84.54 published


def composed(*overrides: str) -> Any:
    with hydra_ready():
        return compose_run([*VIT_B, *overrides])


@pytest.fixture
def cell() -> CellConfig:
    cell: CellConfig = composed("quantizer=none", "bits=float").cell
    return cell


@pytest.mark.parametrize(
    ("top1", "scored", "whole", "warned"),
    [
        (84.54 - 0.09, 50_000, True, False),
        (84.54 - 0.11, 50_000, True, True),
        (84.54 + 0.11, 49_999, True, True),
        (84.54 - 3.2, 2000, False, False),  # 0.1 + 4 × 0.81 are allowed
        (84.54 - 3.4, 2000, False, True),
        (0.1, 36, False, True),
    ],
)
def test_a_float_top1_that_is_not_the_published_one_is_pointed_out(
    cell: CellConfig, top1: float, scored: int, whole: bool, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, vision.__name__):
        vision.compare_float(cell, top1, scored, whole=whole)
    (record,) = caplog.records
    assert (record.levelno == logging.WARNING) == warned
    assert (f"on a part: {scored:,} images" in record.message) != whole


@pytest.mark.parametrize(
    ("scored", "left_out", "whole"), [(50_000, 0, True), (49_998, 2, True), (49_998, 0, False), (35, 1, False)]
)
def test_scoring_compares_and_pictures_left_out_do_not_make_a_part(
    cell: CellConfig, scored: int, left_out: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(samples=scored, top1=84.5, top5=97.0, right=[True])
    compared: list[Any] = []
    monkeypatch.setattr(vision, "evaluate_accuracy", lambda *_: found)
    monkeypatch.setattr(vision, "compare_float", lambda _, *given, **named: compared.append((*given, named)))
    test = SimpleNamespace(count=scored, left_out=["a picture"] * left_out)
    samples: Any = SimpleNamespace(test={"imagenet": test})
    given: Any = (None, samples, None)
    vision.VisionTask().evaluate(*given, cell)
    assert compared == [(84.5, scored, {"whole": whole})]
    assert images.IMAGENET_TEST == 50_000


def test_a_quantized_cell_asks_for_the_float_top1_until_it_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    where = f"results_dir={tmp_path}"
    quantized = composed("quantizer=minmax", "bits=w8a8", "bc=paper", "seed=7", where)
    alone = composed("quantizer=none", "bits=float", "bc=off", where)
    assert cell_hash(float_cell(quantized.cell)) == cell_hash(alone.cell)
    with caplog.at_level(logging.INFO, "experiments.float_first"):
        say_unchecked(alone)
        say_unchecked(composed("model=tiny_vit", "data=embedded_vision", "quantizer=minmax", "bits=w8a8", where))
        assert not caplog.records
        say_unchecked(quantized)
        (record,) = caplog.records
        assert "float top-1 of vit_b" in record.message and "quantizer=none bits=float bc=off" in record.message
        folder = tmp_path / "cells" / slug(alone.cell)
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({}))
        say_unchecked(quantized)
    assert len(caplog.records) == 1


def test_a_cell_that_starts_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments import cell as execution

    asked: list[str] = []
    monkeypatch.setattr(execution, "say_unchecked", lambda run: asked.append(run.cell.model.name))
    monkeypatch.delenv("BC_IMAGENET", raising=False)
    run = composed("quantizer=minmax", "bits=w8a8", "bc=paper", f"results_dir={tmp_path}", "logger=none")
    assert execution.run_cell(run).state == "failed"  # there is no ImageNet
    assert asked == ["vit_b"]
