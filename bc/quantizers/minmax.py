"""Min-max: every grid covers the range of its values; nothing is searched.

Weights are rounded to the nearest point of their own grid (Krishnamoorthi, "Quantizing deep convolutional networks for
efficient inference: A whitepaper", 2018, arXiv 1806.08342). Activations have one grid a site and input, over the range
seen on the calibration images. The patch convolution's input, the image, stays float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from bc.activation_grids import Affine, Symmetric
from bc.activations import ActivationQuantizer
from bc.errors import QuantizationError
from bc.grid import Grid, finite, quantize_weight
from bc.quantizers.base import SiteQuantizer, SiteResult, SiteSamples
from bc.quantizers.base_ptq import FLOAT, check_bits, symmetric_scale
from bc.settings import Bits


class MinMax(SiteQuantizer):
    """Min-max grids for weights and activations."""

    name = "minmax"
    metric = "none"

    @dataclass(frozen=True)
    class Options:
        """Options of min-max.

        Attributes:
            weight_granularity: Weights that share a scale: ``row`` or ``tensor``.
            symmetric: Symmetric weight grids instead of ones with a zero point.
            symmetric_activations: Symmetric activation grids instead of ones with a zero point.
        """

        weight_granularity: Literal["row", "tensor"] = "row"
        symmetric: bool = False
        symmetric_activations: bool = False

    def __init__(self, bits: Bits, options: Options) -> None:
        super().__init__(bits, options)
        check_bits(self.name, bits)

    @property
    def needs_data(self) -> bool:
        """The ranges of activations come from calibration samples."""
        return self.bits.activation < FLOAT

    def quantize_site(self, site: SiteSamples) -> SiteResult:
        """See :meth:`bc.quantizers.base.SiteQuantizer.quantize_site`."""
        weight = None
        if site.weight is not None and self.bits.weight < FLOAT:
            if not finite(site.weight):
                raise QuantizationError(f"{site.name}: the weight holds NaN or Inf")
            o = self.options
            grid = Grid(self.bits.weight, o.symmetric, granularity=o.weight_granularity)
            weight = quantize_weight(site.weight.flatten(1), grid)
        notes = {"metric": self.metric, "weight_granularity": self.options.weight_granularity}
        return SiteResult(weight, [self._activation(site, x) for x in site.inputs], notes)

    def _activation(self, site: SiteSamples, x: torch.Tensor) -> ActivationQuantizer:
        bits = self.bits.activation
        if bits == FLOAT or site.role == "patch_embed":
            return ActivationQuantizer()
        low, high = x.amin().float(), x.amax().float()
        if not bool(torch.isfinite(high - low)):
            raise QuantizationError(f"{site.name}: an input holds NaN or Inf")
        if self.options.symmetric_activations:
            return Symmetric(symmetric_scale(torch.maximum(-low, high), bits), bits)
        return Affine.over(low, high, bits)
