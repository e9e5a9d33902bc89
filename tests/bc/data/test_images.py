"""Images from folders and parquet files as people have them, damaged ones among them; draws; the cache; the default."""

from __future__ import annotations

import errno
import io
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bc.data import fashion, images, pictures
from bc.data.crops import CropCache, decode
from bc.data.images import Draw, check, selection_images, training_images
from bc.data.images import test_batches as batches
from bc.errors import UserError
from bc.vision.transforms import Preprocessing

SYNSETS = ["n01440764", "n01443537", "n02123045", "n15075141"]  # numbers 0, 1, 281, 999
NUMBERS = [0, 1, 281, 999]
SMALL = Preprocessing(3, (16, 16), 0.9, "bicubic", (0.5,) * 3, (0.25,) * 3)
GREY = Preprocessing(1, (28, 28), 1.0, "bicubic", (0.286,), (0.353,))


def picture(mode: str, width: int, height: int, shade: int) -> bytes:
    noise = np.random.RandomState(shade).randint(0, 256, (height, width, len(Image.new(mode, (1, 1)).getbands())))
    array = noise.astype(np.uint8).squeeze(-1) if mode == "L" else noise.astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(array, mode).save(stream, "JPEG")
    return stream.getvalue()


def collection(per_synset: int = 6) -> dict[str, list[bytes]]:
    """Pictures of odd sizes, grey and CMYK among them, by synset."""
    modes = ["RGB", "L", "CMYK"]
    sizes = [(33, 47), (300, 20), (17, 19), (64, 64), (5, 90), (1, 1)]
    return {
        synset: [picture(modes[i % 3], *sizes[(i + k) % len(sizes)], shade=10 * k + i) for i in range(per_synset)]
        for k, synset in enumerate(SYNSETS)
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for synset, contents in collection().items():
            place = tmp_path / "imagenet" / split / synset
            place.mkdir(parents=True)
            for i, content in enumerate(contents):
                (place / f"{synset}_{i}.JPEG").write_bytes(content)
            (place / "notes.txt").write_text("not a picture")
    return tmp_path / "imagenet"


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """As the hub has it: rows of all classes mixed, several files, several row groups."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [(content, NUMBERS[k]) for k, contents in enumerate(collection().values()) for content in contents]
    random.Random(0).shuffle(rows)
    root = tmp_path / "hub"
    (root / "data").mkdir(parents=True)
    for name in ("train", "validation"):
        for shard, part in enumerate((rows[:10], rows[10:])):
            table = pa.table(
                {
                    "image": [{"bytes": content, "path": f"{i}.JPEG"} for i, (content, _) in enumerate(part)],
                    "label": [label for _, label in part],
                }
            )
            parquet.write_table(table, root / "data" / f"{name}-0000{shard}-of-00002.parquet", row_group_size=4)
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BC_IMAGENET", raising=False)


def everything(test: images.TestImages) -> tuple[torch.Tensor, torch.Tensor]:
    parts = list(test)
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("layout", ["folder", "hub_folder"])
def test_every_picture_is_given_out(layout: str, cache: bool, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(layout)
    test = batches("imagenet", SMALL, 5, limit=24, paths={"imagenet": root}, cache=cache, workers=0)
    x, y = everything(test)
    assert x.shape == (24, 3, 16, 16)
    assert x.dtype == torch.float32
    assert torch.isfinite(x).all()
    assert sorted(y.tolist()) == sorted(NUMBERS * 6)
    assert (test.count, test.left_out, test.limit) == (24, [], 24)


def test_both_layouts_give_the_same_pictures(folder: Path, hub_folder: Path) -> None:
    found = []
    for root in (folder, hub_folder):
        x, y = everything(batches("imagenet", SMALL, limit=24, paths={"imagenet": root}, workers=0))
        found.append({(label, image.numpy().tobytes()) for label, image in zip(y.tolist(), x, strict=True)})
    assert found[0] == found[1]
    assert len(found[0]) == 24


def test_pixels_equal_timms_transform(folder: Path) -> None:
    from timm.data import create_transform

    whole = create_transform(
        (3, 16, 16), interpolation="bicubic", crop_pct=0.9, mean=SMALL.mean, std=SMALL.std, crop_mode="center"
    )
    files = sorted((folder / "val").rglob("*.JPEG"))
    expected = torch.stack([whole(Image.open(file).convert("RGB")) for file in files])
    x, _ = everything(batches("imagenet", SMALL, limit=24, paths={"imagenet": folder}, workers=0))
    assert torch.equal(x, expected)


@pytest.mark.parametrize("cache", [True, False])
def test_a_corrupt_picture_is_named_and_nothing_else_is_lost(
    folder: Path, cache: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = folder / "val" / SYNSETS[1] / f"{SYNSETS[1]}_3.JPEG"
    bad.write_bytes(bad.read_bytes()[:200])
    empty = folder / "val" / SYNSETS[2] / f"{SYNSETS[2]}_0.JPEG"
    empty.write_bytes(b"")
    test = batches("imagenet", SMALL, 5, limit=24, paths={"imagenet": folder}, cache=cache, workers=0)
    _, y = everything(test)
    assert test.left_out == [str(bad), str(empty)]
    assert test.count == len(y) == 22
    assert sorted(y.tolist()) == sorted([0] * 6 + [1] * 5 + [281] * 5 + [999] * 6)
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if str(bad) in line] == [line for line in told if "_3.JPEG" in line] != []
    assert len(told) == 2
    everything(test)
    assert capsys.readouterr().err == "", "the same line twice"


def test_the_reason_is_said_every_time_and_a_mended_picture_is_taken(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = folder / "val" / SYNSETS[1] / f"{SYNSETS[1]}_3.JPEG"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:200] + bytes(len(whole) - 200))  # as long as before: the collection is the same

    def run() -> images.TestImages:
        test = batches("imagenet", SMALL, 5, limit=24, paths={"imagenet": folder}, workers=0)
        everything(test)
        return test

    for _ in range(2):
        assert run().left_out == [str(bad)]
        told = capsys.readouterr().err
        assert f"{bad} cannot be decoded (" in told
        assert "as noted" not in told and "()" not in told
    bad.write_bytes(whole)
    assert run().left_out == []
    assert len(list((Path(os.environ["BC_CACHE"]) / "images").glob("*.labels.npy"))) == 1
    uncached = batches("imagenet", SMALL, 5, limit=24, paths={"imagenet": folder}, workers=0, cache=False)
    cached = batches("imagenet", SMALL, 5, limit=24, paths={"imagenet": folder}, workers=0)
    assert torch.equal(everything(cached)[0], everything(uncached)[0])
    assert capsys.readouterr().err == ""


class Refusing(pictures.Files):
    """A disk or a machine with a passing trouble at one picture."""

    trouble: Exception = OSError(errno.ESTALE, "Stale file handle")

    def fetch(self, index: int) -> tuple[Image.Image, int]:
        if index == 9:
            raise self.trouble
        return super().fetch(index)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(
    ("trouble", "line"),
    [
        (
            OSError(errno.ESTALE, "Stale file handle"),
            "data: {} cannot be read (Stale file handle); see that its folder",
        ),
        (MemoryError(), "data: no memory to decode {}; lower data.workers"),
    ],
    ids=["stale", "memory"],
)
def test_a_passing_trouble_is_one_line_and_no_corrupt_picture(
    folder: Path, trouble: Exception, line: str, cache: bool, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[torch.Tensor, torch.Tensor]:
        given = {"paths": {"imagenet": folder}, "cache": cache, "workers": workers}
        return everything(batches("imagenet", SMALL, 5, limit=24, **given))  # type: ignore[arg-type]

    bad = sorted((folder / "val").rglob("*.JPEG"))[9]
    with monkeypatch.context() as patch:
        patch.setattr(Refusing, "trouble", trouble)
        patch.setattr(pictures, "Files", Refusing)
        with pytest.raises(UserError) as raised:
            run()
    assert str(raised.value).startswith(line.format(bad))
    assert "\n" not in str(raised.value)
    assert len(run()[1]) == 24


def test_a_corrupt_training_picture_is_replaced_by_the_next_of_the_draw(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = np.random.RandomState(3).permutation(24)
    files = sorted((folder / "train").rglob("*.JPEG"))
    paths = {"imagenet": folder}
    before, _ = training_images("imagenet", 9, 3, SMALL, paths, workers=0)
    files[order[2]].write_bytes(b"no JPEG")
    after, labels = training_images("imagenet", 8, 3, SMALL, paths, workers=0)
    assert torch.equal(after, before[[0, 1, 3, 4, 5, 6, 7, 8]])
    assert len(labels) == 8
    assert str(files[order[2]]) in capsys.readouterr().err


def test_the_draw_is_the_published_one(folder: Path) -> None:
    np.random.seed(3)
    inds = np.random.permutation(24)[:5]
    files = sorted((folder / "train").rglob("*.JPEG"))
    crop = SMALL.cropper()
    expected = SMALL.normalize(torch.stack([torch.from_numpy(crop(Image.open(files[i]))) for i in inds]))
    x, y = training_images("imagenet", 5, 3, SMALL, {"imagenet": folder}, workers=0)
    assert torch.equal(x, expected)
    assert y.tolist() == [NUMBERS[i // 6] for i in inds]
    more, _ = training_images("imagenet", 9, 3, SMALL, {"imagenet": folder}, workers=0)
    assert torch.equal(more[:5], x)


def test_selection_keeps_clear_of_all_draws() -> None:
    draws = [Draw(32, 3), Draw(1024, 0), Draw(1024, 1993)]
    taken = [training_images("embedded_fashion", draw.count, draw.seed, GREY)[0] for draw in draws]
    selected, labels = selection_images("embedded_fashion", 512, 0, GREY, draws)
    assert len(labels) == len(selected) == 512
    known = {image.numpy().tobytes() for images in taken for image in images}
    assert not any(image.numpy().tobytes() in known for image in selected)
    again, _ = selection_images("embedded_fashion", 512, 0, GREY, draws)
    assert torch.equal(again, selected)
    other, _ = selection_images("embedded_fashion", 512, 1, GREY, draws)
    assert not torch.equal(other, selected)


def test_workers_give_the_same_in_the_same_order(hub_folder: Path) -> None:
    source = pictures.imagenet("validation", {"imagenet": hub_folder})
    indices = np.random.RandomState(0).randint(0, 24, 200)
    found = [
        [
            (crop.index, crop.label, crop.pixels.tobytes())
            for chunk in decode(source, indices, SMALL, n)
            for crop in chunk
        ]
        for n in (0, 2)
    ]
    assert found[0] == found[1]
    assert [index for index, _, _ in found[0]] == indices.tolist()


def test_without_a_limit_the_count_is_asserted(folder: Path) -> None:
    with pytest.raises(UserError, match=r"has 24 images, not 50000; complete it, or set data\.evaluation\.limit"):
        batches("imagenet", SMALL, paths={"imagenet": folder})
    with pytest.raises(UserError, match=r"data\.evaluation\.limit.*has 24"):
        batches("imagenet", SMALL, limit=25, paths={"imagenet": folder})


def test_a_limit_is_drawn_from_all_classes_and_is_the_same_each_time(folder: Path) -> None:
    found = [everything(batches("imagenet", SMALL, limit=12, paths={"imagenet": folder}, workers=0)) for _ in range(2)]
    assert torch.equal(found[0][0], found[1][0])
    assert len(set(found[0][1].tolist())) == 4


def test_the_cache_is_filled_once_and_goes_on_after_a_kill(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    decoded: list[int] = []
    fetch = pictures.Files.fetch

    def counting(self: pictures.Files, index: int) -> tuple[Image.Image, int]:
        if len(decoded) == 10:
            raise KeyboardInterrupt
        decoded.append(index)
        return fetch(self, index)

    monkeypatch.setattr(pictures.Files, "fetch", counting)
    monkeypatch.setattr("bc.data.crops.CHUNK", 4)

    def run() -> torch.Tensor:
        return everything(batches("imagenet", SMALL, limit=24, paths={"imagenet": folder}, workers=0))[0]

    with pytest.raises(KeyboardInterrupt):
        run()
    assert decoded == list(range(10))
    decoded.clear()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert decoded == list(range(8, 18)), "two chunks of four were on disk"
    decoded.clear()
    x = run()
    assert decoded == list(range(16, 24))
    decoded.clear()
    assert torch.equal(run(), x)
    assert decoded == []
    monkeypatch.setattr(pictures.Files, "fetch", fetch)
    uncached, _ = everything(batches("imagenet", SMALL, limit=24, paths={"imagenet": folder}, cache=False, workers=0))
    assert torch.equal(uncached, x)
    assert not list((tmp_path / "cache" / "images").glob("*.partial"))


def test_the_cache_is_another_for_other_sizes_and_other_pictures(folder: Path, tmp_path: Path) -> None:
    def names(preprocessing: Preprocessing) -> Path:
        source = pictures.imagenet("validation", {"imagenet": folder})
        return CropCache(tmp_path, "imagenet-validation", source, preprocessing).data

    first = names(SMALL)
    assert "16x16" in first.name
    assert names(Preprocessing(3, (16, 16), 0.9, "bicubic", (0.1,) * 3, (0.2,) * 3)) == first
    assert names(Preprocessing(3, (24, 24), 0.9, "bicubic", (0.5,) * 3, (0.25,) * 3)) != first
    (folder / "val" / SYNSETS[0] / "another.JPEG").write_bytes(picture("RGB", 9, 9, 1))
    assert names(SMALL) != first


def test_a_full_disk_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bc.data.crops.shutil.disk_usage", lambda _path: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match=r"BC_CACHE.*are needed.*data\.cache=false"):
        everything(batches("imagenet", SMALL, limit=24, paths={"imagenet": folder}, workers=0))


def flatten(root: Path, solution: bool) -> None:
    rows = ["ImageId,PredictionString"]
    for file in sorted((root / "val").rglob("*.JPEG")):
        rows.append(f"{file.stem},{file.parent.name} 1 2 3 4 ")
        file.rename(root / "val" / file.name)
    for synset in SYNSETS:
        (root / "val" / synset / "notes.txt").unlink()
        (root / "val" / synset).rmdir()
    if solution:
        (root / "LOC_val_solution.csv").write_text("\n".join(rows))


def test_flat_validation_folder(folder: Path) -> None:
    flatten(folder, solution=True)
    _, y = everything(batches("imagenet", SMALL, limit=24, paths={"imagenet": folder}, workers=0))
    assert sorted(y.tolist()) == sorted(NUMBERS * 6)


@pytest.mark.parametrize(
    "spoiled",
    [
        "Id,Label\nval_1,n01440764",
        "ImageId,PredictionString\nval_1,",
        "ImageId,PredictionString\nval_1",
        "ImageId,PredictionString\nval_1,tench 1 2 3 4",
    ],
)
def test_a_malformed_solution_is_one_line_with_its_columns(folder: Path, spoiled: str) -> None:
    flatten(folder, solution=True)
    (folder / "LOC_val_solution.csv").write_text(spoiled)
    with pytest.raises(UserError, match=r"LOC_val_solution\.csv', line 2: the columns ImageId,PredictionString"):
        batches("imagenet", SMALL, limit=24, paths={"imagenet": folder}, workers=0)


def mistakes() -> dict[str, tuple[Callable[[Path], None], str]]:
    return {
        "no val": (lambda root: (root / "val").rename(root / "elsewhere"), "no validation split"),
        "no solution": (lambda root: flatten(root, solution=False), "LOC_val_solution.csv"),
    }


@pytest.mark.parametrize("mistake", ["no val", "no solution"])
def test_mistakes_in_the_folder_are_found_early(mistake: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BC_IMAGENET", str(folder))
    for role in images.ROLES:
        check("imagenet", role)
    spoil, message = mistakes()[mistake]
    spoil(folder)
    with pytest.raises(UserError, match=message):
        check("imagenet", "test")
    check("imagenet", "calibration")


def test_a_folder_that_is_no_synset_is_named(folder: Path) -> None:
    (folder / "val" / SYNSETS[0]).rename(folder / "val" / "tench")
    with pytest.raises(UserError, match="tench"):
        batches("imagenet", SMALL, limit=1, paths={"imagenet": folder})


def test_names_and_numbers_are_checked(tmp_path: Path) -> None:
    check("embedded_fashion", "test")
    with pytest.raises(UserError, match="did you mean 'imagenet'"):
        check("imagenett", "test")
    with pytest.raises(UserError, match="allowed: calibration, selection, test"):
        check("imagenet", "training")
    with pytest.raises(UserError, match="BC_IMAGENET to a folder with train/"):
        check("imagenet", "test")
    with pytest.raises(UserError, match="no folder at"):
        check("imagenet", "test", {"imagenet": tmp_path / "absent"})
    with pytest.raises(UserError, match="set 1 or more"):
        training_images("embedded_fashion", 0, 0, GREY)
    with pytest.raises(UserError, match="seed"):
        training_images("embedded_fashion", 1, -1, GREY)
    with pytest.raises(UserError, match="5001 calibration images were asked for, and there are 5000"):
        training_images("embedded_fashion", 5001, 0, GREY)
    with pytest.raises(UserError, match=r"data\.evaluation\.limit"):
        batches("embedded_fashion", GREY, limit=0)
    with pytest.raises(UserError, match=r"data\.evaluation\.offset"):
        batches("embedded_fashion", GREY, offset=-1)
    with pytest.raises(UserError, match=r"data\.batch_size"):
        batches("embedded_fashion", GREY, 0)


def test_embedded_images_are_the_published_ones_in_order() -> None:
    test = batches("embedded_fashion", GREY, 300)
    x, y = everything(test)
    raw, labels = fashion.load("test")
    assert (test.limit, test.offset, test.count) == (2000, 1000, 2000)
    assert torch.equal(x, GREY.normalize(torch.from_numpy(raw[1000:3000].copy())[:, None]))
    assert torch.equal(y, torch.from_numpy(labels[1000:3000].copy()))
    few = batches("embedded_fashion", GREY, limit=7, offset=0)
    assert torch.equal(everything(few)[1], torch.from_numpy(labels[:7].copy()))
    training, _ = fashion.load("train")
    assert training.shape == (5000, 28, 28)


def test_damaged_fashion_files_are_named(tmp_path: Path) -> None:
    for file in fashion.ASSETS.glob("t10k-*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert len(fashion.load("test", tmp_path)[0]) == 10_000
    with pytest.raises(UserError, match="train-images-idx3"):
        fashion.load("train", tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(UserError, match="t10k-labels"):
        fashion.load("test", tmp_path)
    with pytest.raises(UserError, match="allowed: test, train"):
        fashion.load("validation")
