"""Plain transformers loads what is exported and computes the same."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import bc
from bc.export import export_compressed_tensors
from bc.scaling import folded_copy
from tests.bc.test_awq import model_for_folding
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
        ("awq", "w4g16", "off", "zero points"),
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


@pytest.mark.parametrize("name", ["opt", "llama_mha"])
@pytest.mark.parametrize("preset", ["off", "channel"])
@pytest.mark.parametrize("bits", ["w4", "w3g16"])
def test_the_scales_of_awq_are_folded(name, preset, bits, token_ids, tmp_path):
    """After compensation, whose biases are divided with the outputs that they correct; by way of a checkpoint."""
    model = model_for_folding(name)
    bc.quantize(model, "awq", bits, preset, calibration=token_ids, symmetric=True)
    before, expected = copy.deepcopy(model.state_dict()), model(input_ids=token_ids).logits
    torch.testing.assert_close(folded_copy(model)(input_ids=token_ids).logits, expected, atol=1e-5, rtol=1e-5)
    bc.save(model, tmp_path / "saved")
    export_compressed_tensors(bc.open(tmp_path / "saved"), tmp_path / "a")
    export_compressed_tensors(model, tmp_path / "b")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for folder in (tmp_path / "a", tmp_path / "b"):
        attention = model.config._attn_implementation
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
        torch.testing.assert_close(plain(input_ids=token_ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "site"), [("llama", r"self_attn\.o_proj"), ("opt_350m", r"self_attn\.q_proj"), ("bloom", "4h_to_h")]
)
def test_scales_of_awq_that_do_not_fold_are_refused(name, site, token_ids, tmp_path):
    """Grouped queries, a norm whose output is the residual too, and GELU."""
    model = tiny_model(name)
    bc.quantize(model, "awq", "w4", "off", calibration=token_ids, symmetric=True)
    with pytest.raises(bc.UserError, match=rf"the AWQ scales of \S*{site} do not fold .*; export RTN or GPTQ"):
        export_compressed_tensors(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_how_a_model_generates_is_exported(token_ids, tmp_path):
    model = tiny_model("llama")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [2, 5], 7
    bc.quantize(model, "rtn", "w4", "off", calibration=token_ids, symmetric=True)
    export_compressed_tensors(model, tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert (found.eos_token_id, found.pad_token_id) == ([2, 5], 7)


def test_without_the_package_the_extra_is_named(token_ids, tmp_path, monkeypatch):
    model = tiny_model("llama")
    bc.quantize(model, "rtn", "w4", "off", calibration=token_ids, symmetric=True)
    for name in [n for n in sys.modules if n.partition(".")[0] == "compressed_tensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(bc.UserError, match=r"compressed_tensors\S* is not installed; .*bias-compensation\[export\]"):
        export_compressed_tensors(model, tmp_path)


def test_a_float_model_is_refused(tmp_path):
    with pytest.raises(bc.UserError, match="not quantized"):
        export_compressed_tensors(tiny_model("opt"), tmp_path)
