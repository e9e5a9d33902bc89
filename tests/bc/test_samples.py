"""Samples of an allowed form give one result, whatever the batches and the model's mode; others are refused at once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BatchEncoding

import bc
from bc.compensation import BiasCompensation
from bc.errors import UserError
from tests.bc.vision.test_engine import images_for, ready
from tests.conftest import tiny_model

IDS = torch.randint(0, 60, (7, 12), generator=torch.Generator().manual_seed(0))


def biases(model: nn.Module) -> list[torch.Tensor]:
    return [m.table() for m in model.modules() if isinstance(m, BiasCompensation)]


def differences(one: nn.Module, two: nn.Module) -> float:
    pairs = list(zip(biases(one), biases(two), strict=True))
    assert pairs
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("granularity", ["shrink", "lowrank"])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_the_batch_size_changes_no_bias(name: str, granularity: Any) -> None:
    settings = bc.Compensation(("layer", "block"), granularity, dtype="float32", budget=4.0)
    models = [tiny_model(name) for _ in range(3)]
    for model, size in zip(models, (1, 3, 7), strict=True):
        bc.quantize(model, "rtn", "w3", settings, IDS, device="cpu", batch_size=size)
    assert max(differences(models[0], other) for other in models[1:]) < 1e-4


@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("settings", [bc.Compensation(("layer",), "shrink", dtype="float32"), "linear"])
def test_nor_does_it_of_images(kind: str, settings: Any) -> None:
    model, few = ready(kind)
    images, twins = images_for(few), [copy.deepcopy(model) for _ in range(3)]
    outputs = []
    for twin, size in zip(twins, (1, 2, len(images)), strict=True):
        bc.quantize(twin, "rtn", "w3", settings, images, device="cpu", batch_size=size)
        outputs.append(twin(images))
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-3, atol=1e-3)


def test_a_model_in_training_mode_is_scored_and_quantized_without_dropout() -> None:
    model = tiny_model("opt")
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    expected = bc.perplexity(model, IDS, device="cpu")
    model.train()
    assert bc.perplexity(model, IDS, device="cpu") == expected
    assert model.training and model.model.decoder.layers[0].training
    twin = copy.deepcopy(model)
    for each in (model, twin):
        bc.quantize(each, "rtn", "w3", "sink", IDS, device="cpu")
        assert not each.training
    assert differences(model, twin) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_are_given_as_the_model_takes_them(dtype: torch.dtype) -> None:
    model, few = ready("vit")
    images = images_for(few)
    report = bc.quantize(model.to(dtype), "minmax", "w4a4", "paper", images, device="cpu", held_out=images)
    before, after = report.error() or (0, 0)
    assert 0 < after < before


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (IDS.float(), r"calibration: a float32 tensor of shape \(7, 12\) is not allowed; give token ids"),
        (IDS[0], r"calibration: a int64 tensor of shape \(12,\) is not allowed"),
        (IDS[:0], r"calibration: there are no samples; give at least one"),
        ([], r"calibration: there are no samples; give at least one"),
        (IDS.numpy(), r"calibration: a ndarray is not allowed"),
        ((row for row in IDS), r"calibration: a generator is not allowed; give token ids"),
        ({"input_ids": IDS}, r"calibration: a dict is not allowed"),
        ([[1, 2], [3, 4]], r"calibration\[0\]: a list is not allowed"),
        ([{"ids": IDS}], r"calibration\[0\]\['input_ids'\]: a NoneType is not allowed"),
        ([IDS[0], np.ones(3)], r"calibration\[1\]: a ndarray is not allowed"),
        (IDS[:, :0], r"calibration: a int64 tensor of shape \(7, 0\) has no tokens; leave it out"),
        ([IDS[0], IDS[0, :0]], r"calibration\[1\]: a int64 tensor of shape \(0,\) has no tokens; leave it out"),
        (
            [{"input_ids": IDS[:2], "attention_mask": torch.tensor([[1], [0]]).expand(2, 12)}],
            r"calibration\[0\]\['attention_mask'\]: a sample is padding throughout; leave it out",
        ),
        (IDS + 900, r"calibration: token ids from 9\d\d to 9\d\d are not all of the model's \d+; give"),
        (IDS.repeat(1, 99), r"calibration: a window of 1188 tokens is longer than the model's \d+; lower the window"),
    ],
)
def test_token_ids_that_cannot_be_read_are_refused(samples: Any, message: str) -> None:
    model = tiny_model("opt")
    with pytest.raises(UserError, match=message):
        bc.quantize(model, "rtn", "w4", "sink", samples, device="cpu")
    with pytest.raises(UserError, match=message.replace("calibration", "held_out")):
        bc.quantize(model, "rtn", "w4", "sink", IDS, held_out=samples, device="cpu")
    bc.quantize(model, "rtn", "w4", "sink", IDS, device="cpu")  # nothing was done to it


def test_what_a_tokenizer_returns_is_a_sample() -> None:
    mask = torch.ones_like(IDS[:1])
    one, two = tiny_model("opt"), tiny_model("opt")
    encoded = [BatchEncoding({"input_ids": row[None], "attention_mask": mask}) for row in IDS]
    bc.quantize(one, "rtn", "w3", "sink", encoded, device="cpu")
    bc.quantize(two, "rtn", "w3", "sink", IDS, device="cpu", batch_size=1)
    assert differences(one, two) < 1e-6


def test_images_that_cannot_be_read_are_refused() -> None:
    model, few = ready("vit")
    images = images_for(few)
    for samples, message in (
        (images[0], r"calibration: a float32 tensor of shape .* is not allowed; give images, floating"),
        ((images * 255).byte(), r"calibration: a uint8 tensor"),
        (list(images), r"calibration: a list is not allowed"),
        (images[:0], r"calibration: there are no samples"),
        (images[..., :-2], r"calibration: images of \d+ × \d+ do not fit the model; give \d+ × \d+"),
    ):
        with pytest.raises(UserError, match=message):
            bc.quantize(model, "minmax", "w4a4", "paper", samples, device="cpu")


def test_arguments_of_another_type_are_refused() -> None:
    model = tiny_model("opt")
    for arguments, message in (
        ({"bits": 4}, r"bits: 4 is a int; write w4"),
        ({"bc": ["layer"]}, r"bc: \['layer'\] is a list; give a preset's name or bc.Compensation"),
        ({"batch_size": 0}, r"batch_size: 0 is not allowed; use 1 or more samples"),
    ):
        with pytest.raises(UserError, match=message):
            bc.quantize(model, calibration=IDS, device="cpu", **arguments)
    with pytest.raises(UserError, match=r"bc.sink_positions: 1.5 is not allowed"):
        bc.Compensation(("layer",), "sink", sink_positions=1.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"data: windows of torch.float32 cannot be scored; give token ids"):
        bc.perplexity(model, IDS.float(), device="cpu")
    with pytest.raises(UserError, match=r"data: a list cannot be scored; give token ids"):
        bc.perplexity(model, IDS.tolist(), device="cpu")
    with pytest.raises(UserError, match=r"data: token ids from 9\d\d to 9\d\d are not all of the model's \d+; give"):
        bc.perplexity(model, IDS + 900, device="cpu")


def test_paths_and_devices_are_given_as_they_are(tmp_path: Path) -> None:
    tiny_model("opt").save_pretrained(tmp_path)
    by_name = bc.load(tmp_path)
    by_path = bc.load("opt_125m", path=tmp_path)
    device = torch.device("cpu")
    assert bc.perplexity(by_name, IDS, device=device) == bc.perplexity(by_path, IDS, device="cpu")
    bc.quantize(by_name, "rtn", "w4", "sink", IDS, device=device)


def test_a_model_without_a_head_is_refused() -> None:
    model = tiny_model("opt").model
    for act in (lambda: bc.quantize(model, "rtn", "w4", "off", IDS, device="cpu"), lambda: bc.perplexity(model, IDS)):
        with pytest.raises(UserError, match=r"model: a OPTModel puts out no logits of tokens; load it as a causal"):
            act()


@pytest.mark.parametrize("granularity", ["shrink", "lowrank"])
def test_a_search_among_scopes_with_a_regularised_shape(granularity: Any) -> None:
    model = tiny_model("opt")
    report = bc.quantize(
        model, "rtn", "w3", bc.Compensation(("search",), granularity), IDS, held_out=IDS.flip(1), device="cpu"
    )
    assert report.settings is not None and report.settings.granularity == granularity


def test_one_sample_says_nothing_of_its_noise_so_all_is_shrunk() -> None:
    one, two = tiny_model("opt"), tiny_model("opt")
    bc.quantize(one, "rtn", "w3", bc.Compensation(("layer",), "shrink", dtype="float32"), IDS[:1], device="cpu")
    bc.quantize(two, "rtn", "w3", bc.Compensation(("layer",), "sink", dtype="float32"), IDS[:1], device="cpu")
    torch.testing.assert_close(one(IDS).logits, two(IDS).logits, rtol=1e-4, atol=1e-4)
