"""Quantize and compensate a model with the streaming engine.

Three walks over a model's units, each usable alone so that their results can be stored and shared: :func:`float_means`
(the mean input of every Linear on the float model), :func:`calibrate` (how every site is quantized), :func:`compensate`
(biases, errors, and the change of the model). :func:`bc.quantize` chains them, for language and vision models alike.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bc import device as devices
from bc.activation_cache import Store
from bc.calibration import Samples, Stream, on_device
from bc.chains import Chain, VisionChain, chain_of, check_settings
from bc.errors import QuantizationError, UserError
from bc.fitting import Fit
from bc.grid import finite
from bc.install import install, installed
from bc.matching import check_goes_with, require_second_moments
from bc.packing import PackedResult, packed
from bc.parts import Part, leading
from bc.passes import input_sums, linears, second_moments
from bc.progress import track
from bc.quantizers.base import Group, Quantizer, SiteQuantizer, SiteResult
from bc.report import Report
from bc.settings import Compensation
from bc.site_calibration import calibrate_sites
from bc.sites import Site, Unit
from bc.statistics import PositionSums


@dataclass(frozen=True)
class Engine:
    """How the walks run; nothing here changes their results beyond rounding, but for a narrower ``activations_dtype``.

    Attributes:
        device: Where units and activations are processed.
        batch_size: Samples per forward.
        activations: Where hidden states are kept: ``device``, ``host`` or ``disk``.
        activations_dtype: What they are stored as; None is the model's.
        memory_mib: MiB of hidden states that may wait on the device or in host memory, over all streams; the others go
            to files. None is no limit.
        store: What the above come to, shared by all streams of the engine.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int = 4
    activations: str = "host"
    activations_dtype: torch.dtype | None = None
    memory_mib: int | None = None
    store: Store = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise UserError(f"batch_size: {self.batch_size!r} is not allowed; use 1 or more samples")
        budget = None if self.memory_mib is None else self.memory_mib * 2**20
        object.__setattr__(self, "store", Store(self.activations, self.activations_dtype, budget))

    def capture(self, chain: Chain, samples: Samples) -> Stream:
        """A stream of samples at the first unit's input."""
        return chain.capture(samples, self.batch_size, self.device, self.store)


@torch.no_grad()
def float_means(
    model: nn.Module, samples: Samples, engine: Engine = Engine(), *, halves: bool = False
) -> dict[str, PositionSums]:
    """Sums of every Linear's inputs by position, on the float model.

    Args:
        model: A float model on the CPU.
        samples: Calibration samples (see :func:`bc.calibration.batches`), or images.
        engine: How to run.
        halves: Keep the sums of half the samples besides, as granularities ``shrink`` and ``lowrank`` need them.

    Returns:
        Name of the first Linear of each group that shares an input → sums of its inputs, shape (window, in).
    """
    chain = chain_of(model)
    stream = engine.capture(chain, samples)
    stream.halves = halves
    means: dict[str, PositionSums] = {}
    for unit in track(chain.units, "float statistics", unit="block"):
        found: dict[str, PositionSums] = {}
        with on_device(engine.device, unit.module):
            input_sums(unit, stream, found, whole=unit is not chain.units[-1])
        means |= {name: sums.as_stored() for name, sums in found.items()}
        devices.trim()
    return means


@dataclass
class Collection:
    """Sums of the Linears' inputs that :func:`calibrate` leaves for :func:`compensate`, as it passes there anyway.

    Attributes:
        halves: Keep the sums of half the samples besides, as granularities ``shrink`` and ``lowrank`` need them.
        stream: ``float``: the float model's inputs, as of :func:`float_means`; the first block's come from the
            quantizer's own pass, the later ones take the float blocks beside the quantized ones. ``calibration``: the
            inputs from which the quantizer took its second moments, at no forward of their own.
        sums: Filled by name of the first Linear of each group.
    """

    halves: bool = False
    stream: Literal["float", "calibration"] = "float"
    sums: dict[str, PositionSums] = field(default_factory=dict)

    @classmethod
    def wanted(cls, settings: Compensation, quantizer: Quantizer) -> Collection | None:
        """What is worth collecting while a model is calibrated for these settings; None where nothing is.

        The float inputs are, where they alone are needed: a larger scope runs the float blocks anyway.

        Raises:
            UserError: The settings need what the quantizer has not.
        """
        check_goes_with(settings, quantizer)
        if settings.stream == "calibration" and settings.enabled:
            return cls(settings.wants_halves, "calibration")
        if settings.scope == ("layer",) and settings.method == "bias" and _sees_all(quantizer):
            return cls(settings.wants_halves)
        return None


def _sees_all(quantizer: Quantizer) -> bool:
    """Whether a quantizer takes the second moments of all samples, so that float inputs can be summed as it passes."""
    return quantizer.needs_hessian and not quantizer.tokens


@torch.no_grad()
def calibrate(
    model: nn.Module,
    quantizer: Quantizer,
    samples: Samples | None,
    engine: Engine = Engine(),
    *,
    collect: Collection | None = None,
) -> dict[str, SiteResult]:
    """Find how every site is quantized, without changing the model.

    A weight quantizer takes the Linears: all those of a block see the same pass, and the next block is fed by the
    quantized block (Frantar et al., 2023). A quantizer of weights and activations takes all sites of a vision model,
    on the float model's inputs (see :func:`bc.site_calibration.calibrate_sites`).

    Args:
        model: A float model on the CPU.
        quantizer: The quantizer.
        samples: Calibration samples; may be None for a quantizer that needs no data.
        engine: How to run.
        collect: Gets sums of the Linears' inputs; only with a quantizer that needs their second moments.

    Returns:
        Name of each site → how it is quantized, on the CPU.

    Raises:
        UserError: The model is quantized already, samples are missing, or sums are asked for where there are none.
        QuantizationError: By site name, where no valid result was found.
    """
    chain = chain_of(model)
    _require_float(model)
    if samples is None and (quantizer.needs_data or quantizer.kind == "weight_activation"):
        raise UserError(f"calibration: quantizer {quantizer.name!r} needs calibration samples; give some")
    if isinstance(quantizer, SiteQuantizer):
        if not isinstance(chain, VisionChain):
            raise UserError(
                f"quantizer: {quantizer.name!r} is for vision models; a language model takes a weight quantizer"
            )
        assert samples is not None
        return calibrate_sites(chain, quantizer, engine.capture(chain, samples), engine.device)
    if collect is not None and collect.stream == "calibration":
        require_second_moments(quantizer)
    elif collect is not None and not _sees_all(quantizer):
        raise UserError(
            f"collect: quantizer {quantizer.name!r} takes no second moments of all samples; use float_means"
        )
    results: dict[str, SiteResult] = {}
    stream = None
    if quantizer.needs_data and samples is not None:
        stream = engine.capture(chain, leading(samples, quantizer.tokens) if quantizer.tokens else samples)
        stream.halves = collect is not None and collect.halves
    walk = _Walk(quantizer, stream, collect)
    for unit in track(chain.units, f"{quantizer.name} {quantizer.bits.label}", unit="block"):
        with on_device(engine.device, unit.module):
            found = walk.unit(unit, last=unit is chain.units[-1])
        results |= {name: _at_rest(found.pop(name)) for name in list(found)}
        devices.trim()
    return results


class _Walk:
    """Calibration of one unit after another.

    Attributes:
        stream: Feeds the quantizer; None where it needs no data.
        exact: The float stream, beside a quantized one, where float inputs are collected.
    """

    def __init__(self, quantizer: Quantizer, stream: Stream | None, collect: Collection | None) -> None:
        self.quantizer, self.stream, self.collect = quantizer, stream, collect
        self.exact: Stream | None = None

    def unit(self, unit: Unit, *, last: bool) -> dict[str, SiteResult]:
        """Results of a unit's Linears by name; the unit is not changed, the streams move past it if they have to."""
        hessians: dict[str, Tensor] = {}
        if self.stream is not None and self.quantizer.needs_hessian:
            hessians = self._second_moments(unit, self.stream, last)
        found = _calibrate_unit(self.quantizer, unit, self.stream, hessians)
        if self.stream is not None and not last:
            modules = {site.name: site.module for site in unit.sites}
            fed = found if self.quantizer.stream == "quantized" else {}
            with installed((modules[name], result) for name, result in fed.items()):
                self.stream.advance(unit.module)
        return found

    def _second_moments(self, unit: Unit, stream: Stream, last: bool) -> dict[str, Tensor]:
        if self.collect is None:
            return second_moments(unit, stream)
        sums: dict[str, PositionSums] = {}
        if self.collect.stream == "calibration":
            hessians = second_moments(unit, stream, sums)
        elif self.exact is None:  # nothing is quantized yet: what the quantizer sees is the float model's
            self.exact = stream.empty()
            hessians = second_moments(unit, stream, sums, None if last else self.exact)
        else:
            hessians = second_moments(unit, stream)
            input_sums(unit, self.exact, sums, whole=not last)
        self.collect.sums |= {name: found.as_stored() for name, found in sums.items()}
        return hessians


def _require_float(model: nn.Module) -> None:
    if model.__dict__.get("_quantized"):
        raise UserError("model: it is quantized already; load the float model again")


def _calibrate_unit(
    quantizer: Quantizer, unit: Unit, stream: Stream | None, hessians: dict[str, Tensor]
) -> dict[str, SiteResult]:
    """Results of every Linear of a unit, by name; the unit is not changed."""
    found: dict[str, SiteResult] = {}
    for i, sites in enumerate(linears(unit)):
        weights: dict[str, Any] = {unit.path(site): site.module.weight for site in sites}
        names = {unit.path(site): site.name for site in sites}
        group = Group({path: weight.data for path, weight in weights.items()}, hessians.pop(sites[0].name, None))
        if stream and quantizer.needs_inputs:
            opens = unit.opens[i] if i < len(unit.opens) else ""
            part = Part(unit.module, unit.regions[opens] if opens else None, stream, tuple(names))
            group.inputs, group.loss = part.inputs, part.loss
        found |= _calibrate_group(quantizer, group, names)
        devices.trim()  # the next group may be wider
    return found


def _calibrate_group(quantizer: Quantizer, group: Group, names: dict[str, str]) -> dict[str, SiteResult]:
    """Results of the Linears of a group, by the name of each path; on the CPU they are packed already."""
    first = next(iter(names.values()))
    for path, weight in group.weights.items():
        if not finite(weight):
            raise QuantizationError(f"{names[path]}: the weight holds NaN or Inf; check the checkpoint")
    if group.hessian is not None and not finite(group.hessian):
        raise QuantizationError(f"{first}: the inputs hold NaN or Inf; check the model and its dtype")
    try:
        results = quantizer.quantize_group(group)
    except QuantizationError as error:
        raise QuantizationError(f"{first}: {error}") from error
    found = {}
    for path, result in results.items():
        if result.weight is None or not finite(result.weight.dequantize()):
            raise QuantizationError(f"{names[path]}: the quantized weight is not finite; its range is too wide")
        here = group.weights[path].device.type == "cpu"  # on a GPU they feed the next unit before they leave it
        found[names[path]] = packed(result) if here else result
    return found


def _at_rest(result: SiteResult) -> SiteResult:
    """A result on the CPU, packed."""
    if isinstance(result, PackedResult):
        return result
    for key, value in vars(result.weight).items():
        if isinstance(value, Tensor):
            setattr(result.weight, key, value.cpu())
    return packed(result)


@torch.no_grad()
def compensate(
    model: nn.Module,
    quantized: dict[str, SiteResult],
    settings: Compensation,
    samples: Samples | None,
    engine: Engine = Engine(),
    *,
    means: dict[str, PositionSums] | None = None,
    report_calibration: Samples | None = None,
    report_held_out: Samples | None = None,
) -> Report:
    """Quantize a model as was found and compensate it, unit by unit, in place.

    Args:
        model: The float model on the CPU; it is changed.
        quantized: How every site is quantized, from :func:`calibrate`.
        settings: Scope, granularity and stream of the biases.
        samples: Calibration samples or images, for what ``means`` does not cover.
        engine: How to run.
        means: Result of :func:`float_means` on the same samples, or the sums of a :class:`Collection`, which stream
            ``calibration`` needs; otherwise computed where needed and absent.
        report_calibration: Calibration samples on which errors are measured; None measures none.
        report_held_out: Samples that are not used to fit, on which errors are measured; None measures none.

    Returns:
        Errors per site, storage and parameter counts.

    Raises:
        UserError: The model is quantized already, a scope does not exist in it, samples are missing, or ``quantized``
            is of another model.
        QuantizationError: By site name, where a bias is not finite.
    """
    chain = chain_of(model)
    _require_float(model)
    check_settings(chain, settings)
    if strangers := sorted(set(quantized) - {site.name for site in chain.sites}):
        raise UserError(
            f"quantized: {strangers[0]!r} is no module of this model; give what calibrate() found for the same model"
        )
    if settings.enabled and settings.stream == "calibration" and means is None:
        raise UserError(
            "bc.stream: 'calibration' needs the sums that calibrate(…, collect=…) keeps; give them as means"
        )
    if means is not None and any(result.inputs for result in quantized.values()):
        means = None  # they say nothing about quantized inputs
    if means is not None and settings.wants_halves and any(s.second is None for s in means.values()):
        raise UserError(
            f"means: bc.granularity={settings.granularity} needs the sums of half the samples too; "
            "collect them with halves=True"
        )
    fit = Fit(chain, settings, engine.capture, quantized, means)
    fit.open_streams(samples, report_calibration, report_held_out)
    reports, storage = [], Storage()
    model.__dict__["_quantized"] = True  # from here on, also where an error leaves it half done
    for i, unit in enumerate(track(chain.units, f"compensation {'+'.join(settings.scope) or 'off'}", unit="block")):
        with on_device(engine.device, unit.module):
            source = _twin(unit.module)
            for site in unit.sites:
                if site.name in quantized:
                    install(site.module, quantized[site.name], engine.device)
            reports += fit.unit(i, source)
            for site in (site for site in unit.sites if site.name in quantized):
                storage.add(site, fit.results[site.name])
    if "model" in settings.scope:
        reports += fit.model_scope(engine.device)
    model.__dict__["_quantized"] = fit.results
    if chain.context is not None:
        chain.context.set(None, None)
    for report in reports:
        report.notes |= quantized[report.site].notes if report.site in quantized else {}
    bits, added = storage.bits + _bias_bits(chain, quantized), sum(r.bias_parameters for r in reports)
    return Report(reports, bits, storage.weights, added, fit.seconds_measure, settings)


def _twin(module: nn.Module) -> nn.Module:
    """A copy on the same weights, which it keeps when the module gets others (:func:`bc.install.install`)."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, memo)


@dataclass
class Storage:
    """Bits of the quantized weights and activation quantizers, and the number of quantized weights."""

    bits: int = 0
    weights: int = 0

    def add(self, site: Site, result: SiteResult) -> None:
        """Count one more site."""
        if site.weight is not None:
            self.weights += site.weight.numel()
            stored = result.storage_bits()
            self.bits += site.weight.numel() * site.weight.element_size() * 8 if stored is None else stored
        self.bits += sum(quantizer.storage_bits() for quantizer in result.inputs)


def _bias_bits(chain: Chain, quantized: dict[str, SiteResult]) -> int:
    """Bits of the quantized modules' own biases and of all compensation biases."""
    own = [getattr(site.module, "bias", None) for site in chain.sites if site.name in quantized]
    added = [b for name, b in chain.model.named_buffers() if ".compensation." in f".{name}"]
    return sum(t.numel() * t.element_size() * 8 for t in [*own, *added] if t is not None)
