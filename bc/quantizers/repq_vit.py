"""RepQ-ViT: quantizers made for the distributions, then reparametrised to simple ones.

Li, Xiao, Yang and Gu, "RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers", ICCV
2023 (arXiv 2212.08254), section 3. The output of a LayerNorm before qkv, fc1 or Swin's reduction gets a scale and a
zero point per channel, which become one pair for the tensor when the norm's affine parameters and the next Linear take
up the difference (:func:`reparametrise`). Attention probabilities get a √2-logarithmic grid, which is a base-2 one with
two scales. Weights have an asymmetric grid per row, other activations one per tensor.

Ranges are percentiles, as in the published code: of the full range and the central 99.999, 99.99 and 99.9 % on each
side, the one with the least squared error of the values, for each row, channel or tensor by itself.

What we define ourselves. The Linear's new bias comes from its quantized weight, b̂ = b − Ŵ (s r₂), so that the constant
term cancels and the whole equals the channel-wise quantizer followed by Ŵ; with the float weight, as published, an
error (Ŵ − W)(s r₂) stays in the bias. z̃ is rounded, for it must be a whole number. The grids of channels need not
contain 0, for a zero point that the norm takes up may be any whole number. The image stays float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bc.activation_grids import Affine, LogSqrt2, ReparametrisedAffine, affine, log_sqrt2
from bc.activations import ActivationQuantizer
from bc.errors import QuantizationError
from bc.grid import QuantizedWeight, affine_range, encode, finite, group_index
from bc.quantizers.awq import ScaledWeight
from bc.quantizers.base import Quantized, SiteQuantizer, SiteResult, SiteSamples, storable
from bc.quantizers.base_ptq import FLOAT, check_bits, in_float
from bc.settings import Bits

SHARES = (1.0, 0.99999, 0.9999, 0.999)
NORM_ROLES = ("qkv", "fc1", "reduction")
SMALLEST_STEP = 1e-5  # of a channel's largest magnitude: keeps its zero point exact in fp32


@storable("reparametrised")
class ReparametrisedWeight(ScaledWeight):
    """A weight on the grid of its columns multiplied by r₁, which the norm before it takes up at no cost."""

    def storage_bits(self) -> int:
        """The codes, scales and zero points: the columns' factors are in the norm."""
        return self.on_grid().storage_bits()


class RepQViT(SiteQuantizer):
    """RepQ-ViT."""

    name = "repq_vit"
    metric = "mse"

    @dataclass(frozen=True)
    class Options:
        """Options of RepQ-ViT.

        Attributes:
            weight_granularity: Weights that share a scale: ``paper`` or ``row``, one a row, or ``tensor``.
            norm: Output of a LayerNorm: ``channel`` (the method) or ``tensor`` (an ablation).
            softmax: Attention probabilities: ``log_sqrt2`` (the method) or ``uniform`` (an ablation).
        """

        weight_granularity: Literal["paper", "row", "tensor"] = "paper"
        norm: Literal["channel", "tensor"] = "channel"
        softmax: Literal["log_sqrt2", "uniform"] = "log_sqrt2"

    def __init__(self, bits: Bits, options: Options) -> None:
        super().__init__(bits, options)
        check_bits(self.name, bits)

    @property
    def needs_data(self) -> bool:
        """The ranges of activations come from calibration samples."""
        return self.bits.activation < FLOAT

    def quantize_site(self, site: SiteSamples) -> SiteResult:
        """See :meth:`bc.quantizers.base.SiteQuantizer.quantize_site`."""
        site = in_float(site)
        for value in (*site.inputs, *([] if site.weight is None else [site.weight])):
            if not finite(value):
                raise QuantizationError(f"{site.name}: the weight or an input holds NaN or Inf")
        errors: list[tuple[float, float]] = []
        inputs = [self._activation(site, i, errors) for i in range(len(site.inputs))]
        weight = self._weight(site, inputs, errors)
        granularity = "tensor" if self.options.weight_granularity == "tensor" else "row"
        return SiteResult(
            weight,
            inputs,
            {
                "metric": self.metric,
                "score_minmax": -sum(e for e, _ in errors),
                "score": -sum(e for _, e in errors),
                "weight_granularity": granularity,
                "reparametrised": isinstance(weight, ReparametrisedWeight),
            },
        )

    def _activation(self, site: SiteSamples, index: int, errors: list[tuple[float, float]]) -> ActivationQuantizer:
        bits, x = self.bits.activation, site.inputs[index]
        if bits == FLOAT or site.role == "patch_embed":
            return ActivationQuantizer()
        if self.options.softmax == "log_sqrt2" and site.role == "matmul_av" and index == 0:
            return _logarithmic(x, bits, errors)
        if self.options.norm == "channel" and site.norm is not None and site.role in NORM_ROLES:
            scale, zero = fit_percentile(x.flatten(0, -2).T.contiguous(), bits, errors, contain_zero=False)
            return ReparametrisedAffine(scale[:, 0].float(), zero[:, 0].float(), bits)
        scale, zero = fit_percentile(x.reshape(1, -1), bits, errors)
        return Affine(scale[0, 0].float(), zero[0, 0].float(), bits)

    def _weight(
        self, site: SiteSamples, inputs: list[ActivationQuantizer], errors: list[tuple[float, float]]
    ) -> Quantized | None:
        if site.weight is None or self.bits.weight == FLOAT:
            return None
        weight, bits = site.weight.flatten(1).float(), self.bits.weight
        ratio = inputs[0].ratio if isinstance(inputs[0], ReparametrisedAffine) else None
        if ratio is not None:
            weight = weight * ratio
        rows = weight.reshape(1, -1) if self.options.weight_granularity == "tensor" else weight
        scale, zero = fit_percentile(rows, bits, errors)
        codes = encode(weight, scale, zero, bits).to(torch.uint8)
        group = group_index(weight.shape[1], -1, weight.device)
        if ratio is None:
            return QuantizedWeight(codes, scale, zero, bits, False, group)
        return ReparametrisedWeight(codes, scale, zero, bits, False, group, ratio)


def tails(x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Quantiles 1 − share and share of each row of x, interpolated, each of shape (rows, 1)."""
    position = (x.shape[1] - 1) * (1 - share)
    below = min(int(position), x.shape[1] - 1)
    count = min(below + 2, x.shape[1])
    ends = []
    for largest in (False, True):
        values = x.topk(count, dim=1, largest=largest).values
        ends.append(torch.lerp(values[:, below : below + 1], values[:, count - 1 : count], position - below))
    return ends[0], ends[1]


def channel_range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that covers [low, high], which need not contain 0."""
    magnitude = torch.maximum(low.abs(), high.abs())
    scale = (high - low) / (2**bits - 1)
    # A constant channel is one step away from 0 and so represented exactly.
    scale = torch.where(scale > SMALLEST_STEP * magnitude, scale, magnitude)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, torch.round(-low / scale)


def fit_percentile(
    x: Tensor, bits: int, errors: list[tuple[float, float]] | None = None, *, contain_zero: bool = True
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row of x, of the percentile range with the least squared error.

    Args:
        x: Shape (rows, n).
        bits: Bits per code.
        errors: Takes the sum of squared errors at min-max and at the choice, each divided by that of x.
        contain_zero: Widen every range to contain 0, so that the zero point is one of the codes.

    Returns:
        (scale, zero point), each of shape (rows, 1).
    """
    best: Tensor | None = None
    for share in SHARES:
        low, high = tails(x, share)
        s, z = affine_range(low, high, bits, symmetric=False) if contain_zero else channel_range(low, high, bits)
        error = (affine(x, s, z, bits) - x).square().sum(1, keepdim=True)
        if best is None:
            best, scale, zero, first = error, s, z, error
            continue
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    assert best is not None
    if errors is not None:
        power = float(x.square().sum()) or 1.0
        errors.append((float(first.sum()) / power, float(best.sum()) / power))
    return scale, zero


def _logarithmic(x: Tensor, bits: int, errors: list[tuple[float, float]]) -> LogSqrt2:
    """The √2-logarithmic grid whose largest value is the percentile with the least squared error."""
    found = []
    for share in SHARES:
        scale = tails(x.reshape(1, -1), share)[1][0, 0]
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        found.append((float((log_sqrt2(x, scale, bits) - x).square().sum()), scale))
    best = min(found, key=lambda pair: pair[0])
    power = float(x.square().sum()) or 1.0
    errors.append((found[0][0] / power, best[0] / power))
    return LogSqrt2(best[1].float(), bits)


def reparametrise(
    norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None, grid: ReparametrisedAffine
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write a norm and the Linear after it so that the activation between them needs one scale and one zero point.

    Args:
        norm_weight: Of the norm, shape (in,).
        norm_bias: Of the norm, shape (in,).
        weight: The Linear's (quantized) weight in the original coordinates, shape (out, in).
        bias: The Linear's, shape (out,), or None.
        grid: Quantizer of the norm's output.

    Returns:
        (norm weight, norm bias, weight, bias) of the new model, whose quantizer is (grid.tensor_scale,
        grid.tensor_zero): its output is that of the old norm, ``grid`` and the old Linear.
    """
    image = weight @ grid.shift
    return (
        norm_weight / grid.ratio,
        (norm_bias + grid.shift) / grid.ratio,
        weight * grid.ratio,
        -image if bias is None else bias - image,
    )
