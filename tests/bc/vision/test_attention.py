"""Named matmuls change nothing but where they can be seen."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from bc.errors import UserError
from bc.vision import wrap
from bc.vision.attention import MatMul, name_matmuls

Case = tuple[nn.Module, torch.Tensor]


def test_output_equals_timms(original: Case) -> None:
    model, images = original
    expected = model(images)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert wrap(model) is model
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_every_attention_has_two_matmuls_that_are_used(wrapped: Case) -> None:
    model, images = wrapped
    matmuls = {name: module for name, module in model.named_modules() if isinstance(module, MatMul)}
    called: list[str] = []
    for name, module in matmuls.items():
        module.register_forward_hook(lambda _m, _args, _out, name=name: called.append(name))
    model(images)
    assert len(called) == len(matmuls) == 2 * sum(name.endswith(".qkv") for name, _ in model.named_modules())
    assert [name.rpartition(".")[2] for name in called] == ["matmul_qk", "matmul_av"] * (len(called) // 2)


def test_matmul_inputs_are_the_scaled_query_and_the_softmax(wrapped: Case) -> None:
    model, images = wrapped
    seen = []
    first = next(module for name, module in model.named_modules() if name.endswith("matmul_av"))
    first.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
    model(images)
    (weights,) = seen
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_a_second_wrap_and_a_deep_copy_change_nothing(wrapped: Case) -> None:
    model, images = wrapped
    expected = model(images)
    names = [name for name, _ in model.named_modules()]
    again = wrap(copy.deepcopy(model))
    assert [name for name, _ in again.named_modules()] == names
    assert torch.equal(again(images), expected)


def test_shifted_windows_use_their_mask() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=16,
        patch_size=2,
        embed_dim=16,
        depths=(2,),
        num_heads=(2,),
        window_size=4,
    ).eval()
    wrap(model)
    block = model.layers[0].blocks[1]
    assert block.attn_mask is not None
    seen = []
    block.attn.matmul_av.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
    model(torch.randn(2, 3, 16, 16))
    weights = seen[0].view(2, 4, 2, 16, 16)
    hidden = (block.attn_mask < 0).view(1, 4, 1, 16, 16).expand_as(weights)
    assert weights[hidden].max() < 1e-12


def test_an_attention_that_is_not_covered_is_named() -> None:
    model = timm.create_model("swinv2_tiny_window8_256", img_size=32, embed_dim=16, depths=(1,), num_heads=(2,))
    with pytest.raises(UserError, match=r"layers\.0\.blocks\.0\.attn.*not covered"):
        name_matmuls(model)
