"""Fitting of what Bias Compensation is compared with: affine outputs, linear maps, data-free bias correction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from bc.affine import ChannelMoments, fold_affine
from bc.calibration import Stream
from bc.compensation import linear_bias
from bc.linear_map import RidgeSums, attach_map, explained
from bc.parts import Captured, find, run_captured, run_fed
from bc.sites import WHOLE, Region, Site, Unit

if TYPE_CHECKING:
    from bc.fitting import Fit


def fit_affine(fit: Fit, unit: Unit, source: nn.Module) -> None:
    """Scale and shift of every Linear and convolution, in forward order, folded into the quantized weight."""
    for group in fit.sites(unit):
        sites = [site for site in group if site.kind != "matmul"]
        moments: dict[str, ChannelMoments] = {}
        assert fit.float_fit is not None
        for b in range(len(fit.float_fit) if sites else 0):
            for site, goal, output in _pairs(fit, unit, source, sites, b):
                rows = tuple(fit.float_fit.rows(value, site.layout) for value in (goal, output))
                if site.name not in moments:
                    moments[site.name] = ChannelMoments(rows[0].shape[-1], rows[0].device)
                moments[site.name].add(rows[0], rows[1], fit.float_fit.call.valid)
        for site in sites:
            result = fold_affine(site.module, fit.results[site.name], *moments[site.name].solve())
            fit.results[site.name] = result


def _pairs(fit: Fit, unit: Unit, source: nn.Module, sites: list[Site], b: int) -> list[tuple[Site, Tensor, Tensor]]:
    """Float and quantized outputs of sites that share an input, for one batch."""
    assert fit.float_fit is not None
    regions = [Region(unit.path(site), unit.path(site)) for site in sites]
    goals = [Captured(source, region) for region in regions]
    run_captured(fit.float_fit, source, b, goals)
    if fit.settings.stream == "quantized":
        assert fit.quantized_fit is not None
        got = [Captured(unit.module, region) for region in regions]
        run_captured(fit.quantized_fit, unit.module, b, got)
        return [(site, goal.output, part.output) for site, goal, part in zip(sites, goals, got, strict=True)]
    return [(site, goal.output, site.module(*goal.args)) for site, goal in zip(sites, goals, strict=True)]


def fit_linear_map(fit: Fit, unit: Unit, source: nn.Module) -> None:
    """Linear map of a block's input, kept where either half's map explains the other half's error."""
    stream = fit.float_fit
    assert stream is not None
    halves: list[RidgeSums] | None = None
    for b in range(len(stream)):
        goal, got = Captured(source, WHOLE), Captured(unit.module, WHOLE)
        run_captured(stream, source, b, [goal])
        fed = fit.quantized_fit if fit.settings.stream == "quantized" else None
        if fed is None:
            output, inputs = run_fed(stream, unit.module, b, got, goal), stream.cache[b]
        else:
            run_captured(fed, unit.module, b, [got])
            output, inputs = got.output, fed.cache[b]
        error = stream.rows(goal.output.float() - output.float())
        x = stream.rows(inputs)
        halves = halves or [RidgeSums(x.shape[2], error.shape[2], x.device) for _ in range(2)]
        for half, part in _halves(stream, x, error, b):
            halves[half].add(*part)
    assert halves is not None
    one, two = halves
    if explained(one, two) > 0 and explained(two, one) > 0:
        attach_map(unit.module, one.plus(two).solve(), fit.dtype)


def _halves(stream: Stream, x: Tensor, error: Tensor, b: int) -> list[tuple[int, tuple[Tensor, Tensor]]]:
    """Rows of the first and the second half of a batch; single samples go to either in turn."""
    middle = len(x) // 2 if len(x) > 1 else (b + 1) % 2
    found = []
    for half, part in enumerate((slice(0, middle), slice(middle, None))):
        if len(x[part]) == 0:
            continue
        valid = None if stream.call.valid is None else stream.call.valid[part]
        rows = [t[part][valid] if valid is not None else t[part].flatten(0, -2) for t in (x, error)]
        found.append((half, (rows[0], rows[1])))
    return found


def fit_classic(fit: Fit, unit: Unit, source: nn.Module) -> None:
    """Bias correction without data: (W − Ŵ) β for a Linear that follows a LayerNorm with bias β.

    The mean of a LayerNorm's output over its statistics is its own bias, as that of a batch norm in Nagel et al.,
    "Data-Free Quantization through Weight Equalization and Bias Correction" (ICCV 2019, arXiv 1906.04721), section 4.2.
    """
    for group in fit.sites(unit):
        for site in group:
            norm: Any = site.norm
            if site.kind != "linear" or norm is None or norm.bias is None:
                continue
            weight: Any = find(source, unit.path(site)).weight
            quantized: Any = site.module.weight
            bias = linear_bias(weight, quantized, norm.bias.detach()[None].to(weight.device))
            fit.attach(site.name, site.module, bias)
