"""Quantize and compensate a language model with the streaming engine.

Three walks over the blocks, each usable alone so that their results can be stored and shared: :func:`float_means` (the
mean input of every Linear on the float model), :func:`calibrate` (the quantized weights), :func:`compensate` (biases,
errors, and the change of the model). :func:`bc.quantize` chains them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bc.calibration import Samples, Stream, capture, hooked, on_device
from bc.compensation import PositionSums
from bc.errors import QuantizationError, UserError
from bc.fitting import BlockFit, fit_model_scope, linear
from bc.models import Family, family_of, submodule
from bc.parts import Part, leading
from bc.progress import track
from bc.quantizers.base import Group, Quantizer, WeightResult
from bc.report import Report
from bc.settings import Compensation


@dataclass(frozen=True)
class Engine:
    """How the walks run; nothing here changes their results beyond rounding.

    Attributes:
        device: Where blocks and activations are processed.
        batch_size: Samples per forward.
        activations: Where hidden states are kept: ``device``, ``host`` or ``disk``.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int = 4
    activations: str = "host"

    def capture(self, model: nn.Module, family: Family, samples: Samples) -> Stream:
        """A stream of samples at the first block's input."""
        return capture(model, family, samples, self.batch_size, self.device, self.activations)


def block_list(model: nn.Module, family: Family) -> nn.ModuleList:
    """The model's transformer blocks."""
    found = submodule(model, family.blocks)
    assert isinstance(found, nn.ModuleList)
    return found


def sites(model: nn.Module, family: Family) -> Iterator[tuple[str, nn.Linear]]:
    """Name and module of every Linear to quantize, in forward order."""
    for i, block in enumerate(block_list(model, family)):
        for path in (p for group in family.linears for p in group):
            yield f"{family.blocks}.{i}.{path}", linear(block, path)


@torch.no_grad()
def float_means(model: nn.Module, samples: Samples, engine: Engine = Engine()) -> dict[str, PositionSums]:
    """Sums of every Linear's inputs by position, on the float model.

    Args:
        model: A float language model on the CPU.
        samples: Calibration samples (see :func:`bc.calibration.batches`).
        engine: How to run.

    Returns:
        Name of the first Linear of each group that shares an input → sums of its inputs, shape (window, in).
    """
    family = family_of(model)
    stream = engine.capture(model, family, samples)
    blocks, means = block_list(model, family), {}
    for i in track(range(len(blocks)), "float statistics", unit="block"):
        with on_device(engine.device, blocks[i]):
            found = block_means(blocks[i], family, stream)
        for path, sums in found.items():
            sums.total, sums.count = sums.total.cpu().float().double(), sums.count.cpu()  # as a file stores them
            means[f"{family.blocks}.{i}.{path}"] = sums
    return means


def block_means(block: nn.Module, family: Family, stream: Stream) -> dict[str, PositionSums]:
    """Sums of the inputs of each group of Linears in a block; the stream advances through the block."""
    found: dict[str, PositionSums] = {}
    hooks: dict[nn.Module, Any] = {}
    for group in family.linears:
        module = linear(block, group[0])
        sums = PositionSums(stream.length, module.in_features, module.weight.device)
        found[group[0]] = sums

        def add(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], sums: PositionSums = sums) -> None:
            assert stream.context.positions is not None
            sums.add(args[0], stream.context.positions, stream.context.valid)

        hooks[module] = add
    with hooked(hooks, inputs=True):
        stream.advance(block)
    return found


@torch.no_grad()
def calibrate(
    model: nn.Module, quantizer: Quantizer, samples: Samples | None, engine: Engine = Engine()
) -> dict[str, WeightResult]:
    """Quantize every Linear of the blocks, without changing the model.

    All Linears of a block see the same pass; the next block is fed by the quantized block (Frantar et al., 2023).

    Args:
        model: A float language model on the CPU.
        quantizer: The weight quantizer.
        samples: Calibration samples; may be None for a quantizer that needs no data.
        engine: How to run.

    Returns:
        Name of each Linear → its quantized weight, on the CPU.

    Raises:
        UserError: The model is quantized already, or samples are missing.
        QuantizationError: By site name, where no valid result was found.
    """
    family = family_of(model)
    _require_float(model)
    if quantizer.kind != "weight":
        raise UserError(
            f"quantizer: {quantizer.name!r} is for vision models; a language model takes a weight quantizer"
        )
    blocks = block_list(model, family)
    results: dict[str, WeightResult] = {}
    stream = None
    if quantizer.needs_data:
        if samples is None:
            raise UserError(f"calibration: quantizer {quantizer.name!r} needs calibration samples; give some")
        if quantizer.tokens:
            samples = leading(samples, quantizer.tokens)
        stream = engine.capture(model, family, samples)
    for i in track(range(len(blocks)), f"{quantizer.name} {quantizer.bits.label}", unit="block"):
        with on_device(engine.device, blocks[i]):
            found = _calibrate_block(quantizer, family, f"{family.blocks}.{i}", blocks[i], stream)
            if stream and i + 1 < len(blocks):
                with _weights(blocks[i], found if quantizer.stream == "quantized" else {}):
                    stream.advance(blocks[i])
        for path, result in found.items():
            _to_cpu(result.weight)
            results[f"{family.blocks}.{i}.{path}"] = result
    return results


def _require_float(model: nn.Module) -> None:
    if model.__dict__.get("_quantized"):
        raise UserError("model: it is quantized already; load the float model again")


def _calibrate_block(
    quantizer: Quantizer, family: Family, prefix: str, block: nn.Module, stream: Stream | None
) -> dict[str, WeightResult]:
    """Results of every Linear of a block, by path; the block is not changed."""
    hessians = second_moments(block, family, stream) if stream and quantizer.needs_hessian else {}
    found: dict[str, WeightResult] = {}
    for paths, opens in zip(family.linears, family.opens, strict=True):
        group = Group({p: linear(block, p).weight.data for p in paths}, hessians.get(paths[0]))
        name = f"{prefix}.{paths[0]}"
        for path, weight in group.weights.items():
            if not bool(torch.isfinite(weight).all()):
                raise QuantizationError(f"{prefix}.{path}: the weight holds NaN or Inf; check the checkpoint")
        if group.hessian is not None and not bool(torch.isfinite(group.hessian).all()):
            raise QuantizationError(f"{name}: the inputs hold NaN or Inf; check the model and its dtype")
        if stream and quantizer.needs_inputs:
            part = Part(block, family.region(opens), stream, paths)
            group.inputs, group.loss = part.inputs, part.loss
        try:
            results = quantizer.quantize_group(group)
        except QuantizationError as error:
            raise QuantizationError(f"{name}: {error}") from error
        for path, result in results.items():
            if not bool(torch.isfinite(result.weight.dequantize()).all()):
                raise QuantizationError(f"{prefix}.{path}: the quantized weight is not finite; its range is too wide")
        found |= results
    return found


@contextmanager
def _weights(block: nn.Module, results: dict[str, WeightResult]) -> Iterator[None]:
    """Give a block its quantized weights for a while."""
    kept = {path: linear(block, path).weight.data for path in results}
    for path, result in results.items():
        linear(block, path).weight.data = result.weight.dequantize().to(kept[path])
    try:
        yield
    finally:
        for path, weight in kept.items():
            linear(block, path).weight.data = weight


def _to_cpu(weight: Any) -> None:
    for key, value in vars(weight).items():
        if isinstance(value, Tensor):
            setattr(weight, key, value.cpu())


def second_moments(block: nn.Module, family: Family, stream: Stream) -> dict[str, Tensor]:
    """Mean of x xᵀ of the inputs of each group of Linears, fp32; the stream does not advance."""
    found: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    hooks: dict[nn.Module, Any] = {}
    for group in family.linears:
        module, key = linear(block, group[0]), group[0]
        found[key] = torch.zeros(module.in_features, module.in_features, device=module.weight.device)
        tokens[key] = 0

        def add(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], key: str = key) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            if stream.context.valid is not None:
                x = x[stream.context.valid.reshape(-1)]
            x = x.float()
            found[key].addmm_(x.T, x)
            tokens[key] += len(x)

        hooks[module] = add
    with hooked(hooks, inputs=True):
        for b in range(len(stream)):
            stream.run(block, b)
    for key, matrix in found.items():
        matrix /= tokens[key]
    return found


@torch.no_grad()
def compensate(
    model: nn.Module,
    quantized: dict[str, WeightResult],
    settings: Compensation,
    samples: Samples | None,
    engine: Engine = Engine(),
    *,
    means: dict[str, PositionSums] | None = None,
    report_calibration: Samples | None = None,
    report_held_out: Samples | None = None,
) -> Report:
    """Put quantized weights into a model and compensate it, block by block, in place.

    Args:
        model: The float model on the CPU; it is changed.
        quantized: Every Linear's quantized weight, from :func:`calibrate`.
        settings: Scope, granularity and stream of the biases.
        samples: Calibration samples, for what ``means`` does not cover.
        engine: How to run.
        means: Result of :func:`float_means` on the same samples; computed where needed and absent.
        report_calibration: Calibration samples on which errors are measured; None measures none.
        report_held_out: Samples that are not used to fit, on which errors are measured; None measures none.

    Returns:
        Errors per site, storage and parameter counts.

    Raises:
        UserError: The model is quantized already, or samples are missing.
        QuantizationError: By site name, where a bias is not finite.
    """
    family = family_of(model)
    _require_float(model)
    fit = BlockFit(model, family, settings, engine.capture, means)
    fit.open_streams(samples, report_calibration, report_held_out)
    blocks, reports = block_list(model, family), []
    weight_bits = weights = 0
    model.__dict__["_quantized"] = True  # from here on, also where an error leaves it half done
    for i in track(range(len(blocks)), f"compensation {'+'.join(settings.scope) or 'off'}", unit="block"):
        source = blocks[i]
        with on_device(engine.device, source):
            target = copy.deepcopy(source)
            for path in (p for group in family.linears for p in group):
                result = quantized[f"{family.blocks}.{i}.{path}"]
                module = linear(target, path)
                module.weight.data = result.weight.dequantize().to(module.weight)
                weight_bits += result.weight.storage_bits()
                weights += module.weight.numel()
            reports += fit.block(i, source, target)
            target.to("cpu")
        blocks[i] = target
    if "model" in settings.scope:
        reports.append(fit_model_scope(fit, engine.device))
    model.__dict__["_quantized"] = quantized
    fit.context.set(None, None)
    for site in reports:
        site.notes |= quantized[site.site].notes if site.site in quantized else {}
    bits, added = weight_bits + _bias_bits(model, family), sum(s.bias_parameters for s in reports)
    return Report(reports, bits, weights, added, fit.seconds_measure)


def _bias_bits(model: nn.Module, family: Family) -> int:
    """Bits of the quantized modules' own biases and of all compensation biases."""
    own = [m.bias for _, m in sites(model, family) if m.bias is not None]
    added = [b for name, b in model.named_buffers() if name.endswith("compensation.bias")]
    return sum(t.numel() * t.element_size() * 8 for t in own + added)
