"""OPT (Zhang et al., arXiv 2205.01068); OPT-350M has project_in/out and norms after the residual."""

from bc.models.base import Family, Region, Source

FAMILY = Family(
    name="opt",
    model_types=("opt",),
    blocks="model.decoder.layers",
    linears=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
    opens=("attention", "", "mlp", ""),
    before=("self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm", "fc1"),
    attention=Region("self_attn", "self_attn.out_proj"),
    mlp=Region("fc1", "fc2"),
    tail=("model.decoder.final_layer_norm", "model.decoder.project_out", "lm_head"),
    catalogue={
        "opt_125m": Source("facebook/opt-125m"),
        "opt_350m": Source("facebook/opt-350m"),
    },
)
