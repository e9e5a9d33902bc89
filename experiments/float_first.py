"""Whether the float model's own score is known before quantized ones are made that stand on it."""

from __future__ import annotations

import logging
from dataclasses import replace

from bc import vision
from bc.settings import Bits, Compensation
from experiments.config import FLOAT, CellConfig, RunConfig
from experiments.identity import cell_hash, slug
from experiments.store import RESULT, CellStore

log = logging.getLogger(__name__)


def float_cell(cell: CellConfig) -> CellConfig:
    """The cell of the same model and test data in which nothing is quantized."""
    return replace(cell, quantizer=FLOAT, options={}, bits=Bits(16, 16, -1), bc=Compensation(scope=()))


def say_unchecked(run: RunConfig) -> None:
    """Tell, of a quantized cell on ImageNet, that the float top-1, which is published, was not checked yet."""
    cell = run.cell
    if cell.is_float or "imagenet" not in cell.data.evaluation.datasets:
        return
    source = vision.catalogue().get(cell.model.name)
    if source is None or source.top1 is None:
        return
    own = float_cell(cell)
    if not (CellStore(run.results, slug(own), cell_hash(own)).folder / RESULT).is_file():
        log.info(
            "  the float top-1 of %s (published %.2f) is not checked here yet; run the same with "
            "`quantizer=none bits=float bc=off` first",
            cell.model.name,
            source.top1,
        )
