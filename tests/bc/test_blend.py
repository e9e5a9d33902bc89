"""The blended stream: the float and the quantized stream's biases, weighed."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from bc.errors import UserError
from bc.models import family_of
from bc.pipeline import compensate
from bc.settings import Compensation
from bc.vision import sites as vision_sites
from bc.vision import units
from tests.bc.test_pipeline import FAMILIES, IDS, forward, group_means, quantized, recording, sites, tokens_of
from tests.bc.vision.test_engine import ENGINE, fed_outputs, images_for, outputs, place_mean, ready
from tests.bc.vision.test_engine import quantized as quantized_sites
from tests.conftest import tiny_model

BLEND = Compensation(("layer",), "positional", "blended", dtype="float32")


SHAPES = [("channel", "bias"), ("sink", "bias"), ("positional", "bias"), ("channel", "affine"), ("sink", "affine")]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("granularity", "method"), SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_what_a_language_models_site_lacks_on_either_stream_adds_up_to_nothing(
    name: str, granularity: Any, method: Any, share: float
) -> None:
    """Share × the mean error inside the finished model + (1 − share) × that on the float model's inputs = 0."""
    model = tiny_model(name)
    result, _ = quantized(model, replace(BLEND, granularity=granularity, method=method, blend=share))
    exact, ours = (dict(sites(m, family_of(m))) for m in (model, result))
    with recording(exact.values()) as a:
        forward(model, IDS)
    with recording(ours.values()) as b:
        forward(result, IDS)
    largest = 0.0
    for site, module in exact.items():
        args, _, goal = a[module]
        fed = ours[site](tokens_of(args[0], len(IDS)))
        parts = [
            group_means(tokens_of(goal, len(IDS)) - tokens_of(out, len(IDS)), granularity)
            for out in (b[ours[site]][2], fed)
        ]
        assert (share * parts[0] + (1 - share) * parts[1]).abs().max() < 5e-5, site
        largest = max(largest, *(part.abs().max().item() for part in parts))
    assert largest > 1e-3  # the streams differ


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("granularity", ["sink", "shrink", "lowrank", "positional"])
@pytest.mark.parametrize("scope", [("layer",), ("layer", "block"), ("attention", "mlp"), ("layer", "block", "model")])
@pytest.mark.parametrize(("share", "stream"), [(0.0, "float"), (1.0, "quantized")])
def test_its_ends_are_the_two_streams(
    name: str, granularity: Any, scope: tuple[str, ...], share: float, stream: Any
) -> None:
    model = tiny_model(name)
    settings = replace(BLEND, scope=scope, granularity=granularity, budget=20.0)
    one, _ = quantized(model, replace(settings, blend=share))
    two, _ = quantized(model, replace(settings, stream=stream))
    torch.testing.assert_close(forward(one, IDS), forward(two, IDS), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("leading", [0, 1, 2])
def test_its_affine_scale_is_that_of_the_float_models_inputs(name: str, leading: int) -> None:
    """Against `lstsq` on materialised outputs, of every site; its own bias stays as it is, but for what is folded."""
    model = tiny_model(name)
    shape = (
        replace(BLEND, granularity="sink", sink_positions=leading) if leading else replace(BLEND, granularity="channel")
    )
    result, _ = quantized(model, replace(shape, method="affine"))
    plain, _ = quantized(model, Compensation())
    exact, ours, bare = (dict(sites(m, family_of(m))) for m in (model, result, plain))
    with recording(exact.values()) as a:
        forward(model, IDS)
    for site, module in exact.items():
        x, goal = (tokens_of(t, len(IDS))[:, leading:].flatten(0, 1) for t in (a[module][0][0], a[module][2]))
        weight = bare[site].weight
        output = x @ weight.T
        line = torch.stack([output.double(), torch.ones_like(output).double()], -1).transpose(0, 1)
        scale = torch.linalg.lstsq(line, goal.double().T[..., None]).solution[:, 0, 0].float()
        torch.testing.assert_close(ours[site].weight, scale[:, None] * weight, atol=1e-5, rtol=2e-3)


@pytest.mark.parametrize("kind", ["vit", "deit_distilled", "swin"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scope", [("layer",), ("block",), ("affine",)])
def test_what_a_vision_models_part_lacks_on_either_stream_adds_up_to_nothing(
    kind: str, scope: tuple[str, ...], share: float
) -> None:
    model, few = ready(kind)
    images = images_for(few)
    twin = copy.deepcopy(model)
    results = quantized_sites(model, images)
    settings = replace(BLEND, blend=share)
    if scope == ("affine",):
        settings = replace(settings, granularity="channel", method="affine")
    else:
        settings = replace(settings, scope=scope)
    compensate(twin, results, settings, images, ENGINE)
    kinds = {site.name: site.kind for site in vision_sites(model) if site.kind != "matmul" or settings.method == "bias"}
    names = list(kinds)
    if "block" in scope:
        names = [unit.region_name("block") for unit in units(model) if "block" in unit.regions]
    exact, ours = outputs(model, images, names), outputs(twin, images, names)
    for name in names:
        goal, fed = fed_outputs(model, twin, images, name)
        lacking = [place_mean(exact[name] - out) for out in (ours[name], fed)]
        assert torch.equal(goal, exact[name])
        left = share * lacking[0] + (1 - share) * lacking[1]
        if settings.granularity == "channel":
            left = left.flatten(1).mean(1) if kinds[name] == "conv" else left.reshape(-1, left.shape[-1]).mean(0)
        assert left.abs().max() < 1e-4, name


def test_settings_that_do_not_go_with_it_are_refused() -> None:
    with pytest.raises(UserError, match=r"bc.blend: 1.5 is not allowed; use a share from 0 to 1"):
        replace(BLEND, blend=1.5)
    with pytest.raises(UserError, match=r"bc.stream: 'blended' does not go with bc.method=linear"):
        Compensation(("block",), stream="blended", method="linear")
