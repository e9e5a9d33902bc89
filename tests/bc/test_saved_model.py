"""A saved model computes what the model did that was saved."""

from __future__ import annotations

import json

import pytest
import torch

import bc
from bc.checkpoint import MODEL_FILE, MODEL_FORMAT, DamagedFileError, provenance_of, save_model
from bc.compensation import BiasCompensation
from bc.settings import Compensation
from bc.storage import read, write
from tests.bc.vision.conftest import make
from tests.conftest import MAKERS, tiny_model
from tests.experiments.conftest import make_tokenizer

SETTINGS = [
    ("rtn", "w4", "off"),
    ("gptq", "w3g10", "channel"),
    ("gptq", "w2", "sink"),
    ("rtn", "w3", "paper"),
    ("awq", "w4g16", "positional"),
    ("billm", "w1", "sink"),
    ("sign", "w1", "channel"),
    ("rtn", "w3", "lowrank"),
    ("rtn", "w3", "shrink"),
    ("gptq", "w3", Compensation(("layer",), "sink", method="affine")),
    ("rtn", "w2", Compensation(("layer", "mlp", "block"), "lowrank", "quantized", budget=8.0)),
    ("rtn", "w5", Compensation(("layer", "attention", "mlp", "block", "model"), "sink", "quantized")),
]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(("quantizer", "bits", "preset"), SETTINGS)
def test_outputs_are_equal_bit_by_bit(name, quantizer, bits, preset, token_ids, tmp_path):
    model = tiny_model(name)
    bc.quantize(model, quantizer, bits, preset, calibration=token_ids)
    path = bc.save(model, tmp_path / "saved")
    again = bc.open(tmp_path / "saved")
    longer = torch.cat([token_ids, token_ids], 1)  # positions beyond those that were fitted
    for ids in (token_ids, longer):
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert [type(m) for m in again.modules()].count(BiasCompensation) == [type(m) for m in model.modules()].count(
        BiasCompensation
    )
    assert path.parent.joinpath("config.json").is_file()


def test_a_model_that_was_cast_comes_back_with_its_buffers(token_ids, tmp_path):
    """Rotary frequencies are in no state dict, and a new model has others than one that was cast."""
    model = tiny_model("llama").to(torch.bfloat16)
    bc.quantize(model, "rtn", "w4", "channel", calibration=token_ids)
    bc.save(model, tmp_path)
    again = bc.open(tmp_path)
    assert torch.equal(again(input_ids=token_ids).logits, model(input_ids=token_ids).logits)
    assert {n: b.dtype for n, b in again.named_buffers()} == {n: b.dtype for n, b in model.named_buffers()}


def test_opening_draws_no_weights(token_ids, tmp_path):
    """They would be thrown away: minutes, and a model's memory once more, for billions of weights."""
    model = tiny_model("llama")
    bc.quantize(model, "rtn", "w4", "sink", calibration=token_ids)
    path = bc.save(model, tmp_path)
    state = torch.get_rng_state()
    again = bc.open(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert not [name for name, t in [*again.named_parameters(), *again.named_buffers()] if t.is_meta]
    tensors, header = read(path, MODEL_FORMAT)  # as it was once written: without the buffers
    write(path, {k: v for k, v in tensors.items() if not k.startswith("buffer/")}, header)
    assert torch.equal(bc.open(tmp_path)(input_ids=token_ids).logits, model(input_ids=token_ids).logits)


def test_how_a_model_generates_is_saved(token_ids, tmp_path):
    model = tiny_model("llama")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [2, 5], 7
    bc.quantize(model, "rtn", "w4", "off", calibration=token_ids)
    bc.save(model, tmp_path)
    found = bc.open(tmp_path).generation_config
    assert (found.eos_token_id, found.pad_token_id) == ([2, 5], 7)


def test_a_saved_model_can_be_saved_again(token_ids, tmp_path):
    model = tiny_model("llama")
    bc.quantize(model, "rtn", "w4", "sink", calibration=token_ids)
    first = read(bc.save(model, tmp_path / "a"), MODEL_FORMAT)
    second = read(bc.save(bc.open(tmp_path / "a"), tmp_path / "b"), MODEL_FORMAT)
    assert first[1] == second[1]
    assert first[0].keys() == second[0].keys()
    assert all(torch.equal(first[0][key], second[0][key]) for key in first[0])


@pytest.mark.parametrize(("quantizer", "bits", "preset"), [("rtn", "w3g64", "sink"), ("gptq", "w4", "channel")])
def test_the_file_is_as_large_as_the_bits_per_weight_say(quantizer, bits, preset, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (4, 16))
    report = bc.quantize(model, quantizer, bits, preset, calibration=ids)
    path = bc.save(model, tmp_path)
    with path.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    parts = json.loads(path.read_bytes()[8 : 8 + header])
    plain = [v for k, v in parts.items() if k.startswith("state/") and "bias" not in k]
    others = sum(v["data_offsets"][1] - v["data_offsets"][0] for v in plain)  # embeddings, norms, head
    size = path.stat().st_size - 8 - header - others
    assert size * 8 == pytest.approx(report.storage_bits, rel=0.02)


def test_a_float_model_is_refused(tmp_path):
    with pytest.raises(bc.UserError, match="not quantized"):
        bc.save(tiny_model("opt"), tmp_path)


def test_a_vision_model_is_refused(tmp_path):
    model, images = make("vit")
    bc.quantize(model, "minmax", "w4a4", "off", calibration=images)
    with pytest.raises(bc.UserError, match="a vision model's cannot be saved"):
        bc.save(model, tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(bc.UserError, match=r"no quantized\.safetensors"):
        bc.open(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", lambda text: text.replace('"bos_token_id": ', '"bos_token_id": 1'), "its SHA-256 is"),
        ("config.json", lambda text: "{", "config.json: cannot be read"),
        ("config.json", None, "config.json: is missing"),
        ("generation_config.json", lambda text: "{", "generation_config.json: cannot be read"),
        ("generation_config.json", lambda text: text.replace("{", "{ "), "generation_config.json: its SHA-256 is"),
        ("generation_config.json", None, "generation_config.json: is missing"),
        ("tokenizer.json", lambda text: text.replace('"a": 4', '"a": 5'), "tokenizer.json: its SHA-256 is"),
        ("tokenizer_config.json", lambda text: text + " ", "tokenizer_config.json: its SHA-256 is"),
        ("tokenizer_config.json", None, "tokenizer_config.json: is missing"),
        ("chat_template.jinja", lambda text: "another", "chat_template.jinja: its SHA-256 is"),
    ],
)
def test_what_lies_beside_the_weights_is_checked_too(file, content, message, token_ids, tmp_path):
    model = tiny_model("llama")
    bc.quantize(model, "rtn", "w4", "sink", token_ids, device="cpu")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    bc.save(model, tmp_path, tokenizer)
    bc.open(tmp_path)
    path = tmp_path / file
    text = path.read_text(encoding="utf8")
    if content is None:
        path.unlink()
    else:
        path.write_text(content(text), encoding="utf8")
        assert path.read_text(encoding="utf8") != text
    with pytest.raises(DamagedFileError, match=message):
        bc.open(tmp_path)


def test_a_model_of_before_the_files_beside_it_were_hashed_opens(token_ids, tmp_path):
    model = tiny_model("llama")
    bc.quantize(model, "rtn", "w4", "sink", token_ids, device="cpu")
    path = bc.save(model, tmp_path, make_tokenizer())
    tensors, header = read(path, MODEL_FORMAT)
    for later in ("files", "config.json"):
        del header[later]
    write(path, tensors, header)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert torch.equal(bc.open(tmp_path)(input_ids=token_ids).logits, model(input_ids=token_ids).logits)


def test_nothing_but_the_model_is_left_in_the_folder(token_ids, tmp_path, monkeypatch):
    """Which may be the user's home, in short."""
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tiny_model("llama")
    bc.quantize(model, "rtn", "w4", "sink", token_ids, device="cpu")
    assert bc.save(model, "~/saved", make_tokenizer()).parent == tmp_path / "saved"
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"config.json", "generation_config.json", MODEL_FILE, "tokenizer.json", "tokenizer_config.json"}
    assert torch.equal(bc.open("~/saved")(input_ids=token_ids).logits, model(input_ids=token_ids).logits)


def test_where_a_model_comes_from_is_kept_when_it_is_saved_again(token_ids, tmp_path):
    model = tiny_model("llama")
    bc.quantize(model, "rtn", "w4", "sink", token_ids, device="cpu")
    save_model(model, tmp_path / "a", provenance={"commit": "c0ffee"})
    bc.save(bc.open(tmp_path / "a"), tmp_path / "b")
    assert provenance_of(bc.open(tmp_path / "b")) == {"commit": "c0ffee"}
    assert provenance_of(model) == {}


@pytest.mark.parametrize("harm", ["truncated", "altered"])
def test_a_damaged_file_is_refused_by_name(harm, token_ids, tmp_path):
    model = tiny_model("opt")
    bc.quantize(model, "rtn", "w4", "channel", calibration=token_ids)
    path = bc.save(model, tmp_path)
    data = bytearray(path.read_bytes())
    if harm == "altered":
        data[-5] ^= 1
    path.write_bytes(data[:-7] if harm == "truncated" else data)
    with pytest.raises(DamagedFileError, match=MODEL_FILE):
        bc.open(tmp_path)


@pytest.mark.parametrize("preset", ["channel", "sink", "paper"])
def test_a_saved_model_generates_as_the_model_did(preset, token_ids, tmp_path):
    model = tiny_model("llama")
    bc.quantize(model, "rtn", "w4", preset, calibration=token_ids)
    bc.save(model, tmp_path)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(token_ids[:2])}
    expected = model.generate(token_ids[:2], **options)
    assert torch.equal(bc.open(tmp_path).generate(token_ids[:2], **options), expected)
