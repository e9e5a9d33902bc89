"""Where activations wait between two blocks: on the device, in host memory, or in memory-mapped files."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from bc.errors import UserError

PLACES = ("device", "host", "disk")
PREFIX = "bc-activations-"  # of the folders below TMPDIR that hold the files


@dataclass(frozen=True)
class Store:
    """How activations are kept; the caches that are made with one store share its budget.

    Attributes:
        place: ``device``, ``host`` or ``disk``.
        dtype: What they are stored as; None is as they come. A narrower one rounds them.
        budget: Bytes that may wait on the device or in host memory, over all caches; what comes on top goes to files.
            None is no limit.

    Raises:
        UserError: The place is unknown.
    """

    place: str = "host"
    dtype: torch.dtype | None = None
    budget: int | None = None
    _caches: WeakSet[ActivationCache] = field(default_factory=WeakSet, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise UserError(f"activations: {self.place!r} is not known; allowed: {', '.join(PLACES)}")

    @property
    def used(self) -> int:
        """Bytes that wait on the device or in host memory."""
        return sum(cache.resident for cache in self._caches)

    def register(self, cache: ActivationCache) -> None:
        """Count a cache's bytes for as long as it lives."""
        self._caches.add(cache)

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more may wait in memory."""
        return self.place != "disk" and (self.budget is None or self.used + size <= self.budget)


@dataclass
class _Item:
    """States of one batch: as they are kept, their file where they are in one, and the dtype that they came in."""

    kept: Tensor
    path: Path | None
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.kept.numel() * self.kept.element_size()


class ActivationCache:
    """Hidden states of all batches.

    Args:
        store: How they are kept; a place alone stands for a store of its own.
        device: Where the states are used.
    """

    def __init__(self, store: Store | str, device: torch.device) -> None:
        self.store, self.device = Store(store) if isinstance(store, str) else store, device
        self._items: list[_Item] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.store.register(self)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def nbytes(self) -> int:
        """Size of what is kept, in bytes."""
        return sum(item.nbytes for item in self._items)

    @property
    def resident(self) -> int:
        """Bytes of it that are not in files."""
        return sum(item.nbytes for item in self._items if item.path is None)

    def empty_twin(self) -> ActivationCache:
        """A cache of the same store with nothing in it."""
        return ActivationCache(self.store, self.device)

    def append(self, value: Tensor) -> None:
        """Keep the states of one more batch.

        Raises:
            OSError: They go to a file and the disk is full.
        """
        self._items.append(self._kept(len(self._items), value))

    def _kept(self, index: int, value: Tensor) -> _Item:
        dtype = self.store.dtype or value.dtype
        if self.store.has_room(value.numel() * dtype.itemsize):
            place: Any = self.device if self.store.place == "device" else "cpu"
            return _Item(value.to(place, dtype, copy=True), None, value.dtype)
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix=PREFIX)
        path = Path(self._folder.name) / f"{index:06d}-{'x'.join(map(str, value.shape))}.bin"
        reserve(path, value.numel() * dtype.itemsize)
        mapped = torch.from_file(str(path), shared=True, size=value.numel(), dtype=dtype)
        return _Item(mapped.view(value.shape).copy_(value), path, value.dtype)

    def __getitem__(self, index: int) -> Tensor:
        item = self._items[index]
        return item.kept.to(self.device, item.dtype)

    def __setitem__(self, index: int, value: Tensor) -> None:
        item = self._items[index]
        if item.kept.shape == value.shape and item.dtype == value.dtype:
            item.kept.copy_(value)
            return
        # a stem or a downsample changes the shape; what was kept goes first, to leave its room to what comes
        item.kept = item.kept.new_empty(0)
        if item.path is not None:
            item.path.unlink(missing_ok=True)
        self._items[index] = self._kept(index, value)


def reserve(path: Path, size: int) -> None:
    """Make a file of a size with its space taken on the disk.

    A write to a mapped file without space ends the process (SIGBUS); here a full disk is an error.

    Raises:
        OSError: The disk is full (``ENOSPC``); it names the file.
    """
    with path.open("wb") as stream:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, size)
            else:  # macOS: what is written has its space
                for start in range(0, size, 2**20):
                    stream.write(bytes(min(2**20, size - start)))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error
