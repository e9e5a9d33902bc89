"""BLOOM (arXiv 2211.05100): fused q, k, v; alibi instead of position embeddings.

Its attention and MLP modules add the residual themselves, so on the quantized stream a bias at these scopes corrects
the error of the residual too; on the float stream, where both models have the same residual, nothing differs.
"""

from bc.models.base import Family, Region, Source

FAMILY = Family(
    name="bloom",
    model_types=("bloom",),
    blocks="transformer.h",
    linears=(
        ("self_attention.query_key_value",),
        ("self_attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ),
    opens=("attention", "", "mlp", ""),
    before=("input_layernorm", "self_attention.query_key_value", "post_attention_layernorm", ""),
    attention=Region("self_attention", "self_attention"),
    mlp=Region("mlp", "mlp"),
    tail=("transformer.ln_f", "lm_head"),
    catalogue={"bloom_560m": Source("bigscience/bloom-560m")},
)
