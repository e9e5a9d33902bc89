"""Images by data set and role, as a model's evaluation transform gives them.

====================  ================================  ==============================  =========================
data set              calibration                       selection                       test
====================  ================================  ==============================  =========================
``imagenet``          train, the first of a seeded      train, the last of another      the 50,000 of validation
                      permutation                       permutation, none of those
``embedded_fashion``  the 5,000 training images kept    the same                        test[1000:3000]
                      in the package, likewise
====================  ================================  ==============================  =========================

Calibration images of a quantizer and images for Bias Compensation are both ``training_images``, each with its own
number and seed; selection images are told both draws and keep clear of them. A picture that cannot be decoded is
named in one line and left out: a draw takes the next of its permutation instead, a test counts it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bc.data import pictures
from bc.data.crops import Crop, CropCache, decode, say
from bc.data.pictures import Paths, Pictures
from bc.data.wheels import cache_dir
from bc.errors import UserError, unknown
from bc.vision.transforms import Preprocessing

DATASETS = ("imagenet", "embedded_fashion")
ROLES = ("calibration", "selection", "test")

IMAGENET_TRAIN, IMAGENET_TEST = 1_281_167, 50_000
#: Test images of Fashion-MNIST that are scored by default: the first, and how many.
FASHION_OFFSET, FASHION_LIMIT = 1000, 2000
#: Classes of each data set.
CLASSES = {"imagenet": 1000, "embedded_fashion": 10}
#: So many images after the last of a draw are kept out of selection too, for they replace corrupt ones.
SPARE = 64


@dataclass(frozen=True)
class Draw:
    """The training images of :func:`training_images` with this number and seed."""

    count: int
    seed: int


def check(dataset: str, role: str, paths: Paths | None = None) -> None:
    """Find out cheaply whether images can be had; nothing is listed or read.

    Args:
        dataset: One of :data:`DATASETS`.
        role: ``calibration``, ``selection`` or ``test``.
        paths: ``imagenet`` → root folder; see :mod:`bc.data.pictures`.

    Raises:
        UserError: The name or role is unknown, or the images are missing.
    """
    if dataset not in DATASETS:
        raise unknown("data: the data set", dataset, DATASETS)
    if role not in ROLES:
        raise unknown("data: the role", role, ROLES)
    if dataset == "imagenet":
        pictures.check("validation" if role == "test" else "train", paths)


def training_images(
    dataset: str,
    count: int,
    seed: int,
    preprocessing: Preprocessing,
    paths: Paths | None = None,
    *,
    workers: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Images to calibrate a quantizer or to fit biases on: the first of the seed's permutation.

    Args:
        dataset: One of :data:`DATASETS`.
        count: How many.
        seed: As ``numpy.random.seed`` takes it; fewer images at the same seed are the first of more.
        preprocessing: The model's evaluation transform (:func:`bc.vision.preprocessing`).
        paths: As for :func:`check`.
        workers: Processes that decode; None chooses.

    Returns:
        Images, float32, shape (count, channels, height, width), and labels, int64.

    Raises:
        UserError: A number is out of range, the images are missing, or there are too few.
    """
    _check_numbers("calibration", count, seed)
    check(dataset, "calibration", paths)
    collection = _training(dataset, paths)
    return _first(collection, pictures.draw(len(collection), seed), count, preprocessing, workers, "calibration")


def selection_images(
    dataset: str,
    count: int,
    seed: int,
    preprocessing: Preprocessing,
    beside: Sequence[Draw],
    paths: Paths | None = None,
    *,
    workers: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Training images to choose between settings on, or to measure errors on that biases were not fitted to.

    Args:
        dataset: One of :data:`DATASETS`.
        count: How many.
        seed: Chooses them.
        preprocessing: The model's evaluation transform.
        beside: All draws of training images in the same experiment; none of theirs is taken.
        paths: As for :func:`check`.
        workers: Processes that decode; None chooses.

    Returns:
        As :func:`training_images`.

    Raises:
        UserError: As :func:`training_images`.
    """
    _check_numbers("selection", count, seed)
    check(dataset, "selection", paths)
    collection = _training(dataset, paths)
    order = np.random.RandomState([seed, 1]).permutation(len(collection))[::-1]
    taken = [pictures.draw(len(collection), other.seed)[: other.count + SPARE] for other in beside]
    free = order[~np.isin(order, np.concatenate(taken))] if taken else order
    return _first(collection, free, count, preprocessing, workers, "selection")


class TestImages:
    """Test images in batches; every pass over it gives the same.

    Attributes:
        dataset: Name of the data set.
        limit: How many images were asked for; None is all.
        offset: How many were passed over before.
        left_out: Names of the pictures that could not be decoded, known after a pass.
    """

    __test__ = False  # not a test, whatever its name

    def __init__(
        self,
        dataset: str,
        collection: Pictures,
        indices: NDArray[np.int64],
        preprocessing: Preprocessing,
        batch_size: int,
        limit: int | None,
        offset: int,
        cache: CropCache | None,
        workers: int | None,
    ) -> None:
        self.dataset, self.limit, self.offset = dataset, limit, offset
        self.left_out: list[str] = []
        self._collection, self._indices, self._preprocessing = collection, indices, preprocessing
        self._batch_size, self._cache, self._workers = batch_size, cache, workers

    @property
    def count(self) -> int:
        """Images that are scored: those asked for, less those left out."""
        return len(self._indices) - len(self.left_out)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images, float32, and labels, int64."""
        told, self.left_out = set(self.left_out), []
        kept: list[Crop] = []
        seen = 0
        for crop in self._crops():
            if crop.pixels is None:
                name = self._collection.name(crop.index)
                if name not in told:
                    say(f"data: {name} cannot be decoded ({crop.error}); it is left out")
                self.left_out.append(name)
                continue
            kept.append(crop)
            seen += 1
            if len(kept) == self._batch_size:
                yield _batch(kept, self._preprocessing)
                kept = []
        if kept:
            yield _batch(kept, self._preprocessing)
        if seen != self.count:
            raise RuntimeError(f"{self.dataset}: {seen} test images were given out, not {self.count}")

    def _crops(self) -> Iterator[Crop]:
        if self._cache is not None:
            self._cache.fill(self._indices, self._workers)
            chunks = self._cache.read(self._indices)
        else:
            chunks = decode(self._collection, self._indices, self._preprocessing, self._workers)
        for chunk in chunks:
            yield from chunk


def test_batches(
    dataset: str,
    preprocessing: Preprocessing,
    batch_size: int = 64,
    *,
    limit: int | None = None,
    offset: int | None = None,
    paths: Paths | None = None,
    cache: bool = True,
    workers: int | None = None,
) -> TestImages:
    """Images to score on.

    Args:
        dataset: One of :data:`DATASETS`.
        preprocessing: The model's evaluation transform.
        batch_size: Images in a batch; the last may be smaller.
        limit: Only so many. Of ``imagenet`` they are drawn from all classes, the same for every model; None is all
            50,000. Of ``embedded_fashion`` they follow each other; None is 2,000.
        offset: Pass over so many before; None is 0, and 1,000 for ``embedded_fashion``.
        paths: As for :func:`check`.
        cache: Keep ImageNet's decoded crops in the cache folder (7.5 GB at 224 × 224, 22 GB at 384 × 384, for all).
        workers: Processes that decode; None chooses.

    Returns:
        An iterable of batches that knows what it left out.

    Raises:
        UserError: A number is out of range, the images are missing, or ImageNet's validation set is not whole and
            there is no limit.
    """
    if batch_size < 1:
        raise UserError(f"data.batch_size: {batch_size} is not positive; set it to 1 or more")
    for name, value, least in (("limit", limit, 1), ("offset", offset, 0)):
        if value is not None and value < least:
            raise UserError(f"data.evaluation.{name}: {value} is too small; set it to {least} or more")
    check(dataset, "test", paths)
    if dataset == "embedded_fashion":
        collection: Pictures = pictures.Fashion("test")
        start, number = FASHION_OFFSET if offset is None else offset, FASHION_LIMIT if limit is None else limit
        order, kept = np.arange(len(collection)), None
    else:
        collection = pictures.imagenet("validation", paths)
        start, number = offset or 0, len(collection) - (offset or 0) if limit is None else limit
        if limit is None and len(collection) != IMAGENET_TEST:
            raise UserError(
                f"data: the validation set has {len(collection)} images, not {IMAGENET_TEST}; complete it, or set "
                "data.evaluation.limit for a partial run"
            )
        partial = limit is not None or start
        order = pictures.draw(len(collection), 0) if partial else np.arange(len(collection))
        kept = CropCache(cache_folder(), "imagenet-validation", collection, preprocessing) if cache else None
    if start + number > len(collection) or number < 1:
        raise UserError(
            f"data.evaluation.limit: images {start} to {start + number} asked for, {dataset} has {len(collection)}; "
            "lower data.evaluation.limit or data.evaluation.offset"
        )
    indices = np.sort(order[start : start + number])
    if dataset == "embedded_fashion":
        limit = number
    return TestImages(dataset, collection, indices, preprocessing, batch_size, limit, start, kept, workers)


def asked_for(dataset: str, limit: int | None = None, offset: int | None = None) -> int:
    """How many test images :func:`test_batches` gives out where none is corrupt."""
    if limit is not None:
        return limit
    return FASHION_LIMIT if dataset == "embedded_fashion" else IMAGENET_TEST - (offset or 0)


test_batches.__test__ = False  # type: ignore[attr-defined]  # the name is not that of a test


def cache_folder() -> Path:
    """Where decoded test images are kept."""
    return cache_dir() / "images"


def _check_numbers(role: str, count: int, seed: int) -> None:
    if count < 1:
        raise UserError(f"data: {count} {role} images are not enough; set 1 or more")
    if not 0 <= seed < 2**32:
        raise UserError(f"data: the seed {seed} of the {role} images is out of range; set it between 0 and 2^32 - 1")


def _training(dataset: str, paths: Paths | None) -> Pictures:
    if dataset == "embedded_fashion":
        return pictures.Fashion("train")
    collection = pictures.imagenet("train", paths)
    if len(collection) != IMAGENET_TRAIN:
        say(
            f"data: the training set has {len(collection)} images, not {IMAGENET_TRAIN}: the draws from it are not the "
            "published ones"
        )
    return collection


def _first(
    collection: Pictures,
    order: NDArray[np.int64],
    count: int,
    preprocessing: Preprocessing,
    workers: int | None,
    role: str,
) -> tuple[Tensor, Tensor]:
    """The first pictures of an order that can be decoded."""
    kept: list[Crop] = []
    position = 0
    while len(kept) < count and position < len(order):
        wanted = order[position : position + count - len(kept)]
        position += len(wanted)
        for chunk in decode(collection, wanted, preprocessing, workers):
            for crop in chunk:
                if crop.pixels is not None:
                    kept.append(crop)
                else:
                    name = collection.name(crop.index)
                    say(f"data: {name} cannot be decoded ({crop.error}); the next of the draw takes its place")
    if len(kept) < count:
        raise UserError(f"data: {count} {role} images were asked for, and there are {len(kept)}; ask for fewer")
    return _batch(kept, preprocessing)


def _batch(crops: list[Crop], preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    pixels = np.stack([crop.pixels for crop in crops if crop.pixels is not None])
    return preprocessing.normalize(torch.from_numpy(pixels)), torch.tensor([crop.label for crop in crops])
