"""Activation quantizers on uniform, twin-uniform and logarithmic grids.

Each grid is a pure function of the values and its parameters, which broadcast, so that a search tries many candidates
at once, and a small module that keeps the chosen parameters. A grid of b bits has at most 2^b values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bc.activations import ActivationQuantizer
from bc.grid import affine_range

GELU_MINIMUM = 0.1699712075  # −min of x · Φ(x)


def symmetric(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Signed uniform grid: s · clamp(round(x / s), −2^(b−1), 2^(b−1) − 1) (broadcasting)."""
    half = 2 ** (bits - 1)
    return (x / scale).round_().clamp_(-half, half - 1).mul_(scale)


def affine(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Uniform grid with a zero point, a whole number that may lie outside the codes (broadcasting)."""
    return ((x / scale).round_() + zero).clamp_(0, 2**bits - 1).sub_(zero).mul_(scale)


def twin_gelu(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """PTQ4ViT's twin uniform grid for what a GELU returns (broadcasting).

    Positive values take s · {0, …, 2^(b−1) − 1}; negative ones lie on 2^(b−1) equal steps from 0 to the minimum of
    GELU, which is represented exactly. With the shared zero these are 2^b values.
    """
    half = 2 ** (bits - 1)
    positive = (x / scale).round_().clamp_(0, half - 1).mul_(scale)
    negative = (x * (half / GELU_MINIMUM)).round_().clamp_(-half, 0).mul_(GELU_MINIMUM).div_(half)
    return positive + negative


def twin_softmax(x: Tensor, split: Tensor, bits: int) -> Tensor:
    """PTQ4ViT's twin uniform grid for probabilities (broadcasting).

    Values up to the split lie on 2^(b−1) − 1 equal steps of [0, split], values above it on as many of [0, 1]: 0, the
    split and 1 are represented exactly. (The published code adds the split to the values above it; this is without.)
    """
    levels = 2 ** (bits - 1) - 1
    # The code times the split is exact, for the split is a power of two, and so the split comes back as itself.
    fine = (x * (levels / split)).round_().clamp_(0, levels).mul_(split).div_(levels)
    coarse = (x * levels).round_().clamp_(0, levels).div_(levels)
    # A selection by torch.where is many times slower; at weights 0 and 1 the interpolation is exact.
    return torch.lerp(coarse, fine, (x <= split).to(x.dtype))


def log_sqrt2(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """RepQ-ViT's grid for probabilities: s · √2^(−k), k = 0 … 2^b − 2, and 0 as the last code (broadcasting).

    Rounding is in the logarithm; more bits extend the range, not the resolution. The value is written as RepQ-ViT
    reparametrises it to base 2: a shift by ⌈k/2⌉ and one of two scales, s for even k and √2 · s for odd k. (The
    published code has 2^b powers and 0 on top of them, one value more than b bits hold; the paper has no 0, so that the
    many probabilities near 0 would add up to a lot.)
    """
    last = 2**bits - 1
    code = (torch.log2((x / scale).clamp_(min=0)) * -2).round_().clamp_(0, last)
    value = torch.exp2(-(code / 2).ceil()) * (1 + (code % 2) * (math.sqrt(2) - 1)) * scale
    return torch.where(code == last, torch.zeros_like(value), value)


class Symmetric(ActivationQuantizer):
    """Signed uniform grid.

    Attributes:
        scale: One, or one a head, shape (heads, 1, 1).
    """

    scale: Tensor

    def __init__(self, scale: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Quantized value of x."""
        return symmetric(x, self.scale, self.bits).to(x.dtype)


class Affine(ActivationQuantizer):
    """Uniform grid with a zero point.

    Attributes:
        scale: One, or one a channel.
        zero_point: Whole numbers, the scale's shape.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", zero_point.clone())

    @classmethod
    def over(cls, low: Tensor, high: Tensor, bits: int) -> Affine:
        """The grid that covers [low, high] and 0."""
        return cls(*affine_range(low, high, bits, symmetric=False), bits)

    def forward(self, x: Tensor) -> Tensor:
        """Quantized value of x."""
        return affine(x, self.scale, self.zero_point, self.bits).to(x.dtype)

    def storage_bits(self) -> int:
        """The scales, and the zero points at the width of the codes."""
        return self.scale.numel() * self.scale.element_size() * 8 + self.zero_point.numel() * self.bits


class ReparametrisedAffine(Affine):
    """A grid per channel that is one grid for the whole tensor once the norm before it absorbs the channels' scales.

    The tensor's pair is the mean of the channels' (s̃, z̃); with r₁ = s / s̃ and r₂ = z − z̃ the norm returns
    x' = (x + s r₂) / r₁ instead of x, and x'/s̃ + z̃ = x/s + z.
    """

    @property
    def tensor_scale(self) -> Tensor:
        """The one scale s̃ after reparametrisation."""
        return self.scale.mean()

    @property
    def tensor_zero(self) -> Tensor:
        """The one zero point z̃ after reparametrisation, a whole number."""
        return self.zero_point.mean().round()

    @property
    def ratio(self) -> Tensor:
        """Per channel r₁ = s / s̃: what the next weight's columns are multiplied by."""
        return self.scale / self.tensor_scale

    @property
    def shift(self) -> Tensor:
        """Per channel s · r₂: what is added to x before it is divided by r₁."""
        return self.scale * (self.zero_point - self.tensor_zero)

    def storage_bits(self) -> int:
        """One scale and one zero point: the channels' are in the norm and the next Linear."""
        return self.scale.element_size() * 8 + self.bits


class TwinGELU(ActivationQuantizer):
    """See :func:`twin_gelu`."""

    scale: Tensor

    def __init__(self, scale: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Quantized value of x."""
        return twin_gelu(x, self.scale, self.bits).to(x.dtype)


class TwinSoftmax(ActivationQuantizer):
    """See :func:`twin_softmax`."""

    split: Tensor

    def __init__(self, split: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("split", split.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Quantized value of x."""
        return twin_softmax(x, self.split, self.bits).to(x.dtype)


class LogSqrt2(ActivationQuantizer):
    """See :func:`log_sqrt2`."""

    scale: Tensor

    def __init__(self, scale: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Quantized value of x."""
        return log_sqrt2(x, self.scale, self.bits).to(x.dtype)


class Noisy(ActivationQuantizer):
    """NoisyQuant: a fixed noise is added before a quantizer and removed after it, x̂ = q(x + N) − N.

    A Linear with quantized weight Ŵ removes it for nothing, by the bias −Ŵ N.

    Attributes:
        base: The quantizer q.
        noise: N, shape (in,).
    """

    noise: Tensor

    def __init__(self, base: ActivationQuantizer, noise: Tensor) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("noise", noise.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Quantized value of x."""
        noise = self.noise.to(x.dtype)
        return self.base(x + noise) - noise

    def storage_bits(self) -> int:
        """The base's parameters and the noise."""
        return self.base.storage_bits() + self.noise.numel() * self.noise.element_size() * 8
