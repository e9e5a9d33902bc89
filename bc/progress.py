"""Progress bars with an ETA on a terminal, silence elsewhere."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


@contextmanager
def quiet_without_terminal() -> Iterator[None]:
    """Keep a library's progress bars out of log files; errors still come as exceptions."""
    if sys.stderr.isatty():
        yield
    else:
        with redirect_stderr(io.StringIO()):
            yield


def track(items: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Iterate with a bar on standard error where that is a terminal.

    Args:
        items: What to iterate over.
        description: Text before the bar.
        total: Number of items, where the iterable has no length.
        unit: Name of an item.
    """
    quiet = not sys.stderr.isatty()
    yield from tqdm(items, desc=description, total=total, unit=unit, disable=quiet, leave=False, dynamic_ncols=True)
