"""What cells share: quantized weights and the float model's statistics, kept once by the hash of what determines them.

What was just made is read back from its file before it is used, so a resumed sweep computes with the very same numbers.
Each keeps the fingerprint of the model that it was made from: a local model goes by the name that its user gave it, and
what was made from another of that name is not to be mixed with it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import nn

from bc.checkpoint import DamagedFileError, load_means, load_weights, save_means, save_weights
from bc.errors import UserError
from bc.fingerprint import fingerprint
from bc.quantizers.base import SiteResult
from bc.statistics import PositionSums
from experiments.config import CellConfig
from experiments.identity import means_hash, seen_hash, weights_hash
from experiments.store import remove_leftovers, set_aside

log = logging.getLogger(__name__)
T = TypeVar("T")
DIGITS = 16  # of the hash, in file names
MEANS_FILE = "means.safetensors"
Metadata = dict[str, str]


@dataclass
class Shared(Generic[T]):
    """A shared artefact.

    Attributes:
        value: What was made or found.
        seconds: How long it took to make, whenever that was.
        found: Whether it was there already.
    """

    value: T
    seconds: float
    found: bool


def quantized_weights(
    results: Path, cell: CellConfig, model: nn.Module, make: Callable[[], dict[str, SiteResult]]
) -> Shared[dict[str, SiteResult]]:
    """The quantized weights of a cell, made if they are not there.

    Args:
        results: The results directory.
        cell: Determines which weights.
        model: The float model that they are of.
        make: Computes them.

    Raises:
        UserError: What is there was made from another model of the same name.
    """
    identity = weights_hash(cell)
    path = results / "artefacts" / f"weights-{identity[:DIGITS]}.safetensors"
    return _obtain(path, cell, _facts(model, identity), make, load_weights, save_weights)


def float_statistics(
    results: Path, cell: CellConfig, model: nn.Module, make: Callable[[], dict[str, PositionSums]]
) -> Shared[dict[str, PositionSums]]:
    """The float model's sums of inputs by position, made if they are not there; arguments as above."""
    return _sums(results, "means", cell, _facts(model, means_hash(cell, cell.bc.wants_halves)), make)


def calibration_statistics(
    results: Path, cell: CellConfig, model: nn.Module, make: Callable[[], dict[str, PositionSums]]
) -> Shared[dict[str, PositionSums]]:
    """Sums of the inputs that the quantizer saw, made if they are not there; arguments as above."""
    return _sums(results, "seen", cell, _facts(model, seen_hash(cell, cell.bc.wants_halves)), make)


def _facts(model: nn.Module, identity: str) -> Metadata:
    return {"identity": identity, "model": fingerprint(model)}


def _sums(
    results: Path, kind: str, cell: CellConfig, facts: Metadata, make: Callable[[], dict[str, PositionSums]]
) -> Shared[dict[str, PositionSums]]:
    def load(path: Path) -> tuple[dict[str, PositionSums], Metadata]:
        means = load_means(path)
        with safe_open(str(path / MEANS_FILE), framework="pt") as file:
            return means, file.metadata()

    path = results / "artefacts" / f"{kind}-{facts['identity'][:DIGITS]}"
    return _obtain(path, cell, facts, make, load, save_means)


def _obtain(
    path: Path,
    cell: CellConfig,
    facts: Metadata,
    make: Callable[[], T],
    load: Callable[[Path], tuple[T, Metadata]],
    save: Callable[[Path, T, Metadata], None],
) -> Shared[T]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("  waiting for %s, which another process is making", path.name)
        lock.acquire()
    try:
        remove_leftovers(path.parent, path.name)
        if path.is_dir():
            remove_leftovers(path, MEANS_FILE)
            if not any(path.iterdir()):  # it was never finished
                path.rmdir()
        if path.exists():
            try:
                value, kept = load(path)
                _refuse_another(path, cell, kept, facts)
                return Shared(value, float(kept["seconds"]), found=True)
            except DamagedFileError as error:
                set_aside(path, str(error))
        start = time.perf_counter()
        value = make()
        save(path, value, facts | {"seconds": repr(time.perf_counter() - start)})
        del value  # never two copies at once
        value, kept = load(path)
        return Shared(value, float(kept["seconds"]), found=False)
    finally:
        lock.release()


def _refuse_another(path: Path, cell: CellConfig, kept: Metadata, facts: Metadata) -> None:
    """Refuse what was made from another model; files without a fingerprint are of a time when none was kept."""
    if kept.get("model", facts["model"]) != facts["model"]:
        raise UserError(
            f"model.name: {cell.model.name!r} was a model of other weights when {path} was made; give this one another "
            "model.name, or use another results_dir"
        )
