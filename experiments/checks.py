"""What is checked before any model is loaded: texts are there, the model is there, windows fit its positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bc import models
from bc.errors import UserError
from experiments.config import CellConfig

POSITION_FIELDS = ("max_position_embeddings", "n_positions")  # a model without either has no limit of its own


def check_sources(cell: CellConfig) -> None:
    """Refuse a cell whose texts or model are absent, or whose windows the model cannot take.

    Raises:
        UserError: The first thing that is wrong.
    """
    from bc.data import text

    data = cell.data
    if not cell.is_float:
        text.check(data.calibration.dataset, "calibration", data.paths)
        if data.selection.samples:
            text.check(data.calibration.dataset, "selection", data.paths)
    for dataset in data.evaluation.datasets:
        text.check(dataset, "test", data.paths)
    target, revision, gguf = models.locate(cell.model.name, cell.model.path)
    if gguf is None:
        check_windows(cell, positions(target, revision))


def check_windows(cell: CellConfig, longest: int | None) -> None:
    """Refuse windows that are longer than a model's positions."""
    windows = {"data.evaluation.window": cell.data.evaluation.window}
    if not cell.is_float:
        windows["data.calibration.window"] = cell.data.calibration.window
    for where, window in windows.items():
        if longest is not None and window > longest:
            raise UserError(
                f"{where}: {window} tokens are more than the {longest} positions of {cell.model.name}; "
                f"set {where}={longest} or less"
            )


def positions(target: str, revision: str) -> int | None:
    """Longest input of a model, from its configuration alone; None where it sets no limit."""
    config = _configuration(target, revision)
    found = [config[name] for name in POSITION_FIELDS if isinstance(config.get(name), int)]
    return found[0] if found else None


def _configuration(target: str, revision: str) -> dict[str, Any]:
    local = Path(target) / "config.json"
    if local.is_file():
        values: dict[str, Any] = json.loads(local.read_text(encoding="utf8"))
        return values
    from transformers import AutoConfig

    try:
        loaded: dict[str, Any] = AutoConfig.from_pretrained(
            target, revision=revision, trust_remote_code=False
        ).to_dict()
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model: {target!r} could not be reached ({reason}); "
            "set model.path to a local folder, or connect to the hub"
        ) from error
    return loaded
