"""Calibration of the quantizers of weights and activations, on the float model.

It is parallel, as in PTQ4ViT (Yuan et al., ECCV 2022, section 3.4): every site sees what it is fed in the float model,
so one walk over the units gives the inputs and outputs of all sites of a unit at once, and one backward pass gives the
gradients of as many sites as memory allows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, linear, unfold

from bc.calibration import Stream, hooked, on_device
from bc.chains import VisionChain
from bc.errors import QuantizationError
from bc.grid import finite
from bc.install import installed
from bc.progress import track
from bc.quantizers.base import SiteQuantizer, SiteResult, SiteSamples
from bc.sites import Site, Unit

GRADIENT_BYTES = 4 * 2**30  # kept in host memory at a time
TARGET_SEED = 0


def calibrate_sites(
    chain: VisionChain,
    quantizer: SiteQuantizer,
    stream: Stream,
    device: torch.device,
    images: list[Tensor] | None = None,
) -> dict[str, SiteResult]:
    """Find how every site of a vision model is quantized; the model is not changed.

    Args:
        chain: The float model on the CPU.
        quantizer: The quantizer.
        stream: Calibration images at the first unit.
        device: Where to run.
        images: The same images at the model's input, where the chain's first unit is not the model's.

    Returns:
        Name of each site → its result, on the CPU.

    Raises:
        QuantizationError: By site name, where no valid result was found.
    """
    images = [stream.cache[b] for b in range(len(stream))] if images is None else images
    gradients = output_gradients(chain, quantizer.metric, images, device) if quantizer.needs_gradient else None
    results: dict[str, SiteResult] = {}
    for unit in track(chain.units, f"{quantizer.name} {quantizer.bits.label}", unit="block"):
        weighted = next(gradients) if gradients is not None else {}
        with on_device(device, unit.module):
            samples, outputs = site_samples(unit, stream, weighted, device)
            if unit.kind == "block":
                found = quantizer.quantize_block(samples, _evaluator(unit, stream))
            else:
                found = {site.name: quantizer.quantize_site(site) for site in samples}
            for b, output in enumerate(outputs):
                stream.cache[b] = output
        for name, result in found.items():
            results[name] = _checked(name, result)
    return results


def site_samples(
    unit: Unit, stream: Stream, gradients: dict[str, Tensor], device: torch.device
) -> tuple[list[SiteSamples], list[Tensor]]:
    """Inputs and outputs of all sites of a unit in one pass, and the unit's own outputs, a batch each."""
    inputs: dict[str, list[tuple[Tensor, ...]]] = {site.name: [] for site in unit.sites}
    outputs: dict[str, list[Tensor]] = {site.name: [] for site in unit.sites}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            inputs[name].append(args)
            outputs[name].append(output)

        return hook

    with hooked({site.module: keep(site.name) for site in unit.sites}, inputs=False):
        results = [stream.run(unit.module, b) for b in range(len(stream))]
    samples = []
    for site in unit.sites:
        module: Any = site.module
        fed = tuple(torch.cat(parts) for parts in zip(*inputs.pop(site.name), strict=True))
        gradient = gradients.get(site.name)
        samples.append(
            SiteSamples(
                site.name,
                site.kind,
                site.role,
                site.heads,
                getattr(module, "weight", None),
                getattr(module, "bias", None),
                fed,
                torch.cat(outputs.pop(site.name)),
                None if gradient is None else gradient.to(device),
                forward_of(site),
                site.norm,
                columns_of(site),
            )
        )
    return samples, results


def forward_of(site: Site) -> Callable[[Tensor | None, tuple[Tensor, ...]], Tensor]:
    """(weight, inputs) ↦ output of a site."""
    module: Any = site.module
    if site.kind == "linear":
        return lambda weight, inputs: linear(inputs[0], weight, module.bias)  # type: ignore[arg-type]
    if site.kind == "conv":
        return lambda weight, inputs: module._conv_forward(inputs[0], weight, module.bias)
    return lambda weight, inputs: inputs[0] @ inputs[1]


def columns_of(site: Site) -> Callable[[Tensor], Tensor] | None:
    """Input of a convolution ↦ the patches its kernel sees; None where its output is not their plain product."""
    module: Any = site.module
    if site.kind != "conv" or module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    shape = (module.kernel_size, module.dilation, module.padding, module.stride)
    return lambda x: unfold(x, *shape).mT.contiguous()


def _evaluator(unit: Unit, stream: Stream) -> Callable[[dict[str, SiteResult]], Tensor]:
    """Site name → candidate ↦ the unit's output on all batches."""
    modules = {site.name: site.module for site in unit.sites}

    def evaluate(candidates: dict[str, SiteResult]) -> Tensor:
        with installed((modules[name], copy.copy(result)) for name, result in candidates.items()):
            return torch.cat([stream.run(unit.module, b) for b in range(len(stream))])

    return evaluate


def _checked(name: str, result: SiteResult) -> SiteResult:
    """A result on the CPU, if it is finite."""
    if result.weight is not None:
        if not finite(result.weight.dequantize()):
            raise QuantizationError(f"{name}: the quantized weight is not finite; its range is too wide")
        for key, value in vars(result.weight).items():
            if isinstance(value, Tensor):
                setattr(result.weight, key, value.cpu())
    for quantizer in result.inputs:
        quantizer.to("cpu")
    return result


def output_gradients(
    chain: VisionChain, metric: str, images: list[Tensor], device: torch.device, budget: int = GRADIENT_BYTES
) -> Iterator[dict[str, Tensor]]:
    """Gradients of a loss at the outputs of all sites, a unit at a time, in as few passes as the budget allows.

    Args:
        chain: The float model.
        metric: ``fisher``: cross-entropy with labels drawn from the model's own distribution, so that the squared
            gradient is the diagonal of the Fisher information; ``self_kl``: the divergence of the model from itself,
            as in PTQ4ViT's published code, whose gradient is zero but for rounding.
        images: Batches.
        device: Where to run.
        budget: Bytes of gradients that are kept at a time.

    Yields:
        Site name → gradient, fp32, of the output's shape, images first, for the sites of each unit in order.
    """
    sizes = _output_bytes(chain, images, device)
    units, first = chain.units, 0
    while first < len(units):
        last, total = first, 0
        while last < len(units) and (last == first or total + sizes[last] <= budget):
            total += sizes[last]
            last += 1
        with on_device(device, chain.model):
            found = _backward(chain, units[first:last], metric, images)
        for unit in units[first:last]:
            yield {site.name: found.pop(site.name) for site in unit.sites}
        first = last


def _output_bytes(chain: VisionChain, images: list[Tensor], device: torch.device) -> list[int]:
    """Size of the outputs of each unit's sites over all images."""
    sizes = dict.fromkeys((site.module for site in chain.sites), 0)

    def measure(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        sizes[module] = 4 * output.numel() * sum(map(len, images))

    with on_device(device, chain.model), hooked(dict.fromkeys(sizes, measure), inputs=False):
        chain.model(images[0][:1])
    return [sum(sizes[site.module] for site in unit.sites) for unit in chain.units]


def _backward(chain: VisionChain, units: list[Unit], metric: str, images: list[Tensor]) -> dict[str, Tensor]:
    names = {site.module: site.name for unit in units for site in unit.sites}
    parts: dict[str, list[Tensor]] = {name: [] for name in names.values()}
    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        output.retain_grad()
        kept[names[module]] = output

    generator = torch.Generator().manual_seed(TARGET_SEED)
    for batch in images:
        with torch.enable_grad(), hooked(dict.fromkeys(names, keep), inputs=False):
            loss = _loss(chain.model(batch.detach().clone().requires_grad_(True)), metric, generator)
            loss.backward()
        for name, output in kept.items():
            assert output.grad is not None
            parts[name].append(output.grad.float().cpu())
        kept.clear()
    return {name: torch.cat(found) for name, found in parts.items()}


def _loss(scores: Tensor, metric: str, generator: torch.Generator) -> Tensor:
    probabilities = scores.detach().float().softmax(-1)
    if metric == "self_kl":
        return kl_div(scores.float().log_softmax(-1), probabilities, reduction="sum")
    drawn = torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0]
    return cross_entropy(scores.float(), drawn.to(scores.device), reduction="sum")
