"""Where pictures come from: ImageNet-1k in folders or in the hub's parquet files, and Fashion-MNIST.

ImageNet's root is the setting ``paths.imagenet`` or the environment variable ``BC_IMAGENET``. It holds, itself or in
``ILSVRC/Data/CLS-LOC``,

* ``train/SYNSET/*.JPEG`` and ``val/SYNSET/*.JPEG``; or a flat ``val/*.JPEG`` with ``LOC_val_solution.csv`` in the root;
* or ``train-*.parquet`` and ``validation-*.parquet``, in itself or in ``data``, with columns ``image`` (bytes, path)
  and ``label``.

Training pictures are ordered as torchvision's ``ImageFolder`` orders them, by synset and file name, so that a
permutation of their numbers means the same pictures here and there; parquet files have the hub's order, which differs.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from bisect import bisect_right
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from bc.data import fashion
from bc.errors import UserError

Paths = Mapping[str, str | Path | None]

VARIABLE = "BC_IMAGENET"
EXAMPLE = (
    "a folder with train/ and val/ (a subfolder per synset) or with the hub's train-*.parquet and validation-*.parquet"
)
SPLITS = {"train": ("train",), "validation": ("val", "validation")}
INSIDE = ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
SOLUTION = "LOC_val_solution.csv"
CLASSES = 1000
ENDINGS = (".jpeg", ".jpg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class Pictures(Protocol):
    """A numbered collection of labelled pictures."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call a picture in a message."""
        ...

    def fetch(self, index: int) -> tuple[Image.Image, int]:
        """A picture, perhaps not yet decoded, and its label."""
        ...

    def fingerprint(self) -> str:
        """Changes when the collection does."""
        ...


class Fashion:
    """Fashion-MNIST as kept in the package."""

    def __init__(self, split: str) -> None:
        self.split = split
        self.images, self.labels = fashion.load(split)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """What to call a picture in a message."""
        return f"Fashion-MNIST {self.split}[{index}]"

    def fetch(self, index: int) -> tuple[Image.Image, int]:
        """A picture and its label."""
        return Image.fromarray(self.images[index]), int(self.labels[index])

    def fingerprint(self) -> str:
        """Changes when the collection does."""
        return hashlib.sha256(self.images.tobytes()).hexdigest()


class Files:
    """Pictures in files.

    Args:
        root: The folder that the files' names are relative to.
        files: Name relative to the root, label.
    """

    def __init__(self, root: Path, files: list[tuple[str, int]]) -> None:
        self.root, self.files = root, files

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """What to call a picture in a message."""
        return str(self.root / self.files[index][0])

    def fetch(self, index: int) -> tuple[Image.Image, int]:
        """A picture, not yet decoded, and its label."""
        name, label = self.files[index]
        return _opened((self.root / name).read_bytes()), label

    def fingerprint(self) -> str:
        """From names, sizes and labels.

        Raises:
            UserError: A file is not there: a link leads nowhere.
        """
        try:
            facts = [f"{name}:{(self.root / name).stat().st_size}:{label}\n" for name, label in self.files]
        except OSError as error:
            raise UserError(
                f"data.paths.imagenet: {str(error.filename)!r} cannot be read ({error.strerror}); mend the link or put "
                "the file back"
            ) from error
        return hashlib.sha256("".join(facts).encode()).hexdigest()


class Parquet:
    """Pictures in the hub's parquet files; a row group is read at once and kept until another is wanted.

    Args:
        shards: The files, in order.

    Raises:
        UserError: One is unreadable, or has not the columns ``image`` and ``label``.
    """

    def __init__(self, shards: list[Path]) -> None:
        from pyarrow import parquet

        self.shards = shards
        #: First row of each row group in the whole collection, and where it is.
        self.starts: list[int] = []
        self.groups: list[tuple[int, int]] = []
        self.rows = 0
        for number, shard in enumerate(shards):
            try:
                metadata = parquet.read_metadata(shard)
                schema = metadata.schema.to_arrow_schema()
            except (OSError, ValueError) as error:
                raise _unreadable(shard, error) from error
            _check_columns(shard, schema)
            for group in range(metadata.num_row_groups):
                self.starts.append(self.rows)
                self.groups.append((number, group))
                self.rows += metadata.row_group(group).num_rows
        self._kept: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self.rows

    def name(self, index: int) -> str:
        """What to call a picture in a message."""
        number = bisect_right(self.starts, index) - 1
        shard, group = self.groups[number]
        return f"{self.shards[shard]}, row {index - self.starts[number]} of row group {group}"

    def fetch(self, index: int) -> tuple[Image.Image, int]:
        """A picture, not yet decoded, and its label.

        Raises:
            UserError: The label is no class of ImageNet-1k.
        """
        number = bisect_right(self.starts, index) - 1
        row = self._table(number).slice(index - self.starts[number], 1).to_pylist()[0]
        if row["label"] not in range(CLASSES):
            raise UserError(
                f"data.paths.imagenet: {self.name(index)} has the label {row['label']}; 0 to {CLASSES - 1} are "
                "allowed: give files of a split with labels"
            )
        content = row["image"]["bytes"] if row["image"] else None
        if not content:
            raise ValueError("the row has no picture")
        return _opened(content), int(row["label"])

    def fingerprint(self) -> str:
        """From the files' names and sizes."""
        facts = (f"{shard.name}:{shard.stat().st_size}\n" for shard in self.shards)
        return hashlib.sha256("".join(facts).encode()).hexdigest()

    def _table(self, number: int) -> Any:
        if self._kept[0] != number:
            from pyarrow import parquet

            shard, group = self.groups[number]
            try:
                table = parquet.ParquetFile(self.shards[shard]).read_row_group(group, columns=["image", "label"])
            except (OSError, ValueError) as error:
                raise _unreadable(self.shards[shard], error) from error
            self._kept = (number, table)
        return self._kept[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": (-1, None)}


def _opened(content: bytes) -> Image.Image:
    """A picture, not yet decoded; PIL's own error would name an address in memory."""
    if not content:
        raise ValueError("the file is empty")
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError as error:
        raise ValueError("not a picture") from error


def _check_columns(shard: Path, schema: Any) -> None:
    from pyarrow import types

    image, label = (schema.field(name).type if name in schema.names else None for name in ("image", "label"))
    held = image is not None and types.is_struct(image) and image.get_field_index("bytes") >= 0
    if not held or label is None or not types.is_integer(label):
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise UserError(
            f"data.paths.imagenet: {str(shard)!r} has the columns {found}; needed are image, a struct with bytes, and "
            "label, an integer: give the files of ILSVRC/imagenet-1k"
        )


def _unreadable(shard: Path, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"data.paths.imagenet: {str(shard)!r} cannot be read ({reason}); fetch the file again")


def check(split: str, paths: Paths | None) -> None:
    """Complain if ImageNet is not configured or has no such split, without listing its files.

    Raises:
        UserError: Naming what to set.
    """
    _layout(split, paths)


def imagenet(split: str, paths: Paths | None) -> Pictures:
    """A split of ImageNet-1k.

    Args:
        split: ``train`` or ``validation``.
        paths: ``imagenet`` → root; see the module.

    Raises:
        UserError: As :func:`check`, or a folder is not a synset of ImageNet-1k.
    """
    base, folder, shards = _layout(split, paths)
    if folder is None:
        return Parquet(shards)
    synsets = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not synsets:
        return _flat(base, folder)
    numbers = _numbers()
    strangers = [name for name in synsets if name not in numbers]
    if strangers:
        raise UserError(
            f"data.paths.imagenet: {str(folder / strangers[0])!r} is not named after a synset of ImageNet-1k "
            f"({len(strangers)} such folders); give {EXAMPLE}"
        )
    found = [(f"{synset}/{file}", numbers[synset]) for synset in synsets for file in _pictures_in(folder / synset)]
    return _some(Files(folder, found), folder)


def _flat(base: Path, folder: Path) -> Pictures:
    numbers = _numbers()
    solution, labels = _solution(base, folder), {}
    with solution.open(encoding="utf8", newline="") as stream:
        reader = csv.DictReader(stream)
        try:
            for row in reader:
                labels[row["ImageId"]] = numbers[row["PredictionString"].split()[0]]
        except (KeyError, IndexError, AttributeError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(
                f"data.paths.imagenet: {str(solution)!r}, line {reader.line_num}: the columns ImageId,PredictionString "
                "with a synset of ImageNet-1k first in the second are needed; fetch the file again"
            ) from error
    names = _pictures_in(folder)
    missing = [name for name in names if Path(name).stem not in labels]
    if missing:
        raise UserError(f"data.paths.imagenet: {SOLUTION} has no label of {missing[0]!r}; replace it")
    return _some(Files(folder, [(name, labels[Path(name).stem]) for name in names]), folder)


def _some(files: Files, folder: Path) -> Pictures:
    if not len(files):
        raise UserError(f"data.paths.imagenet: no pictures in {str(folder)!r}; give {EXAMPLE}")
    return files


def _pictures_in(folder: Path) -> list[str]:
    names = (entry.name for entry in os.scandir(folder))
    return sorted(name for name in names if name.lower().endswith(ENDINGS) and not name.startswith("."))


def _solution(base: Path, folder: Path) -> Path:
    for place in (base, folder.parent, folder):
        if (place / SOLUTION).is_file():
            return place / SOLUTION
    raise UserError(
        f"data.paths.imagenet: {str(folder)!r} has no subfolders named after synsets; put {SOLUTION} into "
        f"{str(base)!r}, or give {EXAMPLE}"
    )


def _layout(split: str, paths: Paths | None) -> tuple[Path, Path | None, list[Path]]:
    """(root, folder of the split or None, parquet files of the split)."""
    given = (paths or {}).get("imagenet")
    setting = "data.paths.imagenet" if given else VARIABLE
    given = given or os.environ.get(VARIABLE)
    if not given:
        raise UserError(f"data.paths.imagenet: ImageNet-1k is not configured; set {VARIABLE} to {EXAMPLE}")
    root = Path(given).expanduser()
    if not root.is_dir():
        raise UserError(f"{setting}: no folder at {str(root)!r}; give {EXAMPLE}")
    for name in SPLITS[split]:
        for inside in INSIDE:
            folder = root / inside / name
            if folder.is_dir():
                if not any(entry.is_dir() for entry in os.scandir(folder)):
                    _solution(root, folder)
                return root, folder, []
        for folder in (root, root / "data"):
            shards = sorted(folder.glob(f"{name}-*.parquet"))
            if shards:
                return root, None, shards
    raise UserError(f"{setting}: no {split} split of ImageNet-1k in {str(root)!r}; give {EXAMPLE}")


@cache
def _numbers() -> dict[str, int]:
    """Synset → class number, as all models of timm have it."""
    from timm.data import ImageNetInfo

    return {name: number for number, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def draw(count: int, seed: int) -> np.ndarray:
    """A permutation of ``range(count)``, as ``numpy.random.seed(seed); numpy.random.permutation(count)`` gives it."""
    return np.random.RandomState(seed).permutation(count)
