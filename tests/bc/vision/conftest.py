"""Small vision transformers with random weights, one of each kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from bc.vision import wrap

VIT = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 7}
SWIN = {"patch_size": 2, "embed_dim": 16, "num_heads": (2, 4), "window_size": 4, "num_classes": 7}

MAKERS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "vit": (24, lambda: timm.create_model("vit_tiny_patch16_224", **VIT)),
    "vit_pre_norm_avg": (
        24,
        lambda: timm.create_model("vit_tiny_patch16_224", pre_norm=True, global_pool="avg", **VIT),
    ),
    "deit": (24, lambda: timm.create_model("deit_tiny_patch16_224", **VIT)),
    "deit_distilled": (24, lambda: timm.create_model("deit_tiny_distilled_patch16_224", **VIT)),
    "layer_scale": (24, lambda: timm.create_model("vit_small_patch14_dinov2", **VIT)),
    "res_post": (24, lambda: timm.create_model("vit_base_patch16_rpn_224", **VIT)),
    "swiglu": (24, lambda: timm.create_model("vit_giant_patch14_dinov2", **VIT)),
    # 16 × 16 patches: windows of 4, every second block of both stages shifted
    "swin": (32, lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=32, depths=(2, 2), **SWIN)),
    # 11 × 11 patches: padded windows, padded downsample
    "swin_padded": (22, lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=22, depths=(2, 2), **SWIN)),
}


@pytest.fixture(params=list(MAKERS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A model as timm makes it, its weights away from their trivial starting values, and images for it."""
    torch.manual_seed(0)
    size, maker = MAKERS[kind]
    model = maker().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model, torch.randn(3, 3, size, size, generator=generator)


@pytest.fixture
def original(kind: str) -> tuple[nn.Module, torch.Tensor]:
    return make(kind)


@pytest.fixture
def wrapped(kind: str) -> tuple[nn.Module, torch.Tensor]:
    model, images = make(kind)
    return wrap(model), images
