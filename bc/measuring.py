"""Output errors of every site before and after compensation, on streams of their own; folding of what folds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bc.calibration import Stream
from bc.chains import Chain
from bc.compensation import compensation_of, fold
from bc.linear_map import map_of
from bc.parts import Captured, find, run_captured, run_fed
from bc.report import ErrorSums, SiteReport
from bc.settings import Compensation
from bc.sites import Region, Unit

Plain = tuple[Tensor, "nn.Parameter | None"]  # a site's quantized weight and its bias


class Measure:
    """Measures units in order.

    Args:
        chain: The model.
        settings: What is compensated.
        quantized: Names of the sites that are quantized.
    """

    def __init__(self, chain: Chain, settings: Compensation, quantized: set[str]) -> None:
        self.chain, self.settings, self.quantized = chain, settings, quantized
        self.streams: dict[str, tuple[Stream, Stream | None]] = {}
        self.plain: dict[nn.Module, Plain] = {}

    def affine(self, module: nn.Module) -> None:
        """Note a site's quantized weight and its bias, as they are before a scale and a shift go into them."""
        own: Any = module
        self.plain[module] = (own.weight.data, own.bias)

    def add(self, name: str, stream: Stream) -> None:
        """Measure on one more set of samples: ``calibration`` or ``held_out``."""
        quantized = self.settings.follows and self.settings.enabled
        self.streams[name] = (stream, stream.fork() if quantized else None)

    def unit(self, unit: Unit, source: nn.Module) -> list[SiteReport]:
        """Errors of every quantized site and compensated part; the float streams move past the unit.

        Args:
            unit: The unit, quantized and compensated.
            source: A copy of its module with float weights.
        """
        sites = [site for site in unit.sites if site.name in self.quantized]
        layers = {unit.path(site): SiteReport(site.name, "layer") for site in sites}
        scopes = [scope for scope in unit.regions if scope in self.settings.scope]
        parts = {scope: SiteReport(unit.region_name(scope), scope) for scope in scopes}
        for name, (stream, fed) in self.streams.items():
            for b in range(len(stream)):
                stream.cache[b] = self._batch(name, stream, fed, b, unit, source, {**layers, **parts})
        for scope, report in parts.items():  # a part may end in a layer and share its bias: the layer accounts for it
            exit_path = unit.regions[scope].exit
            shared = exit_path in layers and "layer" in self.settings.scope
            finish(report, find(unit.module, exit_path), shared=shared)
        exits = set() if "layer" in self.settings.scope else {unit.regions[scope].exit for scope in scopes}
        for path, report in layers.items():  # without scope layer the bias at a layer is a part's
            site = find(unit.module, path)
            finish(report, site, shared=path in exits, plain=self.plain.get(site))
        self.plain.clear()
        return [*layers.values(), *parts.values()]

    def past(self, unit: Unit) -> None:
        """Move the quantized streams past a unit."""
        for _, fed in self.streams.values():
            if fed is not None:
                fed.advance(unit.module)

    def _batch(
        self,
        name: str,
        stream: Stream,
        fed: Stream | None,
        b: int,
        unit: Unit,
        source: nn.Module,
        reports: dict[str, SiteReport],
    ) -> Tensor:
        """Add the errors of one batch to every site's report; returns the float unit's output."""
        regions = {key: unit.regions.get(key, Region(key, key)) for key in reports}
        layouts = {unit.path(site): site.layout for site in unit.sites}
        goals = {key: Captured(source, region) for key, region in regions.items()}
        result = run_captured(stream, source, b, goals.values())
        assert result is not None
        got = {key: Captured(unit.module, region) for key, region in regions.items()}
        if fed is not None:
            run_captured(fed, unit.module, b, got.values(), whole=False)
        for key, report in reports.items():
            goal, site = goals[key], got[key].exit
            if fed is not None:
                output = got[key].output
            elif key in unit.regions:
                output = run_fed(stream, unit.module, b, got[key], goal)
            else:
                stream.use(b)
                output = site(*goal.args)
            layout = layouts.get(key, "tokens")
            added = None if (linear := map_of(site)) is None else linear.extra(got[key].args, got[key].kwargs)
            change = None
            if site in self.plain and key in layouts:
                change = output - self._unscaled(site, (goal if fed is None else got[key]).args)
            self._add(getattr(report, name), stream, goal.output, output, site, layout, added, change)
        return result

    def _unscaled(self, site: Any, args: tuple[Any, ...]) -> Tensor:
        """Output of an affine site, with its bias, on the quantized weight that was not scaled."""
        kept = site.weight.data, site.bias
        site.weight.data, site.bias = self.plain[site]
        try:
            output: Tensor = site(*args)
        finally:
            site.weight.data, site.bias = kept
        return output

    @staticmethod
    def _add(
        sums: ErrorSums,
        stream: Stream,
        goal: Tensor,
        output: Tensor,
        site: nn.Module,
        layout: str,
        added: Tensor | None,
        change: Tensor | None,
    ) -> None:
        """Add errors; ``added`` is what a linear map added to the output, ``change`` what a scale and a shift did."""
        child = compensation_of(site)
        target = stream.rows(goal, layout)
        if added is not None:
            sums.add(target, stream.rows(output, layout), stream.rows(added, layout), stream.call.valid)
            return
        bias = None if child is None else child.bias if child.shared else child.rows(target.shape[1])
        if change is not None:
            bias = stream.rows(change, layout).float() + (0 if bias is None else bias.float())
        sums.add(target, stream.rows(output, layout), bias, stream.call.valid)


def finish(report: SiteReport, module: nn.Module, *, shared: bool = False, plain: Plain | None = None) -> None:
    """Note a site's bias in its report, and fold it where it folds; ``plain`` is what an affine site was."""
    own: Any = getattr(module, "bias", None)
    if plain is not None:
        report.granularity, report.folded = "affine", True
        report.bias_parameters = own.numel() if plain[1] is None and own is not None else 0
    linear = map_of(module)
    if linear is not None:
        report.granularity, report.bias_parameters = "linear", linear.size
    child = compensation_of(module)
    if child is None:
        return
    report.granularity = child.granularity
    if shared:
        return
    channels = child.bias.shape[1]
    folded = fold(module)
    left = compensation_of(module)
    report.folded = left is None
    report.bias_parameters += (0 if left is None else left.size) + (channels if folded and own is None else 0)
