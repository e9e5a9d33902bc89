"""Putting quantized weights and activation quantizers into modules, for good or for a while."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bc.activations import attach_quantizers, detach_quantizers
from bc.errors import UserError
from bc.quantizers.base import SiteResult


def install(module: nn.Module, result: SiteResult, device: torch.device | None = None) -> None:
    """Quantize a site from now on: its weight, and its inputs where they have quantizers, of which it gets copies.

    Args:
        module: The site.
        result: How it is quantized.
        device: Where its inputs are; None takes that of the module, or, of a matmul, that of its quantizers.

    Raises:
        UserError: The weight is of another module.
    """
    quantized = result.weight  # asked for once: it may have to be unpacked
    if quantized is not None:
        weight: Any = module.weight
        found = quantized.dequantize()
        if found.numel() != weight.numel():
            raise UserError(
                f"quantized: a weight of shape {tuple(found.shape)} does not fit one of {tuple(weight.shape)}; give "
                "what calibrate() found for the same model"
            )
        weight.data = found.to(weight).view_as(weight)
    if result.inputs:
        child = attach_quantizers(module, copy.deepcopy(result.inputs))  # copies of a model are not to share them
        known = device or next((parameter.device for parameter in module.parameters()), None)
        if known is not None:
            child.to(known)


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
