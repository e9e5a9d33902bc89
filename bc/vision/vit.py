"""ViT, and DeiT without its distillation token: timm's ``VisionTransformer``."""

from __future__ import annotations

from typing import Any

from torch import nn

from bc.sites import alone
from bc.vision.base import Source, Unit, VisionFamily
from bc.vision.chain import Tail, VitStem, block_unit, head_sites, stem_sites


def chain(model: Any) -> list[Unit]:
    """Stem, blocks, tail."""
    heads = ("head", "head_dist") if isinstance(getattr(model, "head_dist", None), nn.Module) else ("head",)
    return [
        Unit("stem", VitStem(model), "stem", alone(stem_sites(model))),
        *(block_unit(f"blocks.{i}", block) for i, block in enumerate(model.blocks)),
        Unit("tail", Tail(model), "tail", alone(head_sites(model, heads))),
    ]


#: Fashion-MNIST as the tiny models see it.
GREY = {"mean": (0.286,), "std": (0.353,), "interpolation": "bicubic", "crop_mode": "center"}
TINY = {"in_chans": 1, "num_classes": 10}

FAMILY = VisionFamily(
    name="vit",
    classes=("VisionTransformer",),
    chain=chain,
    catalogue={
        "vit_s": Source("vit_small_patch16_224.augreg_in21k_ft_in1k", "ViT-S", 81.39),
        "vit_b": Source("vit_base_patch16_224.augreg_in21k_ft_in1k", "ViT-B", 84.54),
        "vit_b_384": Source("vit_base_patch16_384.augreg_in21k_ft_in1k", "ViT-B*", 86.0),
        "vit_s14_fashion": Source(
            "vit_small_patch14_dinov2",
            embedded="vit_s14",
            options={"img_size": 56, "num_classes": 10},
            preprocessing={"input_size": (3, 56, 56), "num_classes": 10},
        ),
        "tiny_vit": Source(
            "vit_tiny_patch16_224",
            embedded="tiny_vit",
            options={"img_size": 28, "patch_size": 7, "embed_dim": 96, "depth": 4, "num_heads": 4, **TINY},
            preprocessing={"input_size": (1, 28, 28), "num_classes": 10, "crop_pct": 1.0, **GREY},
        ),
    },
)
