"""The chain of units is the model, and the sites are all that is quantized."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from timm import create_model
from timm.layers import GluMlp
from torch import nn

from bc.errors import UserError
from bc.vision import ROLES, create, family_of, sites, units, wrap
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
            assert unit.module.get_submodule(unit.regions["attention"].exit) is block.attn
            assert unit.module.get_submodule(unit.regions["mlp"].exit) is block.mlp
            norms = {site.role: site.norm for site in unit.sites}
            assert norms["qkv"] is block.norm1
            assert norms["fc1"] is block.norm2
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
