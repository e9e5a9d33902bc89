"""A disk that is full or may not be written, told in one line."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bc.activation_cache import PREFIX
from bc.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
DENIED = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def one_line_disk_errors(where: str = "results_dir") -> Iterator[None]:
    """Turn errors of a full or forbidden disk into :class:`UserError`; others pass.

    Args:
        where: The setting that names the folder.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        # a log file that cannot be opened reaches us as the cause of logging's own ValueError
        cause = error if isinstance(error, OSError) else error.__cause__
        known = disk_error(cause, where) if isinstance(cause, OSError) else None
        if known is None:
            raise
        raise known from error


def disk_error(error: OSError, where: str = "results_dir") -> UserError | None:
    """The line for a disk that is full or may not be written; None for any other error.

    Activations wait below the folder that the variable ``TMPDIR`` names, whatever ``where`` is.
    """
    path = str(error.filename or "")
    for folder in (Path(path), *Path(path).parents):
        if folder.name.startswith(PREFIX):
            where, path = "TMPDIR", str(folder)
    if error.errno in FULL:
        return UserError(f"{where}: no space left on the disk{_of(path)}; free some, and run the same command again")
    if error.errno in DENIED:
        reason = os.strerror(error.errno).lower()
        return UserError(f"{where}: cannot be written ({reason}{_of(path)}); set {where} to a folder of yours")
    return None


def _of(path: str) -> str:
    return f" of {str(Path(path).parent)!r}" if path else ""
