"""Loading: names, folders, GGUF files, families, and refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import bc
from bc.chains import block_list, sites
from bc.errors import UserError
from bc.models import Family, catalogue, families, family_of, load, load_tokenizer, locate, submodule
from tests.conftest import MAKERS, VOCABULARY, tiny_model

IDS = torch.randint(4, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_families_are_found_by_discovery():
    assert {"opt", "bloom", "llama"} <= set(families())
    assert all(isinstance(f, Family) and n == f.name for n, f in families().items())
    assert {"opt_125m", "opt_350m", "bloom_560m", "llama_7b", "smollm2_135m"} <= set(catalogue())


@pytest.mark.parametrize("name", list(MAKERS))
def test_every_declared_path_exists(name):
    model = tiny_model(name)
    family = family_of(model)
    for block in block_list(model, family):
        linears = {n for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        assert {p for g in family.linears for p in g} == linears  # every Linear of a block, and no other
        for region in (family.attention, family.mlp):
            block.get_submodule(region.entry)
            block.get_submodule(region.exit)
    for path in (*family.tail, family.head):
        submodule(model, path)
    assert submodule(model, family.head) is model.get_output_embeddings()
    assert len(list(sites(model, family))) == 3 * sum(map(len, family.linears))


@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_local_folder(name, dtype, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    found = load(str(tmp_path), dtype=dtype)
    assert all(p.dtype == getattr(torch, dtype) and not p.requires_grad for p in found.parameters())
    assert not found.training and found.config.use_cache
    assert all(p.device.type == "cpu" for p in found.parameters())
    with torch.no_grad():
        expected = model.to(getattr(torch, dtype))(IDS).logits
        assert torch.allclose(found(IDS).logits, expected, atol=1e-4 if dtype == "float32" else 0.3)
    assert family_of(found).name == name.removesuffix("_350m")


def test_a_folder_for_a_name_of_the_catalogue(tmp_path):
    tiny_model("opt").save_pretrained(tmp_path)
    assert load("opt_125m", path=str(tmp_path)).config.hidden_size == 32


@pytest.mark.parametrize(
    ("name", "attention"), [(n, a) for n in MAKERS for a in ("eager", "sdpa") if (n, a) != ("bloom", "sdpa")]
)
def test_attention_implementations(name, attention, tmp_path):
    tiny_model(name).save_pretrained(tmp_path)
    assert load(str(tmp_path), attention=attention).config._attn_implementation == attention


def test_bloom_has_no_sdpa(tmp_path):
    tiny_model("bloom").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^model\.attention.*sdpa.*auto") as caught:
        load(str(tmp_path), attention="sdpa")
    one_line(caught)


def make_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32))


def test_an_unknown_family_is_refused_by_name_with_those_known(tmp_path, monkeypatch):
    make_gpt2().save_pretrained(tmp_path)
    for part in tmp_path.glob("*.safetensors"):
        part.unlink()  # refused before any weights are read
    with pytest.raises(UserError, match="gpt2") as caught:
        load(str(tmp_path))
    assert all(name in one_line(caught) for name in ("opt", "bloom", "llama"))
    with pytest.raises(UserError, match="gpt2"):
        bc.quantize(make_gpt2(), "rtn", "w4", device="cpu")
    with pytest.raises(UserError, match="Linear"):
        family_of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["opt_126m", "opt", "a/b/c", "./nowhere", "smollm"])
def test_an_unknown_name_lists_those_known(name):
    with pytest.raises(UserError) as caught:
        load(name)
    assert "opt_125m" in one_line(caught) or "nowhere" in str(caught.value)


def test_wrong_options_are_refused_before_loading(tmp_path):
    for options, field in (({"dtype": "float8"}, "model.dtype"), ({"attention": "flash"}, "model.attention")):
        with pytest.raises(UserError, match=f"^{field}") as caught:
            load(str(tmp_path / "absent"), **options)
        one_line(caught)


def test_a_missing_path_is_named(tmp_path):
    for path in (tmp_path / "absent", tmp_path / "absent.gguf"):
        with pytest.raises(UserError, match=r"^model\.path.*absent") as caught:
            load("opt_125m", path=str(path))
        one_line(caught)
    with pytest.raises(UserError, match=r"GGUF.*absent\.gguf"):
        load(str(tmp_path / "absent.gguf"))
    with pytest.raises(UserError, match=r"^model\.path.*config\.json"):
        load(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": 3}'])
def test_a_damaged_config_is_one_line(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="model") as caught:
        load(str(tmp_path))
    one_line(caught)


def test_missing_and_damaged_weights_are_one_line(tmp_path):
    tiny_model("opt").save_pretrained(tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"^model:") as caught:
        load(str(tmp_path))
    one_line(caught)
    weights.unlink()
    with pytest.raises(UserError, match=r"^model:") as caught:
        load(str(tmp_path))
    one_line(caught)


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    tiny_model("opt").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    one_line(caught)


def test_names_lead_to_repositories_and_revisions(tmp_path):
    assert locate("opt_125m")[:2] == ("facebook/opt-125m", "main")
    assert locate("someone/something")[:2] == ("someone/something", "main")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert locate("opt_125m", str(tmp_path / "m.gguf")) == (str(tmp_path), "main", tmp_path / "m.gguf")


def write_gguf(model: torch.nn.Module, path: Path) -> None:
    """A LLaMA in GGUF as llama.cpp writes it: rotary halves of q and k interleaved."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }

    def add(name: str, value: torch.Tensor) -> None:
        writer.add_tensor(name, value.detach().float().numpy().astype(np.float32))

    add("token_embd.weight", model.model.embed_tokens.weight)
    add("output_norm.weight", model.model.norm.weight)
    for i, block in enumerate(model.model.layers):
        for path_in_block, name in names.items():
            weight = block.get_submodule(path_in_block).weight
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name)
            if heads:
                rows, columns = weight.shape
                weight = weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
            add(f"blk.{i}.{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_an_ordinary_float_model(tmp_path, capsys):
    model = tiny_model("llama")
    write_gguf(model, tmp_path / "tiny.gguf")
    capsys.readouterr()
    found = load(str(tmp_path / "tiny.gguf"))
    assert not capsys.readouterr().err  # no bar where there is no terminal
    with torch.no_grad():
        assert torch.allclose(found(IDS).logits, model(IDS).logits, atol=1e-4)
    bc.quantize(found, "rtn", "w4", "channel", IDS, device="cpu")
    folder = tmp_path / "saved"
    found.save_pretrained(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    """Weights that the files lack would be random, and another at each load."""
    whole = tmp_path / "whole"
    shape = tiny_model("llama").config
    shape.tie_word_embeddings = False
    LlamaForCausalLM(shape).save_pretrained(whole)
    load(str(whole))
    AutoModel.from_pretrained(whole).save_pretrained(tmp_path / "headless")
    config = json.loads((whole / "config.json").read_text())
    with pytest.raises(UserError, match=r"model: lm_head.weight of .* are not in its files .*; give the whole check"):
        load(str(tmp_path / "headless"))
    for change, message in (
        ({"num_hidden_layers": 5}, r"model: model.layers.\d.* and \d+ more of .* are not in its files"),
        ({"intermediate_size": 104}, r"model: .*mlp.* have other shapes than its config.json says"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"is quantized already .*; give the float"),
    ):
        (whole / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            load(str(whole))


@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_a_base_model_with_tied_embeddings_is_complete(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "whole")
    AutoModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "base")
    ids = torch.arange(6)[None]
    torch.testing.assert_close(load(str(tmp_path / "base"))(ids).logits, model(ids).logits)


def test_files_of_another_shape_of_model_are_refused(tmp_path):
    """What the configuration has no place for would be left out, and the model be another one."""
    whole = tmp_path / "whole"
    tiny_model("llama").save_pretrained(whole)
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(
        UserError, match=r"hold model\.layers\.2\..* and \d+ more, which the model of their config"
    ) as caught:
        load(str(whole))
    one_line(caught)
    biased = tiny_model("llama").config
    biased.attention_bias = True
    LlamaForCausalLM(biased).save_pretrained(tmp_path / "biased")
    config = json.loads((tmp_path / "biased" / "config.json").read_text())
    (tmp_path / "biased" / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    with pytest.raises(UserError, match=r"hold model\.layers\.0\.self_attn\.\w+\.bias and"):
        load(str(tmp_path / "biased"))


def test_a_folder_of_another_family_than_the_name_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"holds a model of the llama family, and 'opt_125m' is of opt") as caught:
        locate("opt_125m", str(tmp_path))
    one_line(caught)
    assert locate("mine", str(tmp_path))[0] == str(tmp_path)
