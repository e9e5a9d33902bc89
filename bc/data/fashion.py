"""Fashion-MNIST, kept in the package: the test images and the first 5,000 training images, 28 × 28 grey.

Published by Zalando SE under the MIT licence, which lies beside the files. A folder with the four published ``.gz``
files (torchvision's ``FashionMNIST/raw``, or the Debian package ``dataset-fashion-mnist``) gives all 60,000 training
images; only the training script of the tiny models asks for it.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bc.errors import UserError, unknown

ASSETS = Path(__file__).parent / "assets" / "fashion_mnist"
CLASSES = 10
#: Mean and standard deviation of the training images' pixels.
MEAN, STD = 0.2860, 0.3530
#: Split → (file prefix in the package, file prefix as published).
FILES = {"train": ("train5k", "train"), "test": ("t10k", "t10k")}
CHECKSUMS = {
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    "train5k-images-idx3-ubyte.gz": "30ed3a9237dc530b05e44b2583b5c9cff4f6b4dacd387a02c5dab2522eaf8772",
    "train5k-labels-idx1-ubyte.gz": "a90110cbe81cb027ef2d471c19409bd0db3a77f5c4195d756f52f38dd3cb9201",
}

Images = tuple[NDArray[np.uint8], NDArray[np.int64]]


def load(split: str, folder: str | Path | None = None) -> Images:
    """Images and labels of a split.

    Args:
        split: ``train`` (5,000 images without a folder, 60,000 with one) or ``test`` (10,000).
        folder: A folder with the four files as they were published.

    Returns:
        Images, uint8, shape (n, 28, 28), and labels 0 … 9, int64.

    Raises:
        UserError: The split is unknown, or a file is absent or damaged.
    """
    if split not in FILES:
        raise unknown("fashion: the split", split, FILES)
    where = ASSETS if folder is None else Path(folder).expanduser()
    prefix = FILES[split][folder is not None]
    images = _read(where / f"{prefix}-images-idx3-ubyte.gz", 3)
    labels = _read(where / f"{prefix}-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels):
        raise UserError(f"fashion: {len(images)} images but {len(labels)} labels in {str(where)!r}; replace the files")
    return images, labels.astype(np.int64)


def _read(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """An array in the IDX format: two zero bytes, the type (8: uint8), the number of dimensions, their sizes."""
    try:
        packed = path.read_bytes()
        if path.parent == ASSETS and hashlib.sha256(packed).hexdigest() != CHECKSUMS[path.name]:
            raise UserError(f"fashion: {str(path)!r} is not the published file; install the package again")
        content = gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"fashion: {str(path)!r} cannot be read ({error}); give a folder with the four published .gz files"
        ) from error
    start = 4 + 4 * dimensions
    shape = np.frombuffer(content, ">i4", dimensions, offset=4) if len(content) >= start else np.zeros(1, int)
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) != start + int(np.prod(shape)):
        raise UserError(f"fashion: {str(path)!r} is not an IDX file of {dimensions} dimensions; replace the file")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
