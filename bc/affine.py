"""Scale and shift of every output channel, by least squares: they fold into the weight and cost nothing.

For a channel with float output y and quantized output ŷ, (a, b) minimise E(y − (a ŷ + b))²: a = Cov(y, ŷ) / Var(ŷ),
b = E y − a E ŷ. Bias Compensation is the case a = 1.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bc.errors import UserError
from bc.packing import packed
from bc.quantizers.base import SiteResult

ROWS = 256  # at a time: what is made of them stays in the cache


class ChannelMoments:
    """Running first and second moments of pairs of outputs by channel, weighted by tokens.

    Products and sums of a batch are fp32, those of batches fp64. All are taken about the first batch's means, so that
    what a large mean has in common with its square does not drown the variance.
    """

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        self.sums = torch.zeros(4, channels, dtype=torch.float64, device=device)  # y, ŷ, y·ŷ, ŷ²
        self.count = 0
        self.center: Tensor | None = None  # of y and ŷ, shape (2, channels)

    def add(self, goal: Tensor, output: Tensor, valid: Tensor | None = None) -> None:
        """Add a batch of rows, shape (batch, tokens, channels); ``valid``, (batch, tokens), leaves padding out."""
        pair = [t.float()[valid] if valid is not None else t.float().flatten(0, -2) for t in (goal, output)]
        if not len(pair[0]):
            return
        if self.center is None:
            self.center = torch.stack([t.mean(0) for t in pair])
        for y, y_hat in zip(*(t.split(ROWS) for t in pair), strict=True):
            y, y_hat = y - self.center[0], y_hat - self.center[1]
            ones = y.new_ones(len(y))
            self.sums += torch.stack([ones @ y, ones @ y_hat, ones @ (y * y_hat), ones @ y_hat.square()])
        self.count += len(pair[0])

    def solve(self) -> tuple[Tensor, Tensor]:
        """(a, b), fp32, shape (channels,); a = 1 where ŷ is constant."""
        assert self.center is not None
        y, y_hat, product, square = self.sums / self.count
        center = self.center.double()
        variance = square - y_hat.square()
        known = variance > 1e-12 * (variance + (center[1] + y_hat).square())
        scale = torch.where(known, (product - y * y_hat) / torch.where(known, variance, 1.0), 1.0)
        return scale.float(), (center[0] + y - scale * (center[1] + y_hat)).float()


def has_scales(result: SiteResult) -> bool:
    """Whether a site's weight has scales that can take a factor; a float weight takes it itself."""
    weight = result.weight
    return weight is None or hasattr(weight, "scale")


def fold_affine(module: nn.Module, result: SiteResult, scale: Tensor, shift: Tensor | None) -> SiteResult:
    """Fold a channel's scale and shift into a site's quantized weight and bias.

    Args:
        module: A Linear or Conv2d that holds the quantized weight; changed.
        result: How it is quantized.
        scale: Shape (out,).
        shift: Shape (out,); None adds nothing, so that a module without a bias stays without.

    Returns:
        The result with its grid's scales multiplied: what is to be stored now.

    Raises:
        UserError: The weight has no scale per row to take the factor.
    """
    own: Any = module
    weight: Any = result.weight
    if weight is not None:
        if not has_scales(result):
            raise UserError(
                f"bc.method: affine needs weights with scales, not a {type(weight).__name__}; set bc.method=bias"
            )
        factor = scale.to(weight.scale)[:, None]
        new: Any = copy.copy(weight)
        new = replace(new, scale=weight.scale * factor)
        if hasattr(weight, "zero_point"):
            new = replace(new, zero_point=weight.zero_point.expand(new.scale.shape).clone())
        result = packed(SiteResult(new, result.inputs, result.notes))
        own.weight.data = new.dequantize().to(own.weight).view_as(own.weight)
    else:
        own.weight.data = own.weight * scale.to(own.weight).view(-1, *[1] * (own.weight.dim() - 1))
    terms = [] if shift is None else [shift.to(own.weight)]
    terms += [] if own.bias is None else [scale.to(own.weight) * own.bias]
    if terms:
        own.bias = nn.Parameter(torch.stack(terms).sum(0), requires_grad=False)
    return result
