"""Uniform affine grids: scales, zero points, groups and fake quantization, as pure functions on tensors.

A weight matrix W (out × in) is cut along its input axis into groups; every (row, group) has its own scale s and zero
point z. Codes are unsigned, q = clamp(round(w / s) + z, 0, 2^b − 1), and the quantized weight is ŵ = s · (q − z).
Symmetric grids use z = 2^(b−1), so that the signed code q − z covers −2^(b−1) … 2^(b−1) − 1, and
s = absmax / (2^(b−1) − ½), the mean of the two conventions that clip neither end by more than half a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bc.errors import UserError

MIN_BITS, MAX_BITS = 2, 8
MSE_CANDIDATES = 80
MSE_LOWEST = 0.2


def finite(values: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor Inf: by its ends, so that no mask of its size is made."""
    return not values.numel() or all(math.isfinite(end) for end in values.aminmax())


@dataclass(frozen=True)
class Grid:
    """Shape of a uniform affine grid for a matrix.

    Attributes:
        bits: Bits per code, 2 to 8.
        symmetric: One zero point in the middle (True) or a zero point per range (False).
        group_size: Columns that share a scale; −1 is the whole row. The last group may be shorter.
        granularity: ``row`` (each row has its own scales) or ``tensor`` (one scale for the matrix).
        clip: ``minmax`` (the full range) or ``mse`` (the shrunk range with the least squared error).
    """

    bits: int
    symmetric: bool = False
    group_size: int = -1
    granularity: Literal["row", "tensor"] = "row"
    clip: Literal["minmax", "mse"] = "minmax"

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise UserError(f"bits.weight: {self.bits} is out of range; allowed: {MIN_BITS} to {MAX_BITS}")
        if self.group_size == 0 or self.group_size < -1:
            raise UserError(f"bits.group_size: {self.group_size} is not allowed; use -1 (whole row) or a positive size")
        if self.granularity not in ("row", "tensor"):
            raise UserError(f"granularity: {self.granularity!r} is not known; allowed: row, tensor")
        if self.granularity == "tensor" and self.group_size != -1:
            raise UserError("bits.group_size: groups need granularity 'row'; set bits.group_size=-1 or granularity=row")
        if self.clip not in ("minmax", "mse"):
            raise UserError(f"clip: {self.clip!r} is not known; allowed: minmax, mse")

    @property
    def levels(self) -> int:
        """Largest code, 2^bits − 1."""
        return 2**self.bits - 1


def group_index(columns: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """Group of each column.

    Args:
        columns: Number of input columns.
        group_size: Columns per group; −1 is one group. The last group may be shorter.
        device: Where to make the result.

    Returns:
        int64 tensor of shape (columns,).
    """
    index = torch.arange(columns, device=device)
    return torch.zeros_like(index) if group_size == -1 else index // group_size


def affine_range(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that covers [low, high].

    The range is widened to contain 0, so that 0 is always represented exactly. An all-zero range gets scale 1.

    Args:
        low: Minima, any shape.
        high: Maxima, the same shape.
        bits: Bits per code.
        symmetric: Use a range symmetric about 0.

    Returns:
        (scale, zero point), floats of that shape; the zero point holds whole numbers in 0 … 2^bits − 1.
    """
    levels = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high - low) / levels
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(-low / scale).clamp(0, levels)
    return scale, zero


def encode(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes of x on a grid: clamp(round(x / scale) + zero, 0, 2^bits − 1), in x's dtype (broadcasting)."""
    return torch.div(x, scale).round_().add_(zero).clamp_(0, 2**bits - 1)


def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Values of codes on a grid: scale · (codes − zero) (broadcasting)."""
    return scale * (codes - zero)


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Round x to the nearest value of a grid (broadcasting); dtype and shape as x."""
    return decode(encode(x, scale, zero, bits), scale, zero)


def fit_range(x: Tensor, bits: int, symmetric: bool, clip: str) -> tuple[Tensor, Tensor]:
    """Scale and zero point per row of x.

    Args:
        x: Values, shape (rows, n), floating.
        bits: Bits per code.
        symmetric: Symmetric grid.
        clip: ``minmax``, or ``mse``: of the full range and ranges shrunk towards 0 in equal steps down to 0.2 of it,
            the one with the least sum of squared errors in each row.

    Returns:
        (scale, zero point), each of shape (rows, 1).
    """
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    scale, zero = affine_range(low, high, bits, symmetric)
    if clip == "minmax":
        return scale, zero
    best = (fake_quantize(x, scale, zero, bits) - x).square().sum(1, keepdim=True)
    for step in range(1, MSE_CANDIDATES + 1):
        shrink = 1 - (1 - MSE_LOWEST) * step / MSE_CANDIDATES
        s, z = affine_range(low * shrink, high * shrink, bits, symmetric)
        error = (fake_quantize(x, s, z, bits) - x).square().sum(1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


def weight_parameters(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and zero points of a weight matrix.

    Args:
        weight: Shape (out, in), floating.
        grid: The grid's shape.

    Returns:
        (scale, zero point), fp32, each of shape (out, groups), or (1, 1) at granularity ``tensor``.
    """
    weight = weight.float()
    if grid.granularity == "tensor":
        return fit_range(weight.reshape(1, -1), grid.bits, grid.symmetric, grid.clip)
    size = weight.shape[1] if grid.group_size == -1 else grid.group_size
    parts = [fit_range(part, grid.bits, grid.symmetric, grid.clip) for part in weight.split(size, dim=1)]
    return torch.cat([s for s, _ in parts], 1), torch.cat([z for _, z in parts], 1)


@dataclass
class QuantizedWeight:
    """A weight matrix on a uniform affine grid.

    Attributes:
        codes: uint8, shape (out, in), values 0 … 2^bits − 1.
        scale: fp32, shape (out, groups) or (1, 1).
        zero_point: fp32 whole numbers, the scale's shape.
        bits: Bits per code.
        symmetric: Every zero point is 2^(bits−1) and need not be stored.
        group: int64, shape (in,): the group of each column.
        trivial_groups: The groups are runs of equal length in column order, so that ``group`` need not be stored.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    symmetric: bool
    group: Tensor
    trivial_groups: bool = True

    def dequantize(self) -> Tensor:
        """The quantized weight, fp32, shape (out, in)."""
        scale, zero = self.scale, self.zero_point
        out = self.codes.to(torch.float32)
        if scale.shape[1] > 1 and self.trivial_groups:
            for columns, groups, size in _runs(out.shape[1], int((self.group == 0).sum())):
                part = out[:, columns].unflatten(1, (-1, size))
                part.sub_(zero[:, groups, None]).mul_(scale[:, groups, None])
            return out
        if scale.shape[1] > 1:
            scale, zero = scale[:, self.group], zero[:, self.group]
        return out.sub_(zero).mul_(scale)  # as decode, in one piece of memory

    def storage_bits(self) -> int:
        """Bits that the codes, scales, zero points and (where not trivial) the group index take on disk."""
        total = self.codes.numel() * self.bits + self.scale.numel() * 8 * self.scale.element_size()
        if not self.symmetric:
            total += self.zero_point.numel() * self.bits
        if not self.trivial_groups:
            total += self.group.numel() * 16
        return total


def quantize_weight(weight: Tensor, grid: Grid) -> QuantizedWeight:
    """Round a weight matrix to the nearest points of its own grid (round-to-nearest).

    Args:
        weight: Shape (out, in), floating, finite.
        grid: The grid's shape.

    Returns:
        The quantized weight.
    """
    scale, zero = weight_parameters(weight, grid)
    group = group_index(weight.shape[1], grid.group_size, weight.device)
    if scale.shape[1] == 1:
        codes = encode(weight.float(), scale, zero, grid.bits).to(torch.uint8)
        return QuantizedWeight(codes, scale, zero, grid.bits, grid.symmetric, group)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for columns, groups, size in _runs(weight.shape[1], grid.group_size):
        part = weight[:, columns].float().unflatten(1, (-1, size))
        codes[:, columns] = encode(part, scale[:, groups, None], zero[:, groups, None], grid.bits).flatten(1)
    return QuantizedWeight(codes, scale, zero, grid.bits, grid.symmetric, group)


def _runs(columns: int, size: int) -> Iterator[tuple[slice, slice, int]]:
    """Columns, groups and group size: of all the whole groups at once, and of the shorter one at the end."""
    whole = columns // size
    if whole:
        yield slice(0, whole * size), slice(0, whole), size
    if columns % size:
        yield slice(whole * size, columns), slice(whole, whole + 1), columns % size
