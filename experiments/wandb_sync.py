"""Upload what cells wrote for Weights & Biases: ``python -m experiments.wandb_sync [--results DIR]``.

A cell only ever writes to its own disk, whatever ``logger.mode`` is: no server can slow it or make it fail. With
``logger.mode=online`` this program is started in the background whenever a cell ends. It imports no PyTorch.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

PATTERN = "offline-run-*"
LOG = "wandb-sync.log"
SERVICE = "WANDB_SERVICE"  # the service of the process that started this one, whose cells must not depend on uploads
BACKGROUND_LIMIT = 900.0  # seconds after which an upload in the background gives up; the next one goes on
_started: list[subprocess.Popen[bytes]] = []  # uploads in the background, kept so that none is lost sight of


def waiting_runs(results: Path) -> list[Path]:
    """Folders of runs that were not uploaded yet and that no process is writing."""
    folders = sorted((results / "wandb").glob(PATTERN))
    return [folder for folder in folders if not is_uploaded(folder) and not _is_written(results, folder)]


def is_uploaded(folder: Path) -> bool:
    """Whether W&B's client has marked a run as uploaded."""
    return any(folder.glob("*.wandb.synced"))


def remove_superseded(results: Path, cell: str) -> None:
    """Remove what an earlier attempt at a cell left, unless it was uploaded: a cell is one run."""
    for folder in (results / "wandb").glob(f"{PATTERN}-{cell}"):
        if not is_uploaded(folder):
            shutil.rmtree(folder)


def _is_written(results: Path, folder: Path) -> bool:
    """Whether a process is at the cell of a run: its folder ends in the hash that the run's name ends in."""
    digits = folder.name.rpartition("-")[2][:8]
    for path in (results / "cells").glob(f"*-{digits}/.lock"):
        try:
            with FileLock(path, timeout=0):
                pass
        except Timeout:
            return True
    return False


def upload_in_background(results: Path) -> None:
    """Start an upload that outlives this process; its messages go to ``results/logs/wandb-sync.log``."""
    log = results / "logs" / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "experiments.wandb_sync", "--results", str(results), "--background"]
    with log.open("ab") as stream:
        _started.append(
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True)
        )


def upload(results: Path, limit: float | None) -> int:
    """Upload all waiting runs with W&B's own client.

    Args:
        results: The results directory.
        limit: Seconds after which to give up; None is never.

    Returns:
        The client's exit status; 0 where there is nothing to do.
    """
    runs = waiting_runs(results)
    if not runs:
        print("W&B: nothing to upload")
        return 0
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *map(str, runs)]
    environment = {key: value for key, value in os.environ.items() if key != SERVICE}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        print(f"W&B: no answer within {limit:.0f} s; `make wandb-sync` tries again")
        return 1
    finally:
        process.kill()
        process.wait()


@contextmanager
def _turn(results: Path, *, wait: bool) -> Iterator[bool]:
    """One upload of a results directory at a time, and at most one in line; yields whether it is ours to do.

    Whoever is in line takes everything that is there when its turn comes, so that a third need not wait.
    """
    folder = results / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    line, work = FileLock(folder / ".line.lock"), FileLock(folder / ".work.lock")
    try:
        line.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        work.acquire()
    finally:
        line.release()
    try:
        yield True
    finally:
        work.release()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.wandb_sync", description="Upload runs to W&B.")
    parser.add_argument("--results", type=Path, default=Path("results"), help="results directory (default: results)")
    parser.add_argument("--background", action="store_true", help="give up where another upload waits, or after long")
    options = parser.parse_args(arguments)
    with _turn(options.results, wait=not options.background) as ours:
        return upload(options.results, BACKGROUND_LIMIT if options.background else None) if ours else 0


if __name__ == "__main__":
    sys.exit(main())
