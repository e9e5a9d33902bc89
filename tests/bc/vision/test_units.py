"""The chain of units is the model, and the sites are all that is quantized."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from timm import create_model
from timm.layers import GluMlp, Mlp
from timm.models.vision_transformer import ResPostBlock
from torch import nn

import bc
from bc import quantizers
from bc.errors import UserError
from bc.pipeline import Engine, calibrate
from bc.quantizers.repq_vit import ReparametrisedWeight
from bc.settings import Bits
from bc.vision import ROLES, check, classes, create, family_of, sites, units, wrap
from bc.vision.attention import MatMul
from tests.bc.vision.conftest import VIT, make

Case = tuple[nn.Module, torch.Tensor]
BLOCK = ["qkv", "matmul_qk", "matmul_av", "proj", "fc1", "fc2"]


def test_chain_equals_the_model_bit_for_bit(wrapped: Case) -> None:
    model, images = wrapped
    hidden = images
    for unit in units(model):
        hidden = unit.module(hidden)
    assert torch.equal(hidden, model(images))


def test_sites_are_all_linears_convolutions_and_matmuls_in_forward_order(wrapped: Case) -> None:
    model, images = wrapped
    found = sites(model)
    expected = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | MatMul)]
    assert sorted(site.name for site in found) == sorted(expected)
    assert all(model.get_submodule(site.name) is site.module for site in found)
    assert {site.role for site in found} <= set(ROLES)
    called: list[str] = []
    for site in found:
        site.module.register_forward_hook(lambda _m, _args, _out, name=site.name: called.append(name))
    model(images)
    assert called == [site.name for site in found]


def test_blocks(wrapped: Case) -> None:
    model, _ = wrapped
    for unit in units(model):
        if unit.kind == "block":
            block = model.get_submodule(unit.name)
            last = "mlp_out" if isinstance(block.mlp, GluMlp) else "fc2"
            assert [site.role for site in unit.sites] == [*BLOCK[:-1], last]
            assert block is unit.module
            assert unit.module.get_submodule(unit.regions["attention"].exit) is block.attn.proj
            assert unit.module.get_submodule(unit.regions["mlp"].exit) is block.mlp.fc2
            norms = {site.role: site.norm for site in unit.sites}
            behind = isinstance(block, ResPostBlock)  # its norms are behind attention and MLP, not before
            assert norms["qkv"] is (None if behind else block.norm1)
            assert norms["fc1"] is (None if behind else block.norm2)
            assert norms["proj"] is norms[last] is norms["matmul_qk"] is None
            assert [site.heads for site in unit.sites[:3]] == [block.attn.num_heads] * 3
        else:
            assert not {"attention", "mlp", "block"} & set(unit.regions)


@pytest.mark.parametrize(
    ("options", "role"),
    [
        ({}, "fc2"),
        ({"act_layer": "quick_gelu"}, "fc2"),
        ({"act_layer": "gelu_tanh"}, "fc2"),
        ({"act_layer": "silu"}, "mlp_out"),
        ({"act_layer": "relu"}, "mlp_out"),
        ({"mlp_layer": GluMlp, "act_layer": "gelu"}, "mlp_out"),  # what a gate multiplies has no lower bound
        ({"scale_mlp_norm": True}, "mlp_out"),
    ],
)
def test_fc2_is_behind_a_gelu_alone(options: dict[str, Any], role: str) -> None:
    model = create_model("vit_tiny_patch16_224", **VIT, **options)
    assert [unit.sites[-1].role for unit in units(wrap(model))[1:-1]] == [role] * 2


def test_a_part_ends_in_its_last_linear_only_where_that_is_its_output() -> None:
    class Scaled(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    for options, exits in (
        ({}, ("attn.proj", "mlp.fc2")),
        ({"scale_attn_norm": True, "scale_mlp_norm": True}, ("attn.proj", "mlp.fc2")),  # norms before the last Linear
        ({"proj_drop_rate": 0.1}, ("attn", "mlp")),
        ({"mlp_layer": Scaled}, ("attn.proj", "mlp")),
    ):
        model = create_model("vit_tiny_patch16_224", **VIT, **options)
        block = units(wrap(model))[1]
        assert (block.regions["attention"].exit, block.regions["mlp"].exit) == exits


def test_kinds_and_stages_of_swin() -> None:
    model, _ = make("swin")
    found = units(wrap(model))
    assert [(unit.name, unit.kind, unit.stage) for unit in found] == [
        ("stem", "stem", None),
        ("layers.0.blocks.0", "block", 0),
        ("layers.0.blocks.1", "block", 0),
        ("layers.1.downsample", "downsample", 1),
        ("layers.1.blocks.0", "block", 1),
        ("layers.1.blocks.1", "block", 1),
        ("tail", "tail", None),
    ]
    assert found[3].sites[0].norm is model.layers[1].downsample.norm


def test_distilled_deit_has_two_heads_that_are_averaged() -> None:
    model, images = make("deit_distilled")
    *_, tail = units(wrap(model))
    assert [site.name for site in tail.sites] == ["head", "head_dist"]
    hidden = model.forward_features(images)
    expected = (model.head(hidden[:, 0]) + model.head_dist(hidden[:, 1])) / 2
    torch.testing.assert_close(model(images), expected)


def test_views_share_the_models_parameters(wrapped: Case) -> None:
    model, images = wrapped
    chain = units(model)
    own = {id(parameter) for parameter in model.parameters()}
    shared = [id(parameter) for unit in chain for parameter in unit.module.parameters()]
    assert set(shared) == own
    assert len(shared) == len(own), "a parameter belongs to two units"
    before = model(images)
    for unit in chain:
        unit.module.double()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    torch.testing.assert_close(model(images.double()).float(), before)


def test_an_unwrapped_model_is_refused() -> None:
    model, _ = make("vit")
    with pytest.raises(UserError, match="wrap"):
        units(model)


@pytest.mark.parametrize(
    ("name", "part", "mend"),
    [
        ("vit_base_patch16_xp_224", "blocks.0 is a ParallelScalingBlock", "Block, SwinTransformerBlock, ResPostBlock"),
        ("vit_base_patch16_18x2_224", "blocks.0 is a ParallelThingsBlock", "Block, SwinTransformerBlock, ResPostBlock"),
        ("aimv2_large_patch14_224", "blocks.0.mlp is a SwiGLU", "Mlp, GluMlp"),
        ("vit_tiny_r_s16_p8_224", "patch_embed is a HybridEmbed", "PatchEmbed"),
        ("vit_base_patch32_siglip_256", "attn_pool is a AttentionPoolLatent", "Attention"),
    ],
)
def test_parts_that_are_not_covered_are_named_before_weights_are_loaded(name: str, part: str, mend: str) -> None:
    with pytest.raises(UserError) as raised:
        classes(name)
    line = str(raised.value)
    assert line.startswith(f"model: {part}, which is not covered; covered ") and mend in line and "\n" not in line


def test_a_model_that_is_not_covered_is_refused_by_check_and_by_quantize() -> None:
    with pytest.raises(UserError, match=r"model: patch_embed is a HybridEmbed.*choose another model"):
        check("vit_tiny_r_s16_p8_224.augreg_in21k_ft_in1k")
    model = create("vit_tiny_r_s16_p8_224")
    with pytest.raises(UserError, match=r"model: patch_embed is a HybridEmbed"):
        bc.quantize(model, "minmax", "w8a8", calibration=torch.zeros(1, 3, 224, 224), device="cpu")


def test_repq_changes_no_norm_of_a_block_whose_norms_are_behind() -> None:
    model, images = make("res_post")
    method = quantizers.create("repq_vit", Bits.parse("w4a4"))
    found = calibrate(wrap(model), method, images, Engine(torch.device("cpu"), 3))
    assert not any(isinstance(result.weight, ReparametrisedWeight) for result in found.values())


def test_classes_are_counted_without_weights() -> None:
    names = ("tiny_vit", "vit_s14_fashion", "swin_b", "vit_small_patch14_dinov2.lvd142m")
    assert [classes(name) for name in names] == [10, 10, 1000, 0]
    assert classes("vit_tiny_patch16_224.augreg_in21k") == 21843


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(UserError, match="allowed: SwinTransformer"):
        family_of(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("name", "blocks", "downsamples"),
    [("vit_s", 12, 0), ("vit_b_384", 12, 0), ("deit_b", 12, 0), ("swin_t", 12, 3), ("swin_b_384", 24, 3)],
)
def test_published_models(name: str, blocks: int, downsamples: int) -> None:
    with torch.device("meta"):
        found = units(wrap(create(name)))
    assert Counter(unit.kind for unit in found) == Counter(stem=1, block=blocks, downsample=downsamples, tail=1)
    assert sum(len(unit.sites) for unit in found) == 2 + 6 * blocks + downsamples
