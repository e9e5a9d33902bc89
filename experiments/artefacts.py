"""What cells share: quantized weights and the float model's statistics, kept once by the hash of what determines them.

What was just made is read back from its file before it is used, so a resumed sweep computes with the very same numbers.
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

from bc.checkpoint import DamagedFileError, load_means, load_weights, save_means, save_weights
from bc.quantizers.base import SiteResult
from bc.statistics import PositionSums
from experiments.config import CellConfig
from experiments.identity import means_hash, seen_hash, weights_hash
from experiments.store import remove_leftovers, set_aside

log = logging.getLogger(__name__)
T = TypeVar("T")
DIGITS = 16  # of the hash, in file names
MEANS_FILE = "means.safetensors"


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
    results: Path, cell: CellConfig, make: Callable[[], dict[str, SiteResult]]
) -> Shared[dict[str, SiteResult]]:
    """The quantized weights of a cell, made if they are not there.

    Args:
        results: The results directory.
        cell: Determines which weights.
        make: Computes them.
    """
    digits = weights_hash(cell)[:DIGITS]

    def load(path: Path) -> tuple[dict[str, SiteResult], float]:
        weights, metadata = load_weights(path)
        return weights, float(metadata["seconds"])

    def save(path: Path, weights: dict[str, SiteResult], seconds: float) -> None:
        save_weights(path, weights, {"seconds": repr(seconds), "identity": weights_hash(cell)})

    return _obtain(results / "artefacts" / f"weights-{digits}.safetensors", make, load, save)


def float_statistics(
    results: Path, cell: CellConfig, make: Callable[[], dict[str, PositionSums]]
) -> Shared[dict[str, PositionSums]]:
    """The float model's sums of inputs by position, made if they are not there; arguments as above."""
    return _sums(results, "means", means_hash(cell, cell.bc.wants_halves), make)


def calibration_statistics(
    results: Path, cell: CellConfig, make: Callable[[], dict[str, PositionSums]]
) -> Shared[dict[str, PositionSums]]:
    """Sums of the inputs that the quantizer saw, made if they are not there; arguments as above."""
    return _sums(results, "seen", seen_hash(cell, cell.bc.wants_halves), make)


def _sums(
    results: Path, kind: str, identity: str, make: Callable[[], dict[str, PositionSums]]
) -> Shared[dict[str, PositionSums]]:
    def load(path: Path) -> tuple[dict[str, PositionSums], float]:
        means = load_means(path)
        with safe_open(str(path / MEANS_FILE), framework="pt") as file:
            return means, float(file.metadata()["seconds"])

    def save(path: Path, means: dict[str, PositionSums], seconds: float) -> None:
        save_means(path, means, {"seconds": repr(seconds), "identity": identity})

    return _obtain(results / "artefacts" / f"{kind}-{identity[:DIGITS]}", make, load, save)


def _obtain(
    path: Path,
    make: Callable[[], T],
    load: Callable[[Path], tuple[T, float]],
    save: Callable[[Path, T, float], None],
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
                return Shared(*load(path), found=True)
            except DamagedFileError as error:
                set_aside(path, str(error))
        start = time.perf_counter()
        value = make()
        save(path, value, time.perf_counter() - start)
        del value  # never two copies at once
        return Shared(*load(path), found=False)
    finally:
        lock.release()
