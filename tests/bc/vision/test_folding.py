"""A bias of attention, MLP or downsample goes into the Linear that they end in, and changes nothing else."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bc import quantizers
from bc.chains import VisionChain
from bc.compensation import BiasCompensation, bias_parameters
from bc.pipeline import Engine, calibrate, compensate
from bc.report import Report
from bc.settings import Bits, Compensation
from bc.sites import Region, Unit
from bc.vision import wrap
from tests.bc.vision.conftest import make

ENGINE = Engine(torch.device("cpu"), 3)
PARTS = ("attention", "mlp", "downsample")
ENDS = {"attention": "attn.proj", "mlp": "mlp.fc2", "downsample": "reduction"}


def behind_the_module(unit: Unit) -> Unit:
    """The unit with parts whose bias is added to what the whole module returns."""
    return replace(unit, regions={scope: Region(r.entry, r.entry) for scope, r in unit.regions.items()})


def compensated(
    kind: str, settings: Compensation, method: tuple[str, str] = ("minmax", "w4a4"), monkeypatch: Any = None
) -> tuple[nn.Module, Report, Tensor]:
    model, _ = make(kind)
    wrap(model)
    images = torch.randn(7, 3, *(2 * [24 if kind != "swin" else 32]), generator=torch.Generator().manual_seed(1))
    results = calibrate(model, quantizers.create(method[0], Bits.parse(method[1])), images, ENGINE)
    twin = copy.deepcopy(model)
    if monkeypatch is not None:
        made = VisionChain.__init__

        def whole(self: VisionChain, model: nn.Module) -> None:
            made(self, model)
            self.units = [behind_the_module(unit) for unit in self.units]

        monkeypatch.setattr(VisionChain, "__init__", whole)
    report = compensate(twin, results, settings, images, ENGINE)
    return twin, report, twin(images)


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("kind", ["vit", "swiglu", "swin"])
def test_a_channel_bias_folds_and_is_counted_once(kind: str, layers: bool) -> None:
    scope = (*(("layer",) if layers else ()), *(PARTS if kind == "swin" else PARTS[:2]))
    model, report, _ = compensated(kind, Compensation(scope, "channel", kinds=("linear", "conv")))
    assert not any(isinstance(module, BiasCompensation) for module in model.modules())
    parts = [site for site in report.sites if site.scope in PARTS]
    assert {site.scope for site in parts} == set(scope) - {"layer"}
    assert all(site.site.endswith(ENDS[site.scope]) and site.granularity == "channel" for site in parts)
    assert all(site.folded != layers for site in parts)  # scope layer accounts for what it shares
    made = [
        m.reduction.bias.numel()
        for name, m in model.named_modules()
        if name.endswith("downsample") and hasattr(m, "reduction")
    ]
    assert report.bias_parameters == sum(made)  # all others had a bias
    assert bool(made) == (kind == "swin")


@pytest.mark.parametrize("stream", ["float", "quantized"])
@pytest.mark.parametrize("granularity", ["channel", "positional", "sink"])
@pytest.mark.parametrize(("kind", "layers"), [("vit", False), ("vit", True), ("swin", True)])
def test_outputs_are_those_of_a_bias_behind_the_module(
    kind: str, layers: bool, granularity: Any, stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope = (*(("layer",) if layers else ()), *(PARTS if kind == "swin" else PARTS[:2]))
    settings = Compensation(scope, granularity, stream, dtype="float32")
    weights = ("rtn", "w3")  # inputs that are rounded would make steps of differences in the last digit
    _, report, ours = compensated(kind, settings, weights)
    other, before, theirs = compensated(kind, settings, weights, monkeypatch)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    assert report.bias_parameters < before.bias_parameters or (granularity == "positional" and not layers)
    assert before.bias_parameters >= bias_parameters(other)
