"""Plain transformers loads what is exported and computes the same."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import bc
from bc.export import export_compressed_tensors
from tests.conftest import MAKERS, VOCABULARY, tiny_model

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed (extra 'export')")


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    ("quantizer", "bits", "preset"),
    [
        ("rtn", "w4", "off"),
        ("gptq", "w4g16", "channel"),
        ("rtn", "w3", "channel"),
        ("gptq", "w8", "channel"),
    ],
)
def test_the_same_logits(name, quantizer, bits, preset, token_ids, tmp_path):
    model = tiny_model(name)
    bc.quantize(model, quantizer, bits, preset, calibration=token_ids, symmetric=True)
    export_compressed_tensors(model, tmp_path)
    attention = model.config._attn_implementation
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation=attention)
    found = plain(input_ids=token_ids).logits
    assert torch.allclose(found, model(input_ids=token_ids).logits, atol=1e-3)
    assert not torch.allclose(found, tiny_model(name)(input_ids=token_ids).logits, atol=1e-3)


@pytest.mark.parametrize(
    ("quantizer", "bits", "preset", "reason"),
    [
        ("rtn", "w4", "sink", "sink bias"),
        ("rtn", "w4", "paper", "positional bias"),
        ("rtn", "w2", "linear", "linear map"),
        ("awq", "w4g16", "off", "ScaledWeight"),
        ("billm", "w1", "off", "BinaryWeight"),
        ("sign", "w1", "off", "SignWeight"),
        ("rtn", "w4", "off", "zero points"),
    ],
)
def test_what_would_lose_something_is_refused_with_what_can_be_done(
    quantizer, bits, preset, reason, token_ids, tmp_path
):
    model = tiny_model("llama")
    samples = torch.randint(4, VOCABULARY, (64, 20), generator=torch.Generator().manual_seed(1))
    bc.quantize(model, quantizer, bits, preset, calibration=samples if preset == "linear" else token_ids)
    with pytest.raises(bc.UserError, match=reason):
        export_compressed_tensors(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_float_model_is_refused(tmp_path):
    with pytest.raises(bc.UserError, match="not quantized"):
        export_compressed_tensors(tiny_model("opt"), tmp_path)
