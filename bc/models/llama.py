"""LLaMA (arXiv 2302.13971) and models of its architecture: grouped-query attention, tied embeddings, GGUF files."""

from bc.models.base import Family, Region, Source

FAMILY = Family(
    name="llama",
    model_types=("llama",),
    blocks="model.layers",
    linears=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    opens=("attention", "", "mlp", ""),
    before=("input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"),
    attention=Region("self_attn", "self_attn.o_proj"),
    mlp=Region("mlp", "mlp.down_proj"),
    tail=("model.norm", "lm_head"),
    catalogue={
        "llama_7b": Source("huggyllama/llama-7b"),
        "smollm2_135m": Source(embedded="smollm2"),
    },
)
