"""Fitting the biases of one unit after another: scopes and streams."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bc.activations import quantizers_of
from bc.calibration import Samples, StopForward, Stream, hooked, on_device
from bc.chains import Chain
from bc.compensation import attach, compensation_of, fold, linear_bias
from bc.errors import QuantizationError, UserError
from bc.measuring import Measure
from bc.parts import Captured, find, run_captured, run_fed
from bc.quantizers.base import SiteResult
from bc.regularise import Estimates, LowRank, low_rank, shrink
from bc.report import SiteReport
from bc.rivals import fit_affine, fit_classic, fit_linear_map
from bc.settings import REGULARISED, Compensation
from bc.sinks import find_sinks
from bc.sites import Site, Unit
from bc.statistics import PositionSums

Capture = Callable[[Chain, Samples], Stream]
Sums = dict[str, PositionSums]


class Fit:
    """Fits and measures the biases of a model's units, in order.

    Args:
        chain: The model.
        settings: Scope, granularity and stream.
        capture: Makes a stream of samples.
        results: How sites are quantized; ``affine`` changes them.
        means: Sums of the float inputs of each group of Linears, by the name of its first, or None to collect them.
    """

    def __init__(
        self, chain: Chain, settings: Compensation, capture: Capture, results: dict[str, SiteResult], means: Sums | None
    ) -> None:
        self.chain, self.settings = chain, settings
        self.capture, self.results, self.means = capture, dict(results), means
        self.dtype = getattr(torch, settings.dtype)
        self.float_fit: Stream | None = None
        self.quantized_fit: Stream | None = None
        self.stage_fit: Stream | None = None  # from the float input of a stage through its quantized units
        self.measure = Measure(chain, settings, set(results))
        self.seconds_measure = 0.0

    # Streams ----------------------------------------------------------------------------------------------------------

    def open_streams(self, samples: Samples | None, calibration: Samples | None, held_out: Samples | None) -> None:
        """Capture the inputs of the first unit for whatever the settings need."""
        s = self.settings
        parts = any(scope not in ("layer", "model") for scope in s.scope) or s.method == "affine"
        wants_quantized = s.enabled and (s.stream == "quantized" or "model" in s.scope)
        closed = self.means is not None or s.method == "classic"
        wants_float = parts or "model" in s.scope or ("layer" in s.scope and not closed)
        if wants_float or wants_quantized:
            if samples is None:
                raise UserError(f"calibration: bc.scope={'+'.join(s.scope)} needs calibration samples; give some")
            first = self.capture(self.chain, samples)
            first.halves = s.granularity in REGULARISED
            self.float_fit = first if wants_float else None
            self.quantized_fit = (first.fork() if wants_float else first) if wants_quantized else None
        for name, part in (("calibration", calibration), ("held_out", held_out)):
            if part is not None:
                self.measure.add(name, self.capture(self.chain, part))

    # Fitting ----------------------------------------------------------------------------------------------------------

    def unit(self, index: int, source: nn.Module) -> list[SiteReport]:
        """Compensate a quantized unit, measure it, and move all streams past it.

        Args:
            index: Number of the unit; biases are attached to its module.
            source: A copy of its module with float weights.

        Returns:
            A report for every quantized site and every compensated part.
        """
        unit = self.chain.units[index]
        stage_opens, stage_ends = self._stage_edges(index)
        if stage_opens and self.settings.stream == "float":
            assert self.float_fit is not None
            self.stage_fit = self.float_fit.fork()
        if "layer" in self.settings.scope:
            self._fit_layers(unit, source)
        scopes = [scope for scope in unit.regions if scope in self.settings.scope]
        if self.settings.method == "linear":
            if scopes:
                fit_linear_map(self, unit, source)
            scopes = []
        for scope in scopes:
            self._region(unit, scope, source, advance=scope == scopes[-1])
        started = time.perf_counter()
        reports = self.measure.unit(unit, source)
        self.seconds_measure += time.perf_counter() - started
        if self.float_fit is not None and not scopes:
            self.float_fit.advance(source)
        return reports + self._past(unit, stage_ends)

    def _fit_layers(self, unit: Unit, source: nn.Module) -> None:
        if self.settings.method == "affine":
            fit_affine(self, unit, source)
        elif self.settings.method == "classic":
            fit_classic(self, unit, source)
        elif self.settings.stream == "quantized":
            self._layers_on_quantized_stream(unit, source)
        else:
            self._layers(unit, source)

    def _past(self, unit: Unit, stage_ends: bool) -> list[SiteReport]:
        """Move the quantized streams past a unit, and compensate the stage that ends with it."""
        reports: list[SiteReport] = []
        for stream in (self.stage_fit, self.quantized_fit):
            if stream is None:
                continue
            stream.advance(unit.module)
            if stage_ends and not reports:  # on the float stream, the other one passes the bias as it goes
                reports.append(self._stage(unit, stream))
        self.stage_fit = None if stage_ends else self.stage_fit
        self.measure.past(unit)
        return reports

    def _stage_edges(self, index: int) -> tuple[bool, bool]:
        """Whether a unit opens and whether it ends a stage that is to be compensated."""
        units = self.chain.units
        mine = units[index].stage
        if mine is None or "stage" not in self.settings.scope:
            return False, False
        return index == 0 or units[index - 1].stage != mine, index + 1 == len(units) or units[index + 1].stage != mine

    def attach(self, site: str, module: nn.Module, bias: Tensor | LowRank, layout: str = "tokens") -> None:
        """Compensate a module with a bias of the settings' granularity; errors name the site."""
        try:
            attach(module, bias, self.settings.granularity, self.chain.context, self.dtype, layout)
        except QuantizationError as error:
            raise QuantizationError(f"{site}: {error}") from error

    def leading(self, unit: Unit, layout: str) -> int:
        """Leading positions of a site that have a bias of their own under granularity ``sink``."""
        if self.settings.granularity != "sink" or layout == "image":
            return 0
        return self.chain.sink_positions(unit, self.settings.sink_positions)

    def _table(
        self,
        unit: Unit,
        sums: Sequence[PositionSums],
        rows: Callable[..., Tensor] = lambda mean: mean,
        layout: str = "tokens",
        weights: int = 0,
    ) -> Tensor | LowRank:
        """A bias from statistics.

        Args:
            unit: Where.
            sums: Of what the bias is a linear map of: inputs, or differences of outputs.
            rows: Their means ↦ rows of the bias.
            layout: Of the site's output.
            weights: Of the site; 0 where it has none and the unit's mean counts.
        """
        s = self.settings
        asked = self.chain.sink_positions(unit, s.sink_positions or find_sinks(sums[0])) if layout != "image" else 0
        if s.granularity not in REGULARISED:
            return rows(*(part.mean(s.granularity, asked) for part in sums))
        parts = [part.estimates() for part in sums]
        tables = [rows(*(getattr(e, name) for e in parts)) for name in ("whole", "first", "second")]
        estimates = Estimates(tables[0], tables[1], tables[2], parts[0].counts)
        if s.granularity == "shrink":
            return shrink(estimates, asked)
        weights = weights or unit.mean_weights
        values = max(1, estimates.whole.shape[0] - asked + estimates.whole.shape[1])
        bits = torch.finfo(self.dtype).bits
        return low_rank(estimates, asked, int(s.budget * weights / (bits * values)))

    def sites(self, unit: Unit) -> list[tuple[Site, ...]]:
        """Groups of the sites of a unit that are to be compensated."""
        kinds = self.settings.kinds
        groups = [tuple(s for s in g if s.kind in kinds and s.name in self.results) for g in unit.groups]
        return [group for group in groups if group]

    def _layers(self, unit: Unit, source: nn.Module) -> None:
        """On the float stream: W E[x] − Ŵ E[q(x)], and for sites that are not Linears the mean difference."""
        sums = self.means if self.means is not None else self._float_sums(unit, source)
        for group in self.sites(unit):
            for site in group:
                if site.kind != "linear":
                    bias = self._table(unit, [sums[site.name]], layout=site.layout)
                    self.attach(site.name, site.module, bias, site.layout)
                    continue
                seen = sums.get(f"{site.name} quantized")
                self._linear(unit, site, source, sums[group[0].name], seen)

    def _linear(self, unit: Unit, site: Site, source: nn.Module, x: PositionSums, x_hat: PositionSums | None) -> None:
        weight: Any = find(source, unit.path(site)).weight
        quantized: Any = site.module.weight

        def rows(*means: Tensor) -> Tensor:
            return linear_bias(weight, quantized, *(mean.to(weight.device) for mean in means))

        sums = [x] if x_hat is None else [x, x_hat]
        self.attach(site.name, site.module, self._table(unit, sums, rows, weights=weight.numel()))

    def _float_sums(self, unit: Unit, source: nn.Module) -> Sums:
        """One pass over the float stream: inputs of Linears as they are and quantized; other sites' differences."""
        assert self.float_fit is not None
        stream, sums = self.float_fit, Sums()
        hooks: dict[nn.Module, Any] = {}
        for group in self.sites(unit):
            for site in group:
                hooks[find(source, unit.path(site))] = _float_hook(stream, sums, site, site is group[0])
        with hooked(hooks, inputs=False):
            for b in range(len(stream)):
                stream.run(source, b)
        return sums

    def _layers_on_quantized_stream(self, unit: Unit, source: nn.Module) -> None:
        """Group by group, on what the quantized, already compensated model feeds the site."""
        assert self.quantized_fit is not None
        goals: Sums = self.means if self.means is not None else {}
        if self.means is None:
            assert self.float_fit is not None
            hooks = {find(source, unit.path(g[0])): _edge_hook(self.float_fit, goals, g[0]) for g in self.sites(unit)}
            with hooked(hooks, inputs=False):
                for b in range(len(self.float_fit)):
                    self.float_fit.run(source, b)
        for group in self.sites(unit):
            first, seen = group[0], Sums()
            with hooked({first.module: _edge_hook(self.quantized_fit, seen, first, stop=True)}, inputs=False):
                for b in range(len(self.quantized_fit)):
                    try:
                        self.quantized_fit.run(unit.module, b)
                    except StopForward:
                        pass
            goal, got = goals[first.name], seen[first.name]
            if first.kind != "linear":
                bias = self._table(unit, [goal, got], lambda a, b: a - b, first.layout)
                self.attach(first.name, first.module, bias, first.layout)
                continue
            for site in group:
                self._linear(unit, site, source, goal, got)

    def _region(self, unit: Unit, scope: str, source: nn.Module, *, advance: bool) -> None:
        """Mean difference of a part's paired outputs; on the float stream the part is fed its float input."""
        assert self.float_fit is not None
        stream, region, sums = self.float_fit, unit.regions[scope], Sums()
        fed = self.quantized_fit if self.settings.stream == "quantized" else None
        for b in range(len(stream)):
            goal, got = Captured(source, region), Captured(unit.module, region)
            result = run_captured(stream, source, b, [goal])
            if fed is not None:
                run_captured(fed, unit.module, b, [got])
                output = got.output
            else:
                output = run_fed(stream, unit.module, b, got, goal)
            stream.add(sums, scope, goal.output.float() - output.float())
            if advance:
                stream.cache[b] = result
        self.attach(unit.region_name(scope), find(unit.module, region.exit), self._table(unit, [sums[scope]]))

    def _stage(self, unit: Unit, stream: Stream) -> SiteReport:
        """Bias of a stage: mean difference of what leaves it; the streams are past its last unit."""
        assert self.float_fit is not None
        name = unit.name.rpartition(".blocks.")[0] or unit.name
        bias = self._difference(unit, self.float_fit, stream, lambda s, b: s.cache[b])
        if stream is self.quantized_fit:  # it is past the unit already
            late = attach(nn.Identity(), bias, self.settings.granularity, dtype=self.dtype)
            for b in range(len(stream)):
                stream.cache[b] = late(stream.cache[b])
        shared = compensation_of(unit.module) is not None  # the block's own, which accounts for it
        self.attach(name, unit.module, bias)
        return _report(name, "stage", unit.module, shared=shared)

    def _difference(
        self, unit: Unit, goal: Stream, got: Stream, read: Callable[[Stream, int], Tensor]
    ) -> Tensor | LowRank:
        sums = Sums()
        for b in range(len(goal)):
            goal.use(b)
            goal.add(sums, "", read(goal, b).float() - read(got, b).float())
        return self._table(unit, [sums[""]])

    @torch.no_grad()
    def model_scope(self, device: torch.device) -> list[SiteReport]:
        """Bias of the logits: mean difference between the float and the compensated quantized model."""
        assert self.float_fit is not None and self.quantized_fit is not None
        with on_device(device, *self.chain.tail):
            bias = self._difference(self.chain.units[-1], self.float_fit, self.quantized_fit, self.chain.logits)
        reports = []
        for name in self.chain.heads:
            head = self.chain.model.get_submodule(name)
            self.attach(name, head, bias)
            head.to(next(head.parameters()).device)  # the bias comes from where the logits are
            reports.append(_report(name, "model", head))
            if getattr(head, "bias", None) is not None and fold(head):
                reports[-1].folded, reports[-1].bias_parameters = True, 0
        return reports


def _report(name: str, scope: str, module: nn.Module, *, shared: bool = False) -> SiteReport:
    child = compensation_of(module)
    assert child is not None
    return SiteReport(name, scope, child.granularity, 0 if shared else child.size)


def _float_hook(stream: Stream, sums: Sums, site: Site, first: bool) -> Callable[..., None]:
    """Hook of a float site's output that collects what the closed form or the pair of outputs needs."""

    def take(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if site.kind != "linear":
            stream.add(sums, site.name, output.float() - site.module(*args).float(), site.layout)
            return
        if first:
            stream.add(sums, site.name, args[0])
        quantizers = quantizers_of(site.module)
        if quantizers is not None:
            stream.add(sums, f"{site.name} quantized", quantizers.quantized(args)[0])

    return take


def _edge_hook(stream: Stream, sums: Sums, site: Site, stop: bool = False) -> Callable[..., None]:
    """Hook of a site that collects the inputs of a Linear and the outputs of any other."""

    def take(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        linear = site.kind == "linear"
        stream.add(sums, site.name, args[0] if linear else output, "tokens" if linear else site.layout)
        if stop:
            raise StopForward

    return take
