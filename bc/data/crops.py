"""From pictures to crops: decoding in worker processes, and a cache of the crops on disk."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from bc.data.pictures import Pictures
from bc.errors import UserError
from bc.progress import track
from bc.vision.transforms import Preprocessing

Indices = Sequence[int] | NDArray[np.int64]

CHUNK = 64  # pictures that a worker decodes at a time
ABSENT, CORRUPT = -1, -2


@dataclass(frozen=True)
class Crop:
    """A decoded picture.

    Attributes:
        index: Its number in the collection.
        pixels: uint8, shape (channels, height, width); None if it cannot be decoded.
        label: Its label; without pixels, meaningless.
        error: Why it cannot be decoded.
    """

    index: int
    pixels: NDArray[np.uint8] | None
    label: int
    error: str = ""


class _Chunks(Dataset[list[Crop] | UserError]):
    """Crops in chunks, for a loader's workers; nothing in it but what they need.

    A user's mistake is handed over, not raised: a loader would raise it again with a traceback in its message.
    """

    def __init__(self, pictures: Pictures, chunks: list[list[int]], preprocessing: Preprocessing) -> None:
        self.pictures, self.chunks, self.preprocessing = pictures, chunks, preprocessing
        self._crop: Callable[..., NDArray[np.uint8]] | None = None

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> list[Crop] | UserError:
        try:
            return [self._decode(index) for index in self.chunks[number]]
        except UserError as error:
            return error

    def _decode(self, index: int) -> Crop:
        self._crop = self._crop or self.preprocessing.cropper()
        try:
            picture, label = self.pictures.fetch(index)
            return Crop(index, self._crop(picture), label)
        except UserError:
            raise
        except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error, …
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
                raise _passing(self.pictures.name(index), error) from error
            return Crop(index, None, ABSENT, (str(error).strip() or type(error).__name__).splitlines()[0])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_crop": None}


def _passing(name: str, error: MemoryError | OSError) -> UserError:
    """The error for what the system refused: it says nothing of the picture, which is not to be left out for it."""
    if isinstance(error, MemoryError):
        return UserError(f"data: no memory to decode {name}; lower data.workers, or use a machine with more memory")
    return UserError(
        f"data: {name} cannot be read ({error.strerror or error}); see that its folder can be reached, and start again"
    )


def decode(
    pictures: Pictures, indices: Indices, preprocessing: Preprocessing, workers: int | None = None
) -> Iterator[list[Crop]]:
    """Decode and crop pictures, in order.

    Args:
        pictures: The collection.
        indices: Numbers of the wanted ones.
        preprocessing: Size of the crops.
        workers: Processes; None is as many as there are processors, at most 8, and none for less than two chunks.

    Yields:
        Crops, in lists; one without pixels where a picture is corrupt.

    Raises:
        UserError: A picture cannot be read, which is not for its content.
    """
    chunks = [list(map(int, indices[start : start + CHUNK])) for start in range(0, len(indices), CHUNK)]
    if workers is None:
        workers = min(8, os.cpu_count() or 1, len(chunks)) if len(chunks) > 1 else 0
    # Arrays travel through a pipe, pickled: tensors would need more shared memory than a container may have.
    loader = DataLoader(
        _Chunks(pictures, chunks, preprocessing), batch_size=None, num_workers=workers, collate_fn=_as_it_is
    )
    for chunk in loader:
        if isinstance(chunk, UserError):
            raise chunk
        yield chunk


def _as_it_is(chunk: list[Crop] | UserError) -> list[Crop] | UserError:
    return chunk


def say(message: str) -> None:
    """One line to the user."""
    print(message, file=sys.stderr, flush=True)


class CropCache:
    """Crops of a collection in one file, as many as have been asked for; many models share it.

    Beside the array lies one of labels, in which -1 says that a crop is not there yet and -2 that its picture is
    corrupt; whoever opens the cache tries those once more, for the file may have been mended. Crops are on disk before
    their labels are, so a process that is killed loses at most its last chunks, and the next one goes on from there.

    Args:
        folder: Where the files lie; made if need be.
        name: The collection's name, part of the file names.
        pictures: The collection.
        preprocessing: Size of the crops.
    """

    def __init__(self, folder: Path, name: str, pictures: Pictures, preprocessing: Preprocessing) -> None:
        self.pictures, self.preprocessing = pictures, preprocessing
        self.shape = (len(pictures), preprocessing.channels, *preprocessing.size)
        stem = f"{name}-{preprocessing.crop_name}-{pictures.fingerprint()[:12]}"
        self.folder, self.stem = folder, stem
        self.data, self.labels = folder / f"{stem}.npy", folder / f"{stem}.labels.npy"
        self._reasons: dict[int, str] = {}  # of the pictures that were found corrupt since the cache was opened

    def fill(self, indices: Indices, workers: int | None = None) -> None:
        """Decode what is wanted and not there yet; a damaged file is made again.

        Raises:
            UserError: The folder cannot be written, the disk is too small, or a picture cannot be read.
        """
        there = self.data.is_file() and self.labels.is_file() and not self._damaged()
        if there and not len(self._untried(indices)):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f"{self.stem}.lock")
            try:
                lock.acquire(timeout=1)
            except Timeout:
                say(f"waiting for another process that is filling {self.data}")
                lock.acquire()
            try:
                for path in self._damaged():
                    say(f"data: warning: {path} is damaged; what it kept is decoded again")
                    path.unlink()
                self._create()
                self._decode(self._untried(indices), workers)
            finally:
                lock.release()
        except OSError as error:
            raise UserError(
                f"BC_CACHE: {str(self.folder)!r} cannot be written ({error.strerror or error}); set BC_CACHE to "
                "another folder, or data.cache=false to decode the pictures every time"
            ) from error

    def read(self, indices: Indices) -> Iterator[list[Crop]]:
        """Crops that :meth:`fill` has decoded, in order, in lists."""
        data, labels = np.load(self.data, mmap_mode="r"), np.load(self.labels)
        for start in range(0, len(indices), CHUNK):
            chunk = list(map(int, indices[start : start + CHUNK]))
            assert (labels[chunk] != ABSENT).all(), "a crop is not in the cache"
            yield [
                Crop(i, None, ABSENT, self._reasons.get(i, ""))
                if labels[i] == CORRUPT
                else Crop(i, data[i], int(labels[i]))
                for i in chunk
            ]

    def _untried(self, indices: Indices) -> NDArray[np.int64]:
        """What is not there, and what was found corrupt before this cache was opened."""
        wanted = np.asarray(indices, np.int64)
        labels = np.load(self.labels)[wanted]
        return wanted[(labels == ABSENT) | (labels == CORRUPT) & ~np.isin(wanted, list(self._reasons))]

    def _damaged(self) -> list[Path]:
        """Files that are cut off or no arrays, as a full disk or a broken copy leaves them."""
        found = []
        for path, shape in ((self.data, self.shape), (self.labels, self.shape[:1])):
            try:
                if path.is_file() and np.load(path, mmap_mode="r").shape != shape:
                    found.append(path)
            except (ValueError, EOFError):
                found.append(path)
        return found

    def _create(self) -> None:
        if not self.data.is_file():
            partial = self.data.with_suffix(".partial")
            np.lib.format.open_memmap(partial, "w+", np.uint8, self.shape).flush()  # sparse: no space is taken yet
            partial.replace(self.data)
            self.labels.unlink(missing_ok=True)
        if not self.labels.is_file():
            partial = self.labels.with_suffix(".partial")
            with partial.open("wb") as stream:
                np.save(stream, np.full(self.shape[0], ABSENT, np.int16))
            partial.replace(self.labels)

    def _decode(self, untried: NDArray[np.int64], workers: int | None) -> None:
        size = int(np.prod(self.shape[1:]))
        free = shutil.disk_usage(self.folder).free
        if len(untried) * size > free:
            raise OSError(None, f"{len(untried) * size / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")
        start = np.load(self.data, mmap_mode="r").offset
        labels = np.lib.format.open_memmap(self.labels, "r+")
        chunks = decode(self.pictures, untried.tolist(), self.preprocessing, workers)
        # Written, not mapped: a full disk is then an error, where a mapped file would end the process.
        with self.data.open("r+b") as stream:
            for chunk in track(chunks, "decoding", total=-(-len(untried) // CHUNK), unit="chunk"):
                for crop in chunk:
                    if crop.pixels is not None:
                        stream.seek(start + crop.index * size)
                        stream.write(crop.pixels.tobytes())
                stream.flush()
                os.fsync(stream.fileno())
                self._reasons |= {crop.index: crop.error for crop in chunk if crop.pixels is None}
                for crop in chunk:
                    labels[crop.index] = CORRUPT if crop.pixels is None else crop.label
                labels.flush()
