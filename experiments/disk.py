"""A disk that is full or may not be written, told in one line."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bc.activation_cache import PREFIX
from bc.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
DENIED = (errno.EROFS, errno.EACCES, errno.EPERM)
IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


@contextmanager
def one_line_disk_errors(where: str = "results_dir", results: Path | None = None) -> Iterator[None]:
    """Turn errors of a full or forbidden disk into :class:`UserError`; others pass.

    Args:
        where: The setting that names the results folder.
        results: That folder; None where all that is written lies below it.

    Raises:
        UserError: The disk is full, or a file may not be written or read.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        # a log file that cannot be opened reaches us as the cause of logging's own ValueError
        cause = error if isinstance(error, OSError) else error.__cause__
        known = disk_error(cause, where, results) if isinstance(cause, OSError) else None
        if known is None:
            raise
        raise known from error


def disk_error(error: OSError, where: str = "results_dir", results: Path | None = None) -> UserError | None:
    """The line for a disk that is full, or a file that may not be written or read; None for any other error.

    Activations wait below the folder that the variable ``TMPDIR`` names, whatever ``where`` is.
    """
    path = str(error.filename or "")
    within = not path or results is None or _below(Path(path), results)
    for folder in (Path(path), *Path(path).parents):
        if folder.name.startswith(PREFIX):
            where, path, within = "TMPDIR", str(folder), True
    number = error.errno if error.errno is not None or not isinstance(error, PermissionError) else errno.EACCES
    reason = os.strerror(number or 0).lower()
    if number in FULL:
        named = f"{where}: no" if within else "no"
        return UserError(f"{named} space left on the disk{_of(path)}; free some, and run the same command again")
    if number in DENIED:
        if not path and number != errno.EROFS:  # files are opened by us by name: a library's reader
            return UserError(f"a file cannot be read ({reason}); make the files of the model and data readable")
        if number != errno.EROFS and not _is_write(Path(path)):
            return UserError(f"cannot be read: {path!r} ({reason}); make it readable, or name another file or folder")
        if not within:
            return UserError(f"cannot be written: {path!r} ({reason}); make its folder writable")
        return UserError(f"{where}: cannot be written ({reason}{_of(path)}); set {where} to a folder of yours")
    if number == errno.ENOENT and within and path and _is_made(error):
        return UserError(f"{where}: {path!r} cannot be made ({reason}); set {where} to a folder of yours")
    if number in IN_THE_WAY and within and path:
        return UserError(f"{where}: {path!r} is in the way ({reason}); set {where} to a folder")
    return None


def _below(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _is_write(path: Path) -> bool:
    """Whether writing is what was forbidden: what is there can be read, or what is not could have been looked for."""
    return os.access(path, os.R_OK) if os.path.lexists(path) else os.access(path.parent, os.X_OK)


def _is_made(error: OSError) -> bool:
    """Whether a folder was to be made: beside one that is there this fails in a place like /proc alone."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    made = bool(frames) and frames[-1].f_code.co_name in ("mkdir", "makedirs")
    return made and Path(error.filename).parent.is_dir()


def _of(path: str) -> str:
    return f" of {str(Path(path).parent)!r}" if path else ""
