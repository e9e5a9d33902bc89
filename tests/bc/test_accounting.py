"""What is reported as stored is what is stored."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from bc.chains import chain_of
from bc.compensation import attach, bias_parameters, fold
from bc.errors import UserError
from bc.pipeline import Engine, calibrate, compensate, float_means
from bc.quantizers import create
from bc.settings import Bits, Compensation
from bc.vision import wrap
from tests.bc.vision.conftest import make
from tests.conftest import MAKERS, VOCABULARY, tiny_model

ENGINE = Engine(torch.device("cpu"), 3)
IDS = torch.randint(4, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(5))
SCOPES = [("layer",), ("mlp",), ("attention", "block"), ("layer", "mlp", "block", "model"), ("mlp", "block", "model")]


def made(model: nn.Module, plain: nn.Module) -> int:
    """Values of biases that a model has and the plain one has not."""
    names = {name for name, _ in plain.named_parameters()}
    extra = sum(p.numel() for name, p in model.named_parameters() if name not in names)
    return extra + bias_parameters(model)


@pytest.mark.parametrize("granularity", ["channel", "sink", "positional", "lowrank"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", MAKERS)
def test_every_value_of_a_language_models_biases_is_counted_once(
    name: str, scope: tuple[str, ...], granularity: Any
) -> None:
    model = tiny_model(name)
    results = calibrate(model, create("rtn", Bits.parse("w3")), None, ENGINE)
    twin = copy.deepcopy(model)
    settings = Compensation(scope, granularity, budget=20.0)
    report = compensate(twin, results, settings, IDS, ENGINE)
    assert report.bias_parameters == made(twin, model)


@pytest.mark.parametrize("granularity", ["channel", "sink", "positional", "lowrank"])
@pytest.mark.parametrize("scope", [("block", "stage"), ("layer", "stage"), ("downsample", "stage", "model")])
def test_every_value_of_a_swins_biases_is_counted_once(scope: tuple[str, ...], granularity: Any) -> None:
    model, images = make("swin")
    model = wrap(model)
    results = calibrate(model, create("minmax", Bits.parse("w4a4")), images, ENGINE)
    twin = copy.deepcopy(model)
    report = compensate(twin, results, Compensation(scope, granularity, budget=400.0), images, ENGINE)
    assert report.bias_parameters == made(twin, model)


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("scope", [("layer",), ("layer", "block"), ("block",), ("attention", "block")])
def test_low_rank_never_makes_a_bias_wider_than_it_was_allowed(scope: tuple[str, ...], samples: int) -> None:
    """A module's own bias would have the module's 32 bits a value, and the budget counts 16."""
    model = tiny_model("llama")
    results = calibrate(model, create("rtn", Bits.parse("w3")), None, ENGINE)
    plain = compensate(copy.deepcopy(model), results, Compensation(), None, ENGINE).bits_per_weight

    def bits(budget: float) -> float:
        settings = Compensation(scope, "lowrank", budget=budget)
        return compensate(copy.deepcopy(model), results, settings, IDS[:samples], ENGINE).bits_per_weight - plain

    least = bits(1e-9)
    for factor in (1.0, 1.02, 1.1, 1.5, 2.0, 3.0):
        assert bits(factor * least) <= factor * least


def activating() -> nn.Module:
    """An OPT whose second layer of the MLP is fed an outlier at the first position, for a token that is 5."""
    model: Any = tiny_model("opt")
    model.model.decoder.embed_tokens.weight.data[5] *= 60
    layer = model.model.decoder.layers[0]
    fed: list[torch.Tensor] = []
    hook = layer.fc1.register_forward_pre_hook(lambda module, args: fed.append(args[0]))
    model(torch.full((1, 3), 5))
    hook.remove()
    direction = fed[0].reshape(-1, fed[0].shape[-1])[0]
    layer.fc1.weight.data += 2 * torch.outer(torch.ones(len(layer.fc1.weight)), direction / direction.norm())
    layer.fc1.bias.data -= 7
    return model


@pytest.mark.parametrize("granularity", ["sink", "lowrank", "shrink"])
def test_scopes_of_a_module_may_find_different_numbers_of_sinks(granularity: Any) -> None:
    ids = IDS.clone()
    ids[:, 0] = 5
    model = activating()
    results = calibrate(model, create("rtn", Bits.parse("w3")), None, ENGINE)
    found = []
    for scope in (("layer",), ("mlp",), ("layer", "mlp")):
        twin: Any = copy.deepcopy(model)
        compensate(twin, results, Compensation(scope, granularity, sink_positions=0, budget=20.0), ids, ENGINE)
        found.append(len(twin.model.decoder.layers[0].fc2.compensation.table()))
        assert twin(ids).logits.isfinite().all()
    if granularity == "sink":
        assert found[2] == max(found[:2]) > 1


@pytest.mark.parametrize(("first", "second"), [(1, 3), (3, 1), (2, 2)])
def test_sink_tables_add_up_whatever_their_numbers_of_rows(first: int, second: int) -> None:
    module, x = nn.Identity(), torch.zeros(2, 5, 4)
    generator = torch.Generator().manual_seed(1)
    tables = [torch.randn(rows, 4, generator=generator) for rows in (first, second)]
    for table in tables:
        attach(module, table, "sink", dtype=torch.float32)
    expected = sum(table[torch.arange(5).clamp(max=len(table) - 1)] for table in tables)
    torch.testing.assert_close(module(x), torch.as_tensor(expected).expand(2, -1, -1))


def test_a_bias_that_is_folded_in_part_takes_no_other() -> None:
    module = nn.Linear(4, 4)
    attach(module, torch.randn(2, 4), "sink")
    assert fold(module)
    with pytest.raises(UserError, match="in the module's own already"):
        attach(module, torch.randn(2, 4), "sink")


def test_a_model_without_a_head_has_no_scope_model() -> None:
    from timm.models.vision_transformer import VisionTransformer

    headless = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0)
    model = wrap(headless.eval())
    assert "model" not in chain_of(model).scopes
    images = torch.randn(3, 3, 16, 16)
    results = calibrate(model, create("minmax", Bits.parse("w4a4")), images, ENGINE)
    with pytest.raises(UserError, match="there is no 'model'"):
        compensate(model, results, Compensation(("layer", "model"), "channel"), images, ENGINE)


@pytest.mark.parametrize("kinds", [("linear",), ("conv", "linear", "matmul")])
def test_sums_of_float_inputs_do_not_stand_for_quantized_ones(kinds: tuple[str, ...]) -> None:
    model, images = make("vit")
    model = wrap(model)
    results = calibrate(model, create("minmax", Bits.parse("w4a4")), images, ENGINE)
    settings = Compensation(("layer",), "channel", kinds=kinds)
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    compensate(one, results, settings, images, ENGINE)
    compensate(two, results, settings, images, ENGINE, means=float_means(model, images, ENGINE))
    assert torch.equal(one(images), two(images))


@pytest.mark.parametrize("granularity", ["shrink", "lowrank"])
def test_sums_without_halves_are_refused_where_halves_are_needed(granularity: Any) -> None:
    model = tiny_model("opt")
    results = calibrate(model, create("rtn", Bits.parse("w3")), None, ENGINE)
    with pytest.raises(UserError, match="halves=True"):
        compensate(
            model, results, Compensation(("layer",), granularity), IDS, ENGINE, means=float_means(model, IDS, ENGINE)
        )
