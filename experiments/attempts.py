"""What a cell does about a machine that is too small: smaller batches, then advice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from bc import device as devices
from bc.errors import UserError
from experiments.config import BATCH, RunConfig
from experiments.disk import disk_error

log = logging.getLogger(__name__)
T = TypeVar("T")


def with_smaller_batches(run: RunConfig, compute: Callable[[RunConfig], T]) -> tuple[T, dict[str, int]]:
    """Compute a cell, with half the batch size each time that the memory does not suffice.

    Args:
        run: The cell and how it runs.
        compute: Computes it.

    Returns:
        What was computed, and ``batch_size``, the one that it ran with, and ``batch_halvings``.

    Raises:
        UserError: A batch of one sample does not fit, or the disk is full or may not be written.
    """
    halvings = 0
    while True:
        try:
            values = compute(run)
        except Exception as error:
            if isinstance(error, OSError) and (known := disk_error(error, results=run.results)):
                raise known from error
            if not devices.is_out_of_memory(error):
                raise
            size = run.engine.batch_size or BATCH[run.cell.domain]
            if size == 1:
                raise UserError(too_small(run)) from error
        else:
            size = run.engine.batch_size or BATCH[run.cell.domain]
            return values, {"batch_size": size, "batch_halvings": halvings}
        halvings += 1  # outside the except block, whose traceback keeps the tensors of the attempt alive
        log.info("  out of memory with batches of %d; tries again with %d", size, size // 2)
        run = replace(run, engine=replace(run.engine, batch_size=size // 2))
        devices.release(devices.resolve(run.engine.device))


def too_small(run: RunConfig) -> str:
    """What to do where even one sample does not fit."""
    ways = [] if run.engine.activations != "device" else ["engine.activations=host"]
    if run.engine.device != "cpu":
        ways.append("engine.device=cpu")
    ways += ["shorter windows (data.calibration.window, data.evaluation.window)", "a device with more memory"]
    return f"engine.batch_size: out of memory on {run.engine.device} with batches of 1; use {', '.join(ways)}"
