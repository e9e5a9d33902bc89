"""BiLLM: weights of one bit, with a second bit for salient columns.

Huang, Liu, Qin, Li, Zhang, Liu, Magno and Qi, "BiLLM: Pushing the Limit of Post-Training Quantization for LLMs", ICML
2024 (arXiv 2402.04291), Algorithms 1 and 2. The columns are visited in blocks. In each block the columns with the
largest Σ w² / U_jj², U the upper Cholesky factor of H⁻¹, are salient; their number is that with the least error when
they and the others are binarized apart. A salient weight becomes α₁ s₁ + α₂ s₂, the signs of itself and of what is
left. The other weights are split at a break point of the magnitude into a concentrated and a sparse region, each α s
with an α of its own. The error of the block is then taken up by the columns that follow it.

All α are means of magnitudes, which is the least-squares value for given signs, one for each row of a block and each of
the four uses; they are stored in half precision and everything after them sees the rounded values.

What we define ourselves. 1 / U_jj² is the variance of input j that the later inputs do not explain; the paper writes
[H⁻¹]_jj² and computes U_jj². With ``center`` each row's mean over a region is subtracted before the signs are taken,
and stored; the paper does not mention it, its published code does it. It is off unless asked for: the two tails of the
sparse region are rarely equally full, their mean then lies far from both, and the error rises. The update of the later
columns is the one of least error for the block as a whole, E U_bb = W_b − Ŵ_b; the paper divides by the diagonal of
U_bb alone (``propagation=diagonal``). Dead inputs (H_jj = 0) keep their weights and are never salient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bc.errors import QuantizationError, UserError
from bc.grid import finite
from bc.quantizers.base import Quantizer, SiteResult, storable
from bc.quantizers.gptq import MAX_DAMPING, inverse_factor
from bc.settings import Bits

LOWEST_BREAK, HIGHEST_BREAK = 0.1, 0.9
CONCENTRATED, SPARSE, SALIENT, RESIDUAL = range(4)  # columns of the scales; the means are those of the first three


@storable("binary")
@dataclass
class BinaryWeight:
    """A binarized weight matrix.

    Attributes:
        signs: bool, shape (out, in): the first sign of every weight, True is +.
        residual_signs: bool, shape (out, salient columns), in column order: their second sign.
        sparse: bool, shape (out, other columns), in column order: True in the sparse region, False in the concentrated.
        salient: bool, shape (in,): the salient columns.
        scales: fp16, shape (out, blocks, 4): α of concentrated, sparse, salient weights, and of salient residuals.
        means: fp16, shape (out, blocks, 3): what is added to concentrated, sparse and salient weights; or (out, blocks,
            0) if nothing is.
        block_size: Columns per block; the last one may be shorter.
    """

    signs: Tensor
    residual_signs: Tensor
    sparse: Tensor
    salient: Tensor
    scales: Tensor
    means: Tensor
    block_size: int

    def dequantize(self) -> Tensor:
        """The binarized weight, fp32, shape (out, in)."""
        scales, means = self.scales.float(), self.means.float()
        kind = torch.zeros_like(self.signs, dtype=torch.uint8)  # CONCENTRATED
        kind[:, ~self.salient] = self.sparse.to(torch.uint8)
        kind[:, self.salient] = SALIENT
        out = _plus_minus(self.signs)
        block = torch.arange(len(self.salient), device=self.salient.device) // self.block_size
        second = scales[:, block[self.salient], RESIDUAL] * _plus_minus(self.residual_signs)
        blocks = list(zip(out.split(self.block_size, 1), kind.split(self.block_size, 1), strict=True))
        for number, (part, kinds) in enumerate(blocks):
            part.mul_(scales[:, number].gather(1, kinds.long()))
        out[:, self.salient] += second
        for number, (part, kinds) in enumerate(blocks if means.shape[2] else ()):
            part.add_(means[:, number].gather(1, kinds.long()))
        return out

    def storage_bits(self) -> int:
        """Bits on disk: signs, second signs, region of each other weight, salient columns, scales and means."""
        bits = self.signs.numel() + self.residual_signs.numel() + self.sparse.numel() + self.salient.numel()
        return bits + sum(t.numel() * 8 * t.element_size() for t in (self.scales, self.means))


class BiLLM(Quantizer):
    """BiLLM for one weight matrix."""

    name = "billm"
    needs_hessian = True
    scales = False

    @dataclass(frozen=True)
    class Options:
        """Options of BiLLM.

        Attributes:
            damping: Added to the diagonal of H, as a fraction of its mean.
            block_size: Columns that share scales and a break point.
            max_salient: Most salient columns in a block.
            break_points: Number of break points tried, from 0.1 to 0.9 of the largest magnitude.
            break_by: One break point for all rows of a block (``block``, the paper) or one for each (``row``); neither
                is stored.
            center: Subtract each row's mean over a region before the signs are taken.
            propagation: ``exact`` (the least-error update of the later columns) or ``diagonal`` (the paper's).
        """

        damping: float = 0.01
        block_size: int = 128
        max_salient: int = 30
        break_points: int = 17
        break_by: Literal["block", "row"] = "block"
        center: bool = False
        propagation: Literal["exact", "diagonal"] = "exact"

        def __post_init__(self) -> None:
            if not 0 < self.damping <= MAX_DAMPING:
                raise UserError(f"quantizer.billm.damping: {self.damping} is out of range; allowed: above 0, to 1")
            for name, least in (("block_size", 1), ("max_salient", 0), ("break_points", 1)):
                if getattr(self, name) < least:
                    value = getattr(self, name)
                    raise UserError(f"quantizer.billm.{name}: {value} is not allowed; use {least} or more")

    def __init__(self, bits: Bits, options: Options) -> None:
        super().__init__(bits, options)
        if bits.weight != 1:
            raise UserError(f"bits.weight: {bits.weight} does not go with quantizer 'billm'; set bits=w1")
        if bits.group_size != -1:
            raise UserError(
                f"bits.group_size: {bits.group_size} does not go with quantizer 'billm', whose scales belong to "
                "its own blocks; set bits.group_size=-1 and quantizer.block_size"
            )

    def quantize_weight(self, weight: Tensor, hessian: Tensor | None) -> SiteResult:
        """See :meth:`bc.quantizers.base.Quantizer.quantize_weight`.

        The note ``bits_per_weight_signs`` is the paper's count, first and second signs alone.
        """
        if hessian is None:
            raise QuantizationError("BiLLM needs the second moment of the inputs")
        binary, tried = billm(weight, hessian, self.options)
        signs = (binary.signs.numel() + binary.residual_signs.numel()) / binary.signs.numel()
        notes = {
            "damping": tried[-1],
            "damping_retries": len(tried) - 1,
            "salient_columns": int(binary.salient.sum()),
            "bits_per_weight_signs": signs,
        }
        return SiteResult(binary, notes=notes)


def billm(weight: Tensor, hessian: Tensor, options: BiLLM.Options) -> tuple[BinaryWeight, list[float]]:
    """Binarize a matrix.

    Args:
        weight: Shape (out, in), floating.
        hessian: Shape (in, in), the second moment of the inputs up to a factor.
        options: See :class:`BiLLM.Options`.

    Returns:
        (binarized matrix, damping fractions tried).

    Raises:
        QuantizationError: H cannot be factorized, the input is not finite, or a scale overflows half precision.
    """
    w, h = weight.float().clone(), hessian.float().clone()
    if not finite(w) or not finite(h):
        raise QuantizationError("the weight or the second moment of its inputs is not finite")
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0 if bool(dead.all()) else h.diagonal()[~dead].mean()
    upper, tried = inverse_factor(h, options.damping)
    score = 1 / upper.diagonal().square()
    score[dead] = 0
    blocks = []
    for start in range(0, w.shape[1], options.block_size):
        stop = min(start + options.block_size, w.shape[1])
        part = w[:, start:stop]
        salient = salient_columns(part, score[start:stop] * part.square().sum(0), options.max_salient)
        block = binarize_block(part, salient, options)
        if not (finite(block.scales) and finite(block.means)):
            raise QuantizationError("a scale is too large for half precision; check the weight")
        blocks.append(block)
        error, corner = part - block.dequantize(), upper[start:stop, start:stop]
        if options.propagation == "exact":
            error = torch.linalg.solve_triangular(corner, error, upper=True, left=False)
        else:
            error = error / corner.diagonal()
        w[:, stop:] -= error @ upper[start:stop, stop:]
    names = ("signs", "residual_signs", "sparse")
    joined = {name: torch.cat([getattr(b, name) for b in blocks], 1) for name in (*names, "scales", "means")}
    return BinaryWeight(**joined, salient=torch.cat([b.salient for b in blocks]), block_size=options.block_size), tried


def salient_columns(weight: Tensor, score: Tensor, most: int) -> Tensor:
    """Choose the salient columns of a block: the first n by score, n that of the least error.

    The error is that of binarizing the first n and the others apart, each with mean magnitudes as scales.

    Args:
        weight: Shape (out, columns).
        score: Shape (columns,), ≥ 0; columns with 0 are not chosen.
        most: Most columns to choose; at least one is left over.

    Returns:
        bool, shape (columns,).
    """
    columns = weight.shape[1]
    chosen = torch.zeros(columns, dtype=torch.bool, device=weight.device)
    most = min(most, columns - 1, int((score > 0).sum()))
    if most < 1:
        return chosen
    order = torch.argsort(score, descending=True, stable=True)
    sums = weight.abs()[:, order].cumsum(1)  # Σ(|w| − α)² = Σw² − (Σ|w|)² / count for each of the two sets
    count = torch.arange(1, most + 1, device=weight.device)
    inside, outside = sums[:, :most], sums[:, -1:] - sums[:, :most]
    gain = (inside.square() / count + outside.square() / (columns - count)).sum(0)
    chosen[order[: int(gain.argmax()) + 1]] = True
    return chosen


def binarize(weight: Tensor, mask: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """Mean and scale per row of the weights inside a mask.

    Args:
        weight: Shape (out, columns).
        mask: bool, the same shape.
        center: Whether to subtract a mean; it is zero otherwise.

    Returns:
        (mean, α), each of shape (out, 1): the weights become mean + α · sign(w − mean). Zero where the mask is empty.
    """
    count = mask.sum(1, keepdim=True).clamp(min=1)
    mean = (weight * mask).sum(1, keepdim=True) / count if center else weight.new_zeros(len(weight), 1)
    return mean, ((weight - mean).abs() * mask).sum(1, keepdim=True) / count


def break_points(weight: Tensor, options: BiLLM.Options) -> Tensor:
    """Search the magnitude that parts the concentrated from the sparse region.

    Args:
        weight: The columns of a block that are not salient, shape (out, columns).
        options: Number of break points, ``break_by`` and ``center``.

    Returns:
        Shape (out, 1): magnitudes above it are sparse.
    """
    magnitude = weight.abs()
    largest = magnitude.amax(1, keepdim=True) if options.break_by == "row" else magnitude.max().expand(len(weight), 1)
    best_error = torch.full_like(largest, torch.inf)
    best = largest.clone()
    for fraction in torch.linspace(LOWEST_BREAK, HIGHEST_BREAK, options.break_points).tolist():
        point = fraction * largest
        error = split_error(weight, magnitude > point, options.center)
        error = error if options.break_by == "row" else error.sum().expand_as(error)
        best = torch.where(error < best_error, point, best)
        best_error = torch.minimum(error, best_error)
    return best


def split_error(weight: Tensor, sparse: Tensor, center: bool) -> Tensor:
    """Squared error of each row, shape (out, 1), when the two regions are binarized apart."""
    error = weight.new_zeros(len(weight), 1)
    for mask in (sparse, ~sparse):
        mean, scale = binarize(weight, mask, center)
        error += (((weight - mean).abs() - scale).square() * mask).sum(1, keepdim=True)
    return error


def binarize_block(weight: Tensor, salient: Tensor, options: BiLLM.Options) -> BinaryWeight:
    """Binarize one block with given salient columns.

    Args:
        weight: Shape (out, columns), fp32.
        salient: bool, shape (columns,).
        options: How the others are split, and ``center``.

    Returns:
        The block as a matrix of its own.
    """
    kept, rest = weight[:, salient], weight[:, ~salient]
    sparse = rest.abs() > break_points(rest, options)
    means, scales = zip(*(binarize(rest, mask, options.center) for mask in (~sparse, sparse)), strict=True)
    everything = torch.ones_like(kept, dtype=torch.bool)
    mean, scale = binarize(kept, everything, options.center)
    first = kept >= mean
    left = kept - mean - scale * _plus_minus(first)
    shift, residual_scale = binarize(left, everything, options.center)
    signs = torch.empty_like(weight, dtype=torch.bool)
    signs[:, salient] = first
    signs[:, ~salient] = rest >= torch.where(sparse, means[1], means[0])
    all_scales = torch.cat([*scales, scale, residual_scale], 1)
    all_means = torch.cat([*means, mean + shift], 1) if options.center else weight.new_zeros(len(weight), 0)
    return BinaryWeight(
        signs, left >= shift, sparse, salient, all_scales.half()[:, None], all_means.half()[:, None], weight.shape[1]
    )


def _plus_minus(signs: Tensor) -> Tensor:
    return signs.float() * 2 - 1
