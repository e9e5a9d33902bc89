"""The committed weights score what is recorded of them, and the ViT-S/14 is what its ONNX file computes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from bc.data.images import test_batches as batches
from bc.data.wheels import path_of
from bc.vision import create, load, preprocessing, wrap
from bc.vision.checkpoints import embedded_file, metrics

MEGABYTE = 1e6
TINY = ("tiny_vit", "tiny_deit", "tiny_swin")


@torch.no_grad()
def top1(model: nn.Module, limit: int, offset: int) -> float:
    test = batches("embedded_fashion", preprocessing(model), 250, limit=limit, offset=offset)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test)
    return 100 * right / test.count


def require(name: str) -> None:
    if not embedded_file(name).is_file():
        pytest.skip(f"{name} has not been trained; run `python -m experiments.training.train_tiny {name}`")


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_score_what_is_recorded(name: str) -> None:
    require(name)
    record = metrics(name)
    found = top1(load(name), 2000, 1000)
    # the order of sums differs between processors, which may move an image that lies on a border
    assert found == pytest.approx(record["top1_1000_3000"], abs=0.11)
    assert record["top1"] > 84
    assert record["training_images"] == 60_000


@pytest.mark.parametrize("name", [*TINY, "vit_s14_probe"])
def test_records_are_complete_and_files_small(name: str) -> None:
    require(name)
    record = metrics(name)
    assert {"recipe", "versions", "device", "commit", "top1", "top1_1000_3000"} <= set(record)
    assert embedded_file(name).stat().st_size < 3 * MEGABYTE


@pytest.fixture(scope="module")
def onnx_file() -> Path:
    path = path_of("vit_s14")
    if not path.is_file() and not os.environ.get("BC_TEST_DOWNLOADS"):
        pytest.skip("the ViT-S/14 is not in the cache; run `python -m bc.data vision`")
    pytest.importorskip("onnx")
    from bc.data.embedded import fetch

    return fetch("vit_s14")


@pytest.mark.embedded
def test_the_backbone_equals_its_onnx_file(onnx_file: Path) -> None:
    import onnx

    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from bc.vision.vit_s14 import convert

    model = wrap(create("vit_s14_fashion")).eval()
    assert model.load_state_dict(convert(onnx_file), strict=False).missing_keys == ["head.weight", "head.bias"]
    published = onnx.load(onnx_file)
    norm = [node.output[0] for node in published.graph.node if node.name.startswith("/backbone/layernorm")][-1]
    del published.graph.output[:]
    published.graph.output.append(onnx.helper.make_tensor_value_info(norm, onnx.TensorProto.FLOAT, None))
    for dimension in published.graph.input[0].type.tensor_type.shape.dim[2:]:
        dimension.dim_value = 56
    session = runtime.InferenceSession(published.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run(None, {"input_image": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(images), torch.from_numpy(expected), atol=1e-4, rtol=0)


@pytest.mark.embedded
@pytest.mark.usefixtures("onnx_file")
def test_the_probed_vit_scores_what_is_recorded() -> None:
    found = top1(load("vit_s14_fashion"), 400, 1000)
    assert found == pytest.approx(metrics("vit_s14_probe")["top1_1000_3000"], abs=6)
