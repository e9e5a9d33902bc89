"""Putting quantized weights and activation quantizers into modules, for good or for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from bc.activations import attach_quantizers, detach_quantizers
from bc.quantizers.base import SiteResult


def install(module: nn.Module, result: SiteResult) -> None:
    """Quantize a site from now on: its weight, and its inputs where they have quantizers."""
    if result.weight is not None:
        weight: Any = module.weight
        weight.data = result.weight.dequantize().to(weight).view_as(weight)
    if result.inputs:
        attach_quantizers(module, result.inputs).to(_device(module, result))


def _device(module: nn.Module, result: SiteResult) -> Any:
    """Device of a module, or, of a matmul, which has no parameters, of its quantizers as they are."""
    tensors = [*module.parameters(), *(b for q in result.inputs for b in q.buffers())]
    return tensors[0].device if tensors else None


@contextmanager
def installed(results: Iterable[tuple[nn.Module, SiteResult]]) -> Iterator[None]:
    """Quantize sites for a while."""
    pairs = list(results)
    kept = [getattr(module, "weight", None) for module, _ in pairs]
    float_weights = [None if weight is None else weight.data for weight in kept]
    for module, result in pairs:
        install(module, result)
    try:
        yield
    finally:
        for (module, _), weight in zip(pairs, float_weights, strict=True):
            if weight is not None:
                own: Any = module.weight
                own.data = weight
            detach_quantizers(module)
