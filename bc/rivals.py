"""Fitting of what Bias Compensation is compared with: affine outputs, linear maps, data-free bias correction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bc.affine import ChannelMoments, fold_affine
from bc.calibration import Stream
from bc.compensation import linear_bias
from bc.linear_map import RidgeSums, attach_map, explained
from bc.parts import Captured, find, run_captured, run_fed
from bc.sites import WHOLE, Region, Site, Unit
from bc.statistics import PositionSums, odd_samples

if TYPE_CHECKING:
    from bc.fitting import Fit


def fit_affine(fit: Fit, unit: Unit, source: nn.Module) -> bool:
    """Scale and shift of every Linear and convolution, in forward order.

    The scale folds into the quantized weight. The shift does too, into the bias, with granularity ``channel``; with
    ``sink`` it is the row that later positions share, and the leading positions, which do not count for the scale, have
    rows of their own. On the blended stream only the scale is fitted, on the float model's inputs: noise in the inputs
    would draw it toward zero (regression dilution). The biases that the scaled sites need there come after.

    Returns:
        Whether the float stream has been moved past the unit, which is done where one pass serves all sites, unless the
        unit's inputs are needed still.
    """
    groups, stream = fit.sites(unit), fit.float_fit
    assert stream is not None
    if fit.settings.stream != "quantized":  # no site sees another's error
        groups = [tuple(site for group in groups for site in group)]
    needed = fit.settings.stream == "quantized" or (fit.settings.stream == "blended" and fit.means is None)
    moves = not needed and not fit.last
    for group in groups:
        pairs = {site.name: PairMoments(fit.leading(unit, site.layout)) for site in group}
        for b in range(len(stream) if group else 0):
            outputs, result = _pairs(fit, unit, source, group, b, whole=moves)
            for site, goal, output in outputs:
                pairs[site.name].add(stream, goal, output, site.layout)
            if result is not None:
                stream.cache[b] = result
        for site in group:
            scale, shift, rows = pairs[site.name].solve()
            folded = shift if rows is None else None
            if fit.settings.stream == "blended":
                own: Any = site.module.bias
                folded, rows = None if own is None else (1 - scale.to(own)) * own, None  # it stays as it is
            fit.measure.affine(site.module)
            fit.results[site.name] = fold_affine(site.module, fit.results[site.name], scale, folded)
            if rows is not None:
                fit.attach(site.name, site.module, rows, site.layout)
    return moves and bool(groups[0])


class PairMoments:
    """Moments of the pairs of outputs of one site: of leading positions one by one, of the rest together.

    Args:
        leading: Number of leading positions.
    """

    def __init__(self, leading: int) -> None:
        self.leading = leading
        self.rest: ChannelMoments | None = None
        self.sums: dict[str, PositionSums] = {}

    def add(self, stream: Stream, goal: Tensor, output: Tensor, layout: str) -> None:
        """Add a pair of outputs of the batch under way."""
        one, two = (stream.rows(value, layout) for value in (goal, output))
        if self.rest is None:  # as many as leave others
            self.leading = min(self.leading, stream.longest(one) - 1)
            self.rest = ChannelMoments(one.shape[-1], one.device)
        self.rest.add(one, two, stream.later_than(self.leading, one))
        if self.leading:
            stream.add(self.sums, "goal", goal, layout)
            stream.add(self.sums, "output", output, layout)

    def solve(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(scale, shift, rows of a bias for the scaled output; None where no position is apart)."""
        assert self.rest is not None
        scale, shift = self.rest.solve()
        if not self.leading:
            return scale, shift, None
        goal, output = (self.sums[name].mean("sink", self.leading)[:-1] for name in ("goal", "output"))
        return scale, shift, torch.cat([goal - scale * output, shift[None]])


def _pairs(
    fit: Fit, unit: Unit, source: nn.Module, sites: tuple[Site, ...], b: int, *, whole: bool
) -> tuple[list[tuple[Site, Tensor, Tensor]], Tensor | None]:
    """Float and quantized outputs of sites that share an input, for one batch; the unit's float output if wanted."""
    assert fit.float_fit is not None
    regions = [Region(unit.path(site), unit.path(site)) for site in sites]
    goals = [Captured(source, region) for region in regions]
    result = run_captured(fit.float_fit, source, b, goals, whole=whole)
    if fit.settings.stream == "quantized":
        assert fit.quantized_fit is not None
        got = [Captured(unit.module, region) for region in regions]
        run_captured(fit.quantized_fit, unit.module, b, got, whole=False)
        return [(site, goal.output, part.output) for site, goal, part in zip(sites, goals, got, strict=True)], result
    return [(site, goal.output, site.module(*goal.args)) for site, goal in zip(sites, goals, strict=True)], result


def fit_linear_map(fit: Fit, unit: Unit, source: nn.Module) -> None:
    """Linear map of a block's input, kept where either half's map explains the other half's error."""
    stream = fit.float_fit
    assert stream is not None
    halves: list[RidgeSums] | None = None
    seen = 0
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
        for half, part in enumerate(_halves(stream, x, error, seen)):
            if len(part[0]):
                halves[half].add(*part)
        seen += stream.call.size
    assert halves is not None
    one, two = halves
    if explained(one, two) > 0 and explained(two, one) > 0:
        attach_map(unit.module, one.plus(two).solve(), fit.dtype)


def _halves(stream: Stream, x: Tensor, error: Tensor, seen: int) -> list[tuple[Tensor, Tensor]]:
    """Rows of the even and of the odd samples of a batch, counted over batches."""
    odd = odd_samples(seen, len(x), len(x) // stream.call.size, x.device)
    found = []
    for part in (~odd, odd):
        valid = None if stream.call.valid is None else stream.call.valid[part]
        rows = [t[part][valid] if valid is not None else t[part].flatten(0, -2) for t in (x, error)]
        found.append((rows[0], rows[1]))
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
