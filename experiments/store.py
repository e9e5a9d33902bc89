"""Results on disk: one folder a cell, a result file that appears complete or not at all, a status and a lock."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from experiments.disk import one_line_disk_errors
from experiments.identity import SCHEMA, digest
from experiments.secrets import redact

log = logging.getLogger(__name__)

RESULT, STATUS, SITES, LOCK = "result.json", "status.json", "sites.json", ".lock"
RUNNING, FAILED, COMPLETE, INTERRUPTED = "running", "failed", "complete", "interrupted"
LOCK_PATIENCE = 1.0  # seconds: longer than the moment in which a status display probes a lock
FIELDS = {"cell", "config", "label", "metrics", "provenance", "error_before", "error_after", "bits_per_weight"}
FIELDS |= {"bias_parameters", "seconds_quantize", "seconds_bc", "seconds_evaluate", "peak_memory_mb"}
CHECKSUM = "sha256"
BEFORE_CHECKSUMS = FIELDS | {"schema", "slug", "damping_retries"}  # what a result without a checksum may hold


class InvalidResultError(ValueError):
    """A result file is not what it should be; the message says how."""


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file by way of a temporary name, flushed to the disk before it is renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf8") as stream:
            json.dump(value, stream, indent=1, sort_keys=True)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InvalidResultError: It cannot be parsed, or is a folder.
    """
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise InvalidResultError(f"{path}: not JSON ({error})") from error
    except IsADirectoryError as error:
        raise InvalidResultError(f"{path}: a folder, not a file") from error


def checksum(result: dict[str, Any]) -> str:
    """SHA-256 of all of a result but its checksum."""
    rest = json.loads(json.dumps({key: value for key, value in result.items() if key != CHECKSUM}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_result(result: Any, where: str) -> dict[str, Any]:
    """Refuse a result that is incomplete, of another schema, or not of the cell that it names.

    Raises:
        InvalidResultError: Saying what is wrong.
    """
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise InvalidResultError(f"{where}: not a result of schema {SCHEMA}")
    missing = FIELDS - set(result)
    if missing:
        raise InvalidResultError(f"{where}: lacks {', '.join(sorted(missing))}")
    if CHECKSUM not in result and not set(result) <= BEFORE_CHECKSUMS:
        raise InvalidResultError(f"{where}: lacks its checksum")
    if CHECKSUM in result and checksum(result) != result[CHECKSUM]:
        raise InvalidResultError(f"{where}: was changed after it was written (its checksum is another)")
    if digest(result["config"]) != result["cell"]:
        raise InvalidResultError(f"{where}: the configuration's hash is not the cell's")
    rows = result["metrics"]
    if not isinstance(rows, list) or not rows:
        raise InvalidResultError(f"{where}: has no metrics")
    for row in rows:
        named = isinstance(row, dict) and set(row) == {"dataset", "metric", "value", "test_samples"}
        if not named or not isinstance(row["value"], int | float):
            raise InvalidResultError(f"{where}: a metric is malformed: {row}")
        if math.isnan(row["value"]):
            raise InvalidResultError(f"{where}: the {row['metric']} of {row['dataset']} is not a number")
    return result


def set_aside(path: Path, reason: str) -> Path:
    """Move a damaged file or folder to a free name beside it, and say so."""
    number = 1
    while (target := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(target)
    log.warning("warning: %s; moved to %s and made again", reason, target)
    return target


class CellStore:
    """The folder of one cell.

    Args:
        results: The results directory.
        slug: Name of the cell's folder.
        cell: The cell's hash.
    """

    def __init__(self, results: Path, slug: str, cell: str) -> None:
        self.folder, self.slug, self.cell = results / "cells" / slug, slug, cell

    def result(self) -> dict[str, Any] | None:
        """The cell's valid result, or None; an unreadable file is moved aside."""
        path = self.folder / RESULT
        if not path.exists():
            return None
        try:
            result = check_result(read_json(path), str(path))
            if result["cell"] != self.cell:
                raise InvalidResultError(f"{path}: belongs to cell {result['cell'][:8]}")
        except InvalidResultError as error:
            set_aside(path, str(error))
            return None
        return result

    def commit(self, result: dict[str, Any], sites: list[dict[str, Any]]) -> None:
        """Write the per-site table, then the result file: its presence is what makes the cell complete.

        The result gets its checksum.
        """
        result[CHECKSUM] = checksum(result)
        check_result(result, self.slug)
        with one_line_disk_errors():
            write_json(self.folder / SITES, sites)
            write_json(self.folder / RESULT, result)
        self.mark(COMPLETE)

    def mark(self, state: str, error: BaseException | None = None) -> None:
        """Write the status file; where it cannot be written at a cell's end, that is said, for it is only a hint."""
        old = self.status() or {}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        status = {
            "state": state,
            "cell": self.cell,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": now if state == RUNNING else old.get("started", now),
            "updated": now,
        }
        if error is not None:
            status["error"] = redact(" ".join(str(error).split())) or type(error).__name__
            status["kind"] = type(error).__name__
            status["traceback"] = redact("".join(traceback.format_exception(error)))
        try:
            write_json(self.folder / STATUS, status)
        except OSError as failure:
            if state == RUNNING:
                raise
            log.warning("warning: %s: its status, %s, cannot be written (%s)", self.slug, state, failure)

    def status(self) -> dict[str, Any] | None:
        """The status file's content; None where there is none or it cannot be read."""
        path = self.folder / STATUS
        try:
            status = read_json(path) if path.exists() else None
        except InvalidResultError:
            return None  # a status is only a hint: the result file decides, and the next run writes a new one
        return status if isinstance(status, dict) else None

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Hold the cell for as long as the block lasts; yields whether it was free.

        The operating system drops the lock of a process that dies.
        """
        with try_lock(self.folder / LOCK) as free:
            if free:
                remove_leftovers(self.folder, RESULT, SITES, STATUS)
            yield free

    def is_locked(self) -> bool:
        """Whether a live process holds the cell."""
        if not (self.folder / LOCK).exists():
            return False
        try:
            with try_lock(self.folder / LOCK, 0) as free:
                return not free
        except OSError:  # a results directory that may only be read: who writes to it cannot be told from here
            return True


def remove_leftovers(folder: Path, *names: str) -> None:
    """Remove what a killed process left under the temporary names of files; for who holds their lock."""
    for name in names:
        for path in folder.glob(f".{name}-*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextmanager
def try_lock(path: Path, patience: float = LOCK_PATIENCE) -> Iterator[bool]:
    """Take a file lock if it is free within some seconds; yields whether it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def all_results(results: Path) -> Iterator[dict[str, Any]]:
    """Every valid result in a results directory, by folder name; an invalid one is said and passed over."""
    for path in sorted((results / "cells").glob(f"*/{RESULT}")):
        try:
            yield check_result(read_json(path), str(path))
        except InvalidResultError as error:
            log.warning("warning: %s; it is left out, and its cell will run again", error)
        except OSError as error:
            log.warning("warning: %s: cannot be read (%s); it is left out", path, error.strerror)
