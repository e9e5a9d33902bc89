"""DeiT: a ``VisionTransformer``, or timm's distilled class with a second token and head, averaged in the logits."""

from __future__ import annotations

from bc.vision.base import Source, VisionFamily
from bc.vision.vit import GREY, TINY, chain

FAMILY = VisionFamily(
    name="deit",
    classes=("VisionTransformerDistilled",),
    chain=chain,
    catalogue={
        "deit_s": Source("deit_small_patch16_224.fb_in1k", "DeiT-S", 79.85),
        "deit_b": Source("deit_base_patch16_224.fb_in1k", "DeiT-B", 81.8),
        "deit_b_384": Source("deit_base_patch16_384.fb_in1k", "DeiT-B*", 83.11),
        "tiny_deit": Source(
            "deit_tiny_distilled_patch16_224",
            embedded="tiny_deit",
            options={"img_size": 28, "patch_size": 7, "embed_dim": 96, "depth": 4, "num_heads": 4, **TINY},
            preprocessing={"input_size": (1, 28, 28), "num_classes": 10, "crop_pct": 1.0, **GREY},
        ),
    },
)
