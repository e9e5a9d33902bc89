"""Fitting the biases of one unit after another: scopes and streams."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bc.calibration import Samples, Stream, on_device
from bc.chains import Chain, head_row
from bc.compensation import attach, compensation_of, fold, folds, linear_bias
from bc.errors import QuantizationError, UserError
from bc.measuring import Measure
from bc.parts import Captured, find, run_captured, run_fed
from bc.passes import Taker, add_local, add_quantized, adding, adding_difference, adding_edges, advance
from bc.quantizers.base import SiteResult
from bc.readout import Readout
from bc.regularise import Allowance, Estimates, LowRank, low_rank, shrink
from bc.report import SiteReport
from bc.rivals import fit_affine, fit_classic, fit_linear_map
from bc.settings import READOUT, REGULARISED, Compensation
from bc.sinks import find_sinks
from bc.sites import WHOLE, Region, Site, Unit
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
        weights = sum(s.weight.numel() for s in chain.sites if s.name in results and s.weight is not None)
        values = settings.budget / torch.finfo(self.dtype).bits * weights
        self.readout = Readout(chain, values) if READOUT in settings.scope else None
        self.reserved = head_row(chain) if "model" in settings.scope else 0  # of the values: for the bias of the logits
        values -= self.reserved if self.readout is None else self.readout.size
        self.allowance = Allowance(max(0.0, values), weights)
        self.behind = 0  # biases behind the sites of the unit under way
        self.float_fit: Stream | None = None
        self.quantized_fit: Stream | None = None
        self.stage_fit: Stream | None = None  # from the float input of a stage through its quantized units
        self.ahead: Stream | None = None  # the float stream past the unit under way, while its inputs are needed still
        self.last = False  # no stream is needed behind the unit under way
        self.measure = Measure(chain, settings, set(results))
        self.seconds_measure = 0.0

    # Streams ----------------------------------------------------------------------------------------------------------

    def open_streams(self, samples: Samples | None, calibration: Samples | None, held_out: Samples | None) -> None:
        """Capture the inputs of the first unit for whatever the settings need."""
        s = self.settings
        parts = any(scope not in ("layer", "model") for scope in s.scope) or s.method == "affine"
        wants_quantized = s.enabled and (s.follows or self.readout is not None or "model" in s.scope)
        closed = self.means is not None or s.method == "classic"
        wants_float = parts or "model" in s.scope or ("layer" in s.scope and not closed)
        if wants_float or wants_quantized:
            if samples is None:
                raise UserError(f"calibration: bc.scope={'+'.join(s.scope)} needs calibration samples; give some")
            first = self.capture(self.chain, samples)
            first.halves = s.wants_halves
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
        stage_opens, stage_ends = self.chain.stage_edges(index) if "stage" in self.settings.scope else (False, False)
        self.last = index + 1 == len(self.chain.units) and not {"model", "stage"} & set(self.settings.scope)
        if stage_opens and self.settings.stream == "float":
            assert self.float_fit is not None
            self.stage_fit = self.float_fit.fork()
        scopes = [scope for scope in unit.regions if scope in self.settings.scope]
        self.behind = len(scopes) + stage_ends
        reads = self.readout if index + 1 == len(self.chain.units) else None
        if reads is not None:
            reads.aim(self, unit, source)
        if not (layers := "layer" in self.settings.scope):
            self._deal(unit, {})
        passed = layers and self._fit_layers(unit, source, scopes)
        if self.settings.method == "linear":
            if scopes:
                fit_linear_map(self, unit, source)
            scopes = []
        for scope in scopes:
            passed |= self._region(unit, scope, source, final=scope == scopes[-1])
        started = time.perf_counter()
        reports = self.measure.unit(unit, source)
        self.seconds_measure += time.perf_counter() - started
        if reads is not None:  # what folds has been folded
            reports += reads.fit(self, unit)
        if self.ahead is not None:
            self.float_fit, self.ahead = self.ahead, None
        elif self.float_fit is not None and not passed and not self.last:
            self.float_fit.advance(source)
        return reports + self._past(unit, stage_ends)

    def _fit_layers(self, unit: Unit, source: nn.Module, scopes: list[str]) -> bool:
        """Fit the unit's sites; says whether the float stream has been run through it."""
        passed = False
        if self.settings.method == "affine":
            passed = fit_affine(self, unit, source)
            if self.settings.stream != "blended":
                return passed
        if self.settings.method == "classic":
            fit_classic(self, unit, source)
            return False
        if self.settings.follows:
            self._layers_on_quantized_stream(unit, source, scopes)
        else:
            self._layers(unit, source, scopes)
        return passed or self.means is None

    def _past(self, unit: Unit, stage_ends: bool) -> list[SiteReport]:
        """Move the quantized streams past a unit, and compensate the stage that ends with it."""
        reports: list[SiteReport] = []
        if self.last:
            return reports
        for stream in (self.stage_fit, self.quantized_fit):
            if stream is None:
                continue
            stream.advance(unit.module)
            if stage_ends and not reports:  # on the float stream, the other one passes the bias as it goes
                reports.append(self._stage(unit, stream))
        self.stage_fit = None if stage_ends else self.stage_fit
        if unit is not self.chain.units[-1]:
            self.measure.past(unit)
        return reports

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
        module: nn.Module,
        sums: Sequence[PositionSums],
        rows: Callable[..., Tensor] = lambda mean: mean,
        layout: str = "tokens",
    ) -> Tensor | LowRank:
        """A bias from statistics.

        Args:
            unit: Where.
            module: Whose output gets it.
            sums: Of what the bias is a linear map of: inputs, or differences of outputs.
            rows: Their means ↦ rows of the bias.
            layout: Of the site's output.
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
        shared = 0 if folds(module) else estimates.whole.shape[1]
        found = low_rank(estimates, asked, self.allowance.share() - shared)
        self.allowance.take(shared + found.size)
        return found

    def _deal(self, unit: Unit, sums: Sums) -> None:
        """Open the allowance of a unit for its sites, as they come, and for the parts behind them."""
        if self.settings.granularity != "lowrank":
            return
        weights = sum(s.weight.numel() for s in unit.sites if s.name in self.results and s.weight is not None)
        costs, needs = [], 0
        for site in itertools.chain(*self.sites(unit)) if "layer" in self.settings.scope else ():
            channels = sums[site.name].total.shape[1] if site.weight is None else len(site.weight)
            shared = 0 if folds(site.module) else channels
            costs.append(channels + shared)
            needs += shared
        costs += self.behind * (costs[-1:] or [1])
        needs += self.behind * next((len(s.weight) for s in reversed(unit.sites) if s.weight is not None), 0)
        self.allowance.open(weights, costs, needs)

    def sites(self, unit: Unit) -> list[tuple[Site, ...]]:
        """Groups of the sites of a unit that are to be compensated."""
        kinds = [k for k in self.settings.kinds if k != "matmul" or self.settings.method != "affine"]
        groups = [tuple(s for s in g if s.kind in kinds and s.name in self.results) for g in unit.groups]
        return [group for group in groups if group]

    def _layers(self, unit: Unit, source: nn.Module, scopes: list[str]) -> None:
        """On the float stream: W E[x] − Ŵ E[q(x)], and for sites that are not Linears the mean difference."""
        sums = self.means if self.means is not None else self._float_sums(unit, source, scopes)
        self._deal(unit, sums)
        for group in self.sites(unit):
            for site in group:
                if site.kind != "linear":
                    bias = self._table(unit, site.module, [sums[site.name]], layout=site.layout)
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
        self.attach(site.name, site.module, self._table(unit, site.module, sums, rows))

    def _float_pass(
        self, source: nn.Module, scopes: list[str], before: dict[nn.Module, Taker], after: dict[nn.Module, Taker]
    ) -> None:
        """Run the float stream through a unit once: whatever is taken, and its outputs where something needs them.

        Where scopes are still to be fitted on the unit's inputs, the outputs are kept beside them until then.
        """
        assert self.float_fit is not None
        whole = not self.last or "block" in scopes
        self.ahead = self.float_fit.empty() if whole and scopes else None
        advance(self.float_fit, source, before, after, to=self.ahead, whole=whole)

    def _float_sums(self, unit: Unit, source: nn.Module, scopes: list[str]) -> Sums:
        """In one pass over the float stream: inputs of Linears as they are and quantized; other sites' differences."""
        assert self.float_fit is not None
        stream, sums = self.float_fit, Sums()
        before: dict[nn.Module, Taker] = {}
        after: dict[nn.Module, Taker] = {}
        for group in self.sites(unit):
            for site in group:
                module = find(source, unit.path(site))
                if site.kind != "linear":
                    after[module] = adding_difference(stream, sums, site)
                    continue
                if site is group[0]:
                    before[module] = adding(stream, sums, site.name)
                add_quantized(stream, sums, site, module, before)
        self._float_pass(source, scopes, before, after)
        return sums

    def _layers_on_quantized_stream(self, unit: Unit, source: nn.Module, scopes: list[str]) -> None:
        """Group by group, on what the quantized, already compensated model feeds the site."""
        assert self.quantized_fit is not None
        blended, share = self.settings.stream == "blended", self.settings.blend
        goals: Sums = self.means if self.means is not None else {}
        if self.means is None:
            assert self.float_fit is not None
            sites = {site: find(source, unit.path(site)) for group in self.sites(unit) for site in group}
            firsts = {group[0]: sites[group[0]] for group in self.sites(unit)}
            before, after = adding_edges(self.float_fit, goals, firsts)
            if blended:
                add_local(self.float_fit, goals, sites, before, after)
            self._float_pass(source, scopes, before, after)
        self._deal(unit, goals)
        for group in self.sites(unit):
            first, seen = group[0], Sums()
            edges = adding_edges(self.quantized_fit, seen, {first: first.module})
            advance(self.quantized_fit, unit.module, *edges, whole=False)
            goal, got = goals[first.name], seen[first.name]
            if first.kind != "linear":
                if blended:  # goals − blend = share · (goals − got) + (1 − share) · (goals − local)
                    got = goals[f"{first.name} local"].blended(got, share)
                bias = self._table(unit, first.module, [goal, got], lambda a, b: a - b, first.layout)
                self.attach(first.name, first.module, bias, first.layout)
                continue
            for site in group:
                local = goals.get(f"{site.name} quantized", goal)
                self._linear(unit, site, source, goal, local.blended(got, share) if blended else got)

    def _region(self, unit: Unit, scope: str, source: nn.Module, *, final: bool) -> bool:
        """Mean difference of a part's paired outputs; on the float stream the part is fed its float input.

        Returns:
            Whether the float stream has been moved past the unit, which the last part does.
        """
        assert self.float_fit is not None
        stream, region, sums = self.float_fit, unit.regions[scope], Sums()
        moves = final and self.ahead is None and not self.last
        for b in range(len(stream)):
            goal, result = self._goal(source, region, b, whole=moves)
            output = self._fed(unit, region, b, goal)
            stream.use(b)
            stream.add(sums, scope, goal.output.float() - output.float())
            if result is not None:
                stream.cache[b] = result
        module = find(unit.module, region.exit)
        self.attach(unit.region_name(scope), module, self._table(unit, module, [sums[scope]]))
        return moves

    def _goal(self, source: nn.Module, region: Region, b: int, *, whole: bool) -> tuple[Captured, Tensor | None]:
        """A part's float input and output on a batch; and the unit's output, if the whole of it is wanted."""
        assert self.float_fit is not None
        goal = Captured(source, region)
        if region == WHOLE and self.ahead is not None:
            goal.output = self.ahead.cache[b]
            return goal, None
        return goal, run_captured(self.float_fit, source, b, [goal], whole=whole)

    def _fed(self, unit: Unit, region: Region, b: int, goal: Captured) -> Tensor:
        """Output of the quantized part on a batch, fed as the stream says."""
        assert self.float_fit is not None
        got = Captured(unit.module, region)
        output: Tensor | None = None
        if self.settings.follows:
            assert self.quantized_fit is not None
            run_captured(self.quantized_fit, unit.module, b, [got], whole=False)
            output = got.output
            if self.settings.stream == "quantized":
                return output
        if region == WHOLE:  # its input is the stream's own
            fed = self.float_fit.run(unit.module, b)
        else:
            fed = run_fed(self.float_fit, unit.module, b, Captured(unit.module, region), goal)
        return fed if output is None else torch.lerp(fed, output, self.settings.blend)

    def _stage(self, unit: Unit, stream: Stream) -> SiteReport:
        """Bias of a stage: mean difference of what leaves it; the streams are past its last unit."""
        assert self.float_fit is not None
        name = unit.name.rpartition(".blocks.")[0] or unit.name
        bias = self._difference(unit, unit.module, self.float_fit, stream, lambda s, b: s.cache[b])
        if stream is self.quantized_fit:  # it is past the unit already
            late = attach(nn.Identity(), bias, self.settings.granularity, dtype=self.dtype)
            for b in range(len(stream)):
                stream.cache[b] = late(stream.cache[b])
        before = compensation_of(unit.module)  # the block's own, which accounts for itself
        self.attach(name, unit.module, bias)
        return _report(name, "stage", unit.module, counted=0 if before is None else before.size)

    def _difference(
        self, unit: Unit, module: nn.Module, goal: Stream, got: Stream, read: Callable[[Stream, int], Tensor]
    ) -> Tensor | LowRank:
        sums = Sums()
        for b in range(len(goal)):
            goal.use(b)
            goal.add(sums, "", read(goal, b).float() - read(got, b).float())
        return self._table(unit, module, [sums[""]])

    @torch.no_grad()
    def model_scope(self, device: torch.device) -> list[SiteReport]:
        """Bias of the logits: mean difference between the float and the compensated quantized model."""
        assert self.float_fit is not None and self.quantized_fit is not None
        self.allowance.take(-self.reserved)
        with on_device(device, *self.chain.tail):
            head = self.chain.model.get_submodule(self.chain.heads[0])
            unit = self.chain.units[-1]
            bias = self._difference(unit, head, self.float_fit, self.quantized_fit, self.chain.logits)
        reports = []
        for name in self.chain.heads:
            head = self.chain.model.get_submodule(name)
            self.attach(name, head, bias)
            head.to(next(head.parameters()).device)  # the bias comes from where the logits are
            reports.append(_report(name, "model", head))
            if getattr(head, "bias", None) is not None and fold(head):
                reports[-1].folded, reports[-1].bias_parameters = True, 0
        return reports


def _report(name: str, scope: str, module: nn.Module, *, counted: int = 0) -> SiteReport:
    child = compensation_of(module)
    assert child is not None
    return SiteReport(name, scope, child.granularity, child.size - counted)
