"""Files that hold no pictures, parquet of other columns, links that lead nowhere, a damaged cache."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bc.data import images
from bc.data.__main__ import main
from bc.data.images import test_batches as batches
from bc.errors import UserError
from bc.vision.transforms import Preprocessing

SMALL = Preprocessing(3, (16, 16), 0.9, "bicubic", (0.5,) * 3, (0.25,) * 3)
SYNSETS = ("n01440764", "n01443537")  # numbers 0 and 1


def picture(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((20, 20, 3), shade, np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k, synset in enumerate(SYNSETS):
        place = tmp_path / "imagenet" / "val" / synset
        place.mkdir(parents=True)
        for i in range(3):
            (place / f"{i}.JPEG").write_bytes(picture(90 * k + 20 * i))
    return tmp_path / "imagenet"


def pixels(root: Path, limit: int = 6) -> torch.Tensor:
    return torch.cat([x for x, _ in batches("imagenet", SMALL, limit=limit, paths={"imagenet": root}, workers=0)])


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "the file is empty"), (b"<html>not found</html>", "not a picture")]
)
def test_what_is_no_picture_is_called_so(
    folder: Path, content: bytes, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = folder / "val" / SYNSETS[0] / "1.JPEG"
    bad.write_bytes(content)
    assert len(pixels(folder)) == 5
    assert capsys.readouterr().err == f"data: {bad} cannot be decoded ({reason}); it is left out\n"


def test_a_link_that_leads_nowhere_is_one_line(folder: Path) -> None:
    link = folder / "val" / SYNSETS[0] / "1.JPEG"
    link.unlink()
    link.symlink_to(folder / "elsewhere.JPEG")
    with pytest.raises(UserError, match=r"^data\.paths\.imagenet: .*1\.JPEG' cannot be read \(No such file .*\); mend"):
        pixels(folder)


SPOILT: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "no array": lambda path: path.write_bytes(b"nonsense" * 100),
    "another array": lambda path: np.save(path, np.zeros(2, np.uint8)),
}


@pytest.mark.parametrize("ending", [".npy", ".labels.npy"])
@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_damaged_cache_is_made_again(
    folder: Path, cache: Path, ending: str, spoilt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = pixels(folder)
    (path,) = (p for p in cache.glob("*.npy") if p.name.endswith(".labels.npy") == (ending == ".labels.npy"))
    SPOILT[spoilt](path)
    capsys.readouterr()
    assert torch.equal(pixels(folder), before)
    assert f"data: warning: {path} is damaged; what it kept is decoded again\n" in capsys.readouterr().err
    assert torch.equal(pixels(folder), before)
    assert capsys.readouterr().err == ""


def write_shard(root: Path, columns: dict[str, Any]) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    root.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), root / "validation-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize(
    "columns",
    [
        {"jpg": [picture(3)], "cls": [3]},
        {"image": [picture(3)], "label": [3]},
        {"image": [{"path": "3.JPEG"}], "label": [3]},
        {"image": [{"bytes": picture(3)}], "label": ["tench"]},
    ],
)
def test_parquet_of_other_columns_is_one_line(tmp_path: Path, columns: dict[str, Any]) -> None:
    root = write_shard(tmp_path / "hub", columns)
    line = r"^data\.paths\.imagenet: .*00001\.parquet' has the columns .*; needed are image, a struct with bytes"
    with pytest.raises(UserError, match=line):
        batches("imagenet", SMALL, limit=1, paths={"imagenet": root})


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("label", [-1, 1000, None])
def test_a_label_that_is_no_class_is_one_line(tmp_path: Path, label: int | None, cached: bool) -> None:
    root = write_shard(tmp_path / "hub", {"image": [{"bytes": picture(k)} for k in (3, 9)], "label": [999, label]})
    test = batches("imagenet", SMALL, limit=2, paths={"imagenet": root}, workers=0, cache=cached)
    with pytest.raises(UserError, match=rf"row 1 of row group 0 has the label {label}; 0 to 999 are allowed"):
        list(test)


def test_imagenet_is_counted(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "train").symlink_to(folder / "val")
    assert main(["--imagenet", str(folder)]) == 2
    said = capsys.readouterr()
    draws = "the draws from them are not the published ones"
    assert said.out == f"train: 6 of 1,281,167 pictures; {draws}\nval: 6 of 50,000 pictures\n"
    assert said.err.startswith(
        "data.paths.imagenet: the validation set has 6 pictures, not 50,000; complete it, or set"
    )
    assert said.err.count("\n") == 1
    assert main(["--imagenet", str(folder), "--part"]) == 0
    monkeypatch.setattr(images, "IMAGENET_TEST", 6)
    monkeypatch.setattr(images, "IMAGENET_TRAIN", 6)
    capsys.readouterr()
    assert main(["--imagenet", str(folder)]) == 0
    assert capsys.readouterr() == ("train: 6 of 6 pictures\nval: 6 of 6 pictures\n", "")


def test_imagenet_and_the_hub_are_asked_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent() -> None:
        raise UserError("hub: it does not answer")

    monkeypatch.setattr("bc.data.__main__.check_hub", silent)
    (folder / "train").symlink_to(folder / "val")
    assert main(["--imagenet", str(folder), "--part", "--hub"]) == 2
    assert main(["--imagenet", str(folder), "--part"]) == 0
