"""Tiny language models with random weights, one per family."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before PyTorch is loaded; see experiments/__init__.py
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

VOCABULARY = 96

torch.set_num_threads(1)  # the models are tiny: threads would only wait for one another


def make_opt(attention: str = "eager", **changes: object) -> PreTrainedModel:
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "ffn_dim": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "init_std": 0.2,
    }
    return OPTForCausalLM(OPTConfig(**{**settings, **changes}, attn_implementation=attention))  # type: ignore[arg-type]


def make_opt_350m(attention: str = "eager") -> PreTrainedModel:
    """As OPT-350M: norms after the residual, projections into and out of the blocks."""
    return make_opt(attention, do_layer_norm_before=False, word_embed_proj_dim=16)


def make_bloom(attention: str = "eager") -> PreTrainedModel:
    config = BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        n_layer=3,
        n_head=4,
        pad_token_id=3,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        attn_implementation=attention,
    )
    return BloomForCausalLM(config)


def make_llama(attention: str = "eager") -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config)


MAKERS: dict[str, Callable[..., PreTrainedModel]] = {
    "opt": make_opt,
    "opt_350m": make_opt_350m,
    "bloom": make_bloom,
    "llama": make_llama,
}


@pytest.fixture(params=list(MAKERS))
def family_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiny(family_name: str) -> PreTrainedModel:
    return tiny_model(family_name)


def tiny_model(name: str, attention: str = "eager") -> PreTrainedModel:
    torch.manual_seed(0)
    model = MAKERS[name](attention).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # norms and biases away from their trivial starting values
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def token_ids() -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (6, 20), generator=torch.Generator().manual_seed(2))
