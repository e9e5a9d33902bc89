"""Names, tags, published facts, and weights from files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config

from bc.errors import UserError
from bc.vision import catalogue, create, load, preprocessing
from bc.vision.transforms import Preprocessing

INCEPTION, IMAGENET = ((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
#: name: (label, timm's name without tag, size, crop, short side, (mean, std), published FP32 top-1)
PUBLISHED = {
    "vit_s": ("ViT-S", "vit_small_patch16_224", 224, 0.9, 248, INCEPTION, 81.39),
    "vit_b": ("ViT-B", "vit_base_patch16_224", 224, 0.9, 248, INCEPTION, 84.54),
    "vit_b_384": ("ViT-B*", "vit_base_patch16_384", 384, 1.0, 384, INCEPTION, 86.0),
    "deit_s": ("DeiT-S", "deit_small_patch16_224", 224, 0.9, 248, IMAGENET, 79.85),
    "deit_b": ("DeiT-B", "deit_base_patch16_224", 224, 0.9, 248, IMAGENET, 81.8),
    "deit_b_384": ("DeiT-B*", "deit_base_patch16_384", 384, 1.0, 384, IMAGENET, 83.11),
    "swin_t": ("Swin-T", "swin_tiny_patch4_window7_224", 224, 0.9, 248, IMAGENET, 81.39),
    "swin_s": ("Swin-S", "swin_small_patch4_window7_224", 224, 0.9, 248, IMAGENET, 83.23),
    "swin_b": ("Swin-B", "swin_base_patch4_window7_224", 224, 0.9, 248, IMAGENET, 85.27),
    "swin_b_384": ("Swin-B*", "swin_base_patch4_window12_384", 384, 1.0, 384, IMAGENET, 86.44),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str) -> None:
    label, base, size, crop, side, (mean, std), top1 = PUBLISHED[name]
    source = catalogue()[name]
    assert (source.label, source.timm.partition(".")[0], source.top1) == (label, base, top1)
    assert source.timm in timm.list_pretrained(f"{base}.*")
    stub = SimpleNamespace(pretrained_cfg=timm.get_pretrained_cfg(source.timm).to_dict())
    found = Preprocessing.of(stub)  # type: ignore[arg-type]
    assert found == Preprocessing(3, (size, size), crop, "bicubic", mean, std)
    assert found.resize == side


def test_only_the_ten_are_published() -> None:
    assert {name for name, source in catalogue().items() if not source.embedded} == set(PUBLISHED)


def test_two_steps_equal_timms_transform() -> None:
    noise = np.random.RandomState(0).randint(0, 256, (61, 87, 3)).astype(np.uint8)
    picture = Image.fromarray(noise)
    for name in ("vit_s14_fashion", "tiny_vit", "tiny_swin"):
        model = create(name)
        prepare = preprocessing(model)
        whole = create_transform(**resolve_model_data_config(model), is_training=False)
        converted = picture.convert("L" if prepare.channels == 1 else "RGB")
        crops = torch.from_numpy(prepare.cropper()(picture))[None]
        assert torch.equal(prepare.normalize(crops)[0], whole(converted))


def test_a_name_has_the_transform_of_its_model() -> None:
    for name in ("vit_s14_fashion", "tiny_vit", "deit_tiny_patch16_224"):
        assert preprocessing(name) == preprocessing(create(name))
    assert preprocessing("tiny_vit").size != (224, 224)  # ImageNet's usual values


def test_what_is_no_model_of_timms_has_no_transform() -> None:
    with pytest.raises(UserError, match="model: 'tiny_vitt' is not known"):
        preprocessing("tiny_vitt")
    with pytest.raises(UserError, match=r"preprocessing: a Linear is no model of timm's; give a model that bc.load"):
        preprocessing(torch.nn.Linear(2, 2))


def test_crops_are_shared_by_models_of_one_size() -> None:
    names = {}
    for name in PUBLISHED:
        stub = SimpleNamespace(pretrained_cfg=timm.get_pretrained_cfg(catalogue()[name].timm).to_dict())
        names.setdefault(Preprocessing.of(stub).crop_name, []).append(name)  # type: ignore[arg-type]
    assert sorted(map(len, names.values())) == [3, 7]


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({"crop_pct": 0.875}, False),
        ({"crop_pct": 0.95}, False),
        ({"interpolation": "bilinear"}, False),
        ({"size": (224, 256)}, False),
        ({"channels": 1}, False),
        ({"crop_mode": "squash"}, False),
        ({"mean": IMAGENET[0], "std": IMAGENET[1]}, True),  # what comes behind the crop
    ],
)
def test_whatever_changes_a_crop_is_in_its_name(other: dict[str, Any], same: bool) -> None:
    usual = Preprocessing(3, (224, 224), 0.9, "bicubic", *INCEPTION)
    assert (replace(usual, **other).crop_name == usual.crop_name) == same


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_weights_from_a_file(tmp_path: Path, ending: str) -> None:
    model = create("tiny_deit")
    path = tmp_path / f"weights{ending}"
    if ending == ".pth":
        torch.save({"model": model.state_dict()}, path)  # as DeiT's authors publish theirs
    else:
        save_file(model.state_dict(), path)
    loaded = load("tiny_deit", str(path))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert hasattr(loaded.blocks[0].attn, "matmul_qk")


def test_weights_from_a_folder_and_dtype(tmp_path: Path) -> None:
    save_file(create("tiny_vit").state_dict(), tmp_path / "model.safetensors")
    assert next(load("tiny_vit", str(tmp_path), dtype="bfloat16").parameters()).dtype == torch.bfloat16


def test_another_models_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(create("tiny_vit").state_dict(), path)
    for name in ("tiny_deit", "tiny_swin"):
        with pytest.raises(UserError, match=r"model\.path.*another model's weights"):
            load(name, str(path))


@pytest.mark.parametrize(
    ("named", "given", "size", "what"),
    [
        ("deit_tiny_patch16_224", "deit_tiny_patch16_224", {"img_size": 96}, "pos_embed is (1, 37, 192)"),
        ("tiny_swin", "tiny_swin", {"window_size": 2}, "relative_position_bias_table is (9, 3), not (49, 3)"),
        ("tiny_vit", "tiny_vit", {"patch_size": 2, "img_size": 16}, "patch_embed.proj.weight is"),
    ],
)
def test_weights_of_another_size_are_refused_not_resampled(
    tmp_path: Path, named: str, given: str, size: dict[str, int], what: str
) -> None:
    path, source = tmp_path / "weights.safetensors", catalogue().get(given)
    options = {} if source is None else source.options
    save_file(timm.create_model(given if source is None else source.timm, **options | size).state_dict(), path)
    with pytest.raises(UserError, match=rf"model\.path.*another model's weights.*{re.escape(what)}"):
        load(named, str(path))


def test_the_original_layouts_are_converted(tmp_path: Path) -> None:
    swin, vit = create("tiny_swin").state_dict(), create("tiny_vit").state_dict()
    names = {key: re.sub(r"(\d+)(?=\.downsample)", lambda n: str(int(n[0]) - 1), key) for key in swin}
    torch.save({"model": {names[k].replace("head.fc.", "head."): v for k, v in swin.items()}}, tmp_path / "swin.pth")
    torch.save({f"visual.trunk.{key}": value for key, value in vit.items()}, tmp_path / "vit.pth")
    for name, state in (("swin", swin), ("vit", vit)):
        loaded = load(f"tiny_{name}", str(tmp_path / f"{name}.pth")).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": SimpleNamespace()}, path)
    with pytest.raises(UserError, match=r"model\.path.*cannot be read"):
        load("tiny_vit", str(path))


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'float32'"):
        load("tiny_vit", dtype="float23")
    with pytest.raises(UserError, match=r"model\.path: no checkpoint"):
        load("tiny_vit", str(tmp_path / "absent.pth"))
    with pytest.raises(UserError, match="is not known; allowed: deit_s"):
        load("vit_xxl")
    with pytest.raises(UserError, match="allowed tags: augreg_in1k"):
        load("vit_small_patch16_224.nonsense")
    with pytest.raises(UserError, match="names no weights"):
        load("vit_small_patch16_224")
    with pytest.raises(UserError, match="allowed: SwinTransformer"):
        create("resnet18")


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(UserError, match=r"cannot be had from the hub \(no route to host\); set model\.path"):
        load("deit_s")
