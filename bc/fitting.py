"""Fitting the biases of one block after another: scopes, streams, folding and error measurement."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bc.calibration import Samples, StopForward, Stream, hooked, logits, on_device
from bc.compensation import PositionSums, attach, compensation_of, fold, linear_bias
from bc.errors import QuantizationError, UserError
from bc.models import Family, submodule
from bc.models.base import Region
from bc.parts import Captured, find, linear, run_captured, run_fed
from bc.positions import PositionContext
from bc.report import ErrorSums, SiteReport
from bc.settings import Compensation

Capture = Callable[[nn.Module, Family, Samples], Stream]
REGIONS = ("attention", "mlp", "block")


class BlockFit:
    """Fits and measures the biases of a model's blocks, in order.

    Args:
        model: The model whose blocks are replaced one after another by their quantized copies.
        family: Its adapter.
        settings: Scope, granularity and stream.
        capture: Makes a stream from a model and samples.
        means: Sums of the float inputs of each group of Linears, or None to collect them on the way.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        settings: Compensation,
        capture: Capture,
        means: dict[str, PositionSums] | None,
    ) -> None:
        self.model, self.family, self.settings = model, family, settings
        self.capture, self.means = capture, means
        self.context = PositionContext.of(model)
        self.dtype = getattr(torch, settings.dtype)
        self.regions = {"attention": family.attention, "mlp": family.mlp, "block": Region("", "")}
        self.float_fit: Stream | None = None
        self.quantized_fit: Stream | None = None
        self.reports: dict[str, tuple[Stream, Stream | None]] = {}
        self.seconds_measure = 0.0

    # Streams ----------------------------------------------------------------------------------------------------------

    def open_streams(self, samples: Samples | None, calibration: Samples | None, held_out: Samples | None) -> None:
        """Capture the inputs of the first block for whatever the settings need."""
        s = self.settings
        regions = any(r in s.scope for r in REGIONS)
        wants_quantized = s.enabled and (s.stream == "quantized" or "model" in s.scope)
        wants_float = regions or "model" in s.scope or ("layer" in s.scope and self.means is None)
        if wants_float or wants_quantized:
            if samples is None:
                raise UserError(f"calibration: bc.scope={'+'.join(s.scope)} needs calibration samples; give some")
            first = self.capture(self.model, self.family, samples)
            self.float_fit = first if wants_float else None
            self.quantized_fit = (first.fork() if wants_float else first) if wants_quantized else None
        for name, part in (("calibration", calibration), ("held_out", held_out)):
            if part is not None:
                stream = self.capture(self.model, self.family, part)
                self.reports[name] = (stream, stream.fork() if s.stream == "quantized" and s.enabled else None)

    # Fitting ----------------------------------------------------------------------------------------------------------

    def block(self, index: int, source: nn.Module, target: nn.Module) -> list[SiteReport]:
        """Compensate the quantized copy of a block, measure it, and move all streams past the block.

        Args:
            index: Number of the block.
            source: The float block.
            target: Its copy with quantized weights; biases are attached to it.

        Returns:
            A report for every quantized Linear and every compensated part.
        """
        prefix = f"{self.family.blocks}.{index}"
        advanced = False
        if "layer" in self.settings.scope:
            if self.settings.stream == "quantized":
                self._layers_on_quantized_stream(prefix, source, target)
            else:
                self._layers(prefix, source, target)
        scopes = [r for r in REGIONS if r in self.settings.scope]
        for scope in scopes:
            advanced = scope == scopes[-1]
            self._region(prefix, scope, source, target, advance=advanced)
        started = time.perf_counter()
        reports = self._measure(prefix, source, target)
        self.seconds_measure += time.perf_counter() - started
        if self.float_fit is not None and not advanced:
            self.float_fit.advance(source)
        if self.quantized_fit is not None:
            self.quantized_fit.advance(target)
        return reports

    def _attach(self, site: str, module: nn.Module, bias: Tensor) -> None:
        try:
            attach(module, bias, self.settings.granularity, self.context, self.dtype)
        except QuantizationError as error:
            raise QuantizationError(f"{site}: {error}") from error

    def _rows(self, sums: PositionSums) -> Tensor:
        return sums.mean(self.settings.granularity, self.settings.sink_positions)

    def _group_means(self, prefix: str, source: nn.Module) -> dict[str, PositionSums]:
        if self.means is not None:
            return {g[0]: self.means[f"{prefix}.{g[0]}"] for g in self.family.linears}
        assert self.float_fit is not None
        stream = self.float_fit
        return {g[0]: input_sums(stream, source, g[0]) for g in self.family.linears}

    def _layers(self, prefix: str, source: nn.Module, target: nn.Module) -> None:
        """Closed form on the float stream: (W − Ŵ) E[x]."""
        means = self._group_means(prefix, source)
        for group in self.family.linears:
            for path in group:
                site = linear(target, path)
                weight, quantized = linear(source, path).weight, site.weight
                rows = self._rows(means[group[0]]).to(weight.device)
                self._attach(f"{prefix}.{path}", site, linear_bias(weight, quantized, rows))

    def _layers_on_quantized_stream(self, prefix: str, source: nn.Module, target: nn.Module) -> None:
        """Group by group: W E[x] − Ŵ E[x̂], with x̂ what the quantized, already compensated model feeds the site."""
        assert self.quantized_fit is not None
        means = self._group_means(prefix, source)
        for group in self.family.linears:
            seen = input_sums(self.quantized_fit, target, group[0])
            for path in group:
                site = linear(target, path)
                weight, quantized = linear(source, path).weight, site.weight
                x, x_hat = (self._rows(m).to(weight.device) for m in (means[group[0]], seen))
                self._attach(f"{prefix}.{path}", site, linear_bias(weight, quantized, x, x_hat))

    def _region(self, prefix: str, scope: str, source: nn.Module, target: nn.Module, *, advance: bool) -> None:
        """Mean difference of a part's paired outputs; on the float stream the part is fed its float input."""
        assert self.float_fit is not None
        stream = self.float_fit
        fed = self.quantized_fit if self.settings.stream == "quantized" else None
        region = self.regions[scope]
        sums: PositionSums | None = None
        for b in range(len(stream)):
            goal = Captured(source, region)
            result = run_captured(stream, source, b, [goal])
            output = self._region_output(scope, target, stream, fed, b, goal)
            difference = goal.output.float() - output.float()
            if sums is None:
                sums = PositionSums(stream.length, difference.shape[-1], difference.device)
            call = stream.calls[b]
            sums.add(difference, call.positions, call.valid)
            if advance:
                stream.cache[b] = result
        assert sums is not None
        self._attach(self._region_name(prefix, scope), find(target, region.exit), self._rows(sums))

    def _region_name(self, prefix: str, scope: str) -> str:
        return f"{prefix}.{self.regions[scope].exit}".rstrip(".")

    def _region_output(
        self, scope: str, target: nn.Module, stream: Stream, fed: Stream | None, b: int, goal: Captured
    ) -> Tensor:
        """Output of a part of the quantized block: on its float input, or on the quantized stream."""
        got = Captured(target, self.regions[scope])
        if fed is not None:
            run_captured(fed, target, b, [got])
            return got.output

        return run_fed(stream, target, b, got, goal)

    # Measuring --------------------------------------------------------------------------------------------------------

    def _measure(self, prefix: str, source: nn.Module, target: nn.Module) -> list[SiteReport]:
        """Errors of every Linear and compensated part on the report streams; folds what folds; advances them."""
        layers = {p: SiteReport(f"{prefix}.{p}", "layer") for g in self.family.linears for p in g}
        scopes = [r for r in REGIONS if r in self.settings.scope]
        parts = {r: SiteReport(self._region_name(prefix, r), r) for r in scopes}
        for name, (stream, fed) in self.reports.items():
            for b in range(len(stream)):
                stream.cache[b] = self._measure_batch(name, stream, fed, b, source, target, {**layers, **parts})
            if fed is not None:
                fed.advance(target)
        for scope, report in parts.items():  # a part may end in a layer and share its bias: the layer accounts for it
            exit_path = self.regions[scope].exit
            self._finish(report, find(target, exit_path), shared=exit_path in layers and "layer" in self.settings.scope)
        for path, report in layers.items():
            self._finish(report, find(target, path))
        return [*layers.values(), *parts.values()]

    def _finish(self, report: SiteReport, module: nn.Module, *, shared: bool = False) -> None:
        """Note the site's bias in its report, and fold it where it folds."""
        child = compensation_of(module)
        if child is None:
            return
        report.granularity = child.granularity
        if shared:
            return
        bare = getattr(module, "bias", None) is None
        size = child.bias.numel()
        report.folded = fold(module)
        report.bias_parameters = 0 if report.folded and not bare else size

    def _measure_batch(
        self,
        name: str,
        stream: Stream,
        fed: Stream | None,
        b: int,
        source: nn.Module,
        target: nn.Module,
        reports: dict[str, SiteReport],
    ) -> Tensor:
        """Add the errors of one batch to every site's report; returns the float block's output."""
        regions = {key: self.regions[key] if key in REGIONS else Region(key, key) for key in reports}
        goals = {key: Captured(source, region) for key, region in regions.items()}
        result = run_captured(stream, source, b, goals.values())
        call = stream.calls[b]
        got = {key: Captured(target, region) for key, region in regions.items()}
        if fed is not None:
            run_captured(fed, target, b, got.values())
        for key, report in reports.items():
            goal, site = goals[key], got[key].exit
            if fed is not None:
                output = got[key].output
            elif key in REGIONS:
                output = self._region_output(key, target, stream, None, b, goal)
            else:
                self.context.set(call.positions, call.valid)
                output = site(*goal.args)
            self._add(getattr(report, name), goal.output, output, site, call.positions.shape[1], call.valid)
        return result

    @staticmethod
    def _add(sums: ErrorSums, goal: Tensor, output: Tensor, site: nn.Module, tokens: int, valid: Tensor | None) -> None:
        child = compensation_of(site)
        shape = (-1, tokens, goal.shape[-1])
        bias = None if child is None else child.rows(tokens) if len(child.bias) > 1 else child.bias
        sums.add(goal.reshape(shape), output.reshape(shape), bias, valid)


def input_sums(stream: Stream, block: nn.Module, path: str) -> PositionSums:
    """Sums by position of the inputs of one Linear, over a stream that does not advance."""
    module = linear(block, path)
    sums = PositionSums(stream.length, module.in_features, module.weight.device)

    def take(m: nn.Module, args: Any, kwargs: Any) -> None:
        assert stream.context.positions is not None
        sums.add(args[0], stream.context.positions, stream.context.valid)
        raise StopForward

    with hooked({module: take}, inputs=True):
        for b in range(len(stream)):
            try:
                stream.run(block, b)
            except StopForward:
                pass
    return sums


@torch.no_grad()
def fit_model_scope(fit: BlockFit, device: torch.device) -> SiteReport:
    """Bias of the logits: mean difference between the float and the compensated quantized model on the same tokens."""
    assert fit.float_fit is not None and fit.quantized_fit is not None
    tail = [submodule(fit.model, p) for p in fit.family.tail]
    head = find(fit.model, fit.family.head)
    report = SiteReport(fit.family.head, "model")
    with on_device(device, *tail):
        sums: PositionSums | None = None
        for b in range(len(fit.float_fit)):
            goal = logits(fit.model, fit.family, fit.float_fit, b).float()
            difference = goal - logits(fit.model, fit.family, fit.quantized_fit, b).float()
            sums = sums or PositionSums(fit.float_fit.length, difference.shape[-1], difference.device)
            sums.add(difference, fit.float_fit.calls[b].positions, fit.float_fit.calls[b].valid)
        assert sums is not None
        fit._attach(fit.family.head, head, fit._rows(sums))
    child = compensation_of(head)
    assert child is not None
    report.granularity, report.bias_parameters = child.granularity, child.bias.numel()
    return report
